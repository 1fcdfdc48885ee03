"""Tiny FLUX models of seeded random numbers, for the tests: every part of the way from file to picture in a second.

    FOLDER/diffusion_models/demo.safetensors     SVDQ INT4, 256 channels
    FOLDER/vae/vae.safetensors
    FOLDER/input/conditioning.safetensors
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, interpolate

from svdq_pack.svdq.checkpoint import metadata_for
from svdq_pack.svdq.container import NAMES, TensorInfo, write_tensors
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.families.family import swap_halves
from svdq_pack.svdq.format import slot_tensors
from svdq_pack.svdq.kernels import layout, reference, weights
from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight

SHAPE = flux1.Shape(hidden=256, depth=1, depth_single=2, in_features=64, context_dim=128, vec_dim=64, guidance=True)
RANK = 16
BF16 = torch.bfloat16


def make_files(folder):
    """The three files."""
    folder = Path(folder)
    for name in ("diffusion_models", "vae", "input"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(2411_05007)
    write_model(folder / "diffusion_models" / "demo.safetensors", random)
    save_file(vae(random), folder / "vae" / "vae.safetensors")
    conditioning = {"0.cond": torch.randn(1, 16, SHAPE.context_dim, generator=random),
                    "0.pooled_output": torch.randn(1, SHAPE.vec_dim, generator=random)}
    save_file(conditioning, folder / "input" / "conditioning.safetensors")


def write_model(path, random, shape=SHAPE, rank=RANK, precision="int4"):
    """A random FLUX of this shape, quantised by rounding to nearest, as an SVDQ checkpoint."""
    tensors = {}
    for slot in shape.slots():
        dense = torch.randn(slot.n, slot.k, generator=random) / slot.k ** 0.5
        bias = torch.randn(slot.n, generator=random) * (0.3 if slot.kind == "awq" else 0.05)
        weight = awq(dense * 0.3) if slot.kind == "awq" else w4a4(dense, slot, rank, precision, random)
        if slot.kind == "w4a4":
            bias -= weights.dequantize(weight)[1]           # the file's bias takes back what the shift adds
        tensors |= slot_tensors(slot, weight, bias)
    for place in shape.comfy_plain():
        name, size = place.tensor
        values = torch.randn(size, generator=random)
        if len(size) == 2:
            values = (values / size[1] ** 0.5).to(BF16)
            tensors[name] = swap_halves(values) if place.swapped else values
        else:
            tensors[name] = (values * 0.05 if name.endswith(".bias") else 1 + 0.1 * values).to(BF16)
    specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, specs, metadata_for(shape, precision, rank), tensors.items())


def write_text_encoder(path, random, shape, half=torch.float16, quantised=lambda module: True):
    """A random 4-bit T5 encoder of this text_encoder.Shape, as published; returns {name: fp32 tensor} of ComfyUI's T5."""
    tensors, dense = {}, {}
    for name, size in shape.plain().items():
        values = torch.randn(size, generator=random)
        tensors[name] = (1 + 0.1 * values if len(size) == 1 else values).to(half)
        dense[name] = tensors[name].float()
    for module, (n, k) in shape.linears().items():
        if not quantised(module):
            tensors[f"{module}.weight"] = (torch.randn(n, k, generator=random) / k ** 0.5).to(half)
            dense[f"{module}.weight"] = tensors[f"{module}.weight"].float()
            continue
        codes = torch.randint(16, (n, k), generator=random, dtype=torch.uint8)
        groups = k // 128
        scales = (torch.rand(groups, n, generator=random) + 0.5) * 0.2 / k ** 0.5
        zeros = -(7 + torch.rand(groups, n, generator=random)) * scales
        scales, zeros = scales.to(half), zeros.to(half)
        padding = torch.zeros(-groups % 8, n, dtype=half)
        tensors |= {f"{module}.qweight": layout.pack_awq(codes).view(torch.int16).view(n // 4, k),
                    f"{module}.scales": torch.cat([scales, padding]), f"{module}.scaled_zeros": torch.cat([zeros, padding])}
        dense[f"{module}.weight"] = reference.dequantize_awq(codes, scales.t(), zeros.t())
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()       # the file has it twice
    save_file(tensors, path, {"model_class": "NunchakuT5EncoderModel"})
    return dense


def w4a4(dense, slot, rank, precision, random):
    """Smooth, take the `rank` largest singular directions away, round the rest to nearest."""
    smooth = (0.5 + torch.rand(slot.k, generator=random)).to(BF16)
    down = up = None
    if rank:
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        up, down = (left[:, :rank] * values[:rank]).to(BF16), right[:rank].t().contiguous().to(BF16)
        dense = dense - up.float() @ down.float().t()
    grouped = (dense * smooth.float()).view(slot.n, -1, layout.GROUP[precision])
    peak = grouped.abs().amax(2)
    if precision == "int4":
        wscales, wtscale = (peak / 7).to(BF16), 1.0
        codes = (grouped / wscales.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    else:
        wtscale = (peak.max() / (6 * 448)).to(BF16).float().item()
        wscales = (peak / (6 * wtscale)).to(torch.float8_e4m3fn)
        scaled = grouped / (wscales.float() * wtscale).clamp(min=1e-12)[..., None]
        codes = (scaled[..., None] - layout.E2M1).abs().argmin(-1).to(torch.uint8)
    return W4A4Weight(precision=precision, unsigned=slot.unsigned(precision),
                      qweight=layout.pack_codes(codes.view(slot.n, slot.k)), wscales=layout.pack_scales(wscales),
                      smooth=layout.pack_vector(smooth), wtscale=wtscale,
                      proj_down=None if down is None else layout.pack_down(down),
                      proj_up=None if up is None else layout.pack_up(up))


def awq(dense):
    grouped = dense.view(len(dense), -1, 64)
    scales = (grouped.abs().amax(2) / 7).to(BF16)
    codes = (grouped / scales.float()[..., None]).round().clamp(-7, 8).add(7).to(torch.uint8)
    return AWQWeight(qweight=layout.pack_awq(codes.view(dense.shape)), wscales=scales.t().contiguous(),
                     wzeros=(-7 * scales.float()).to(BF16).t().contiguous())


def vae(random):
    """Random weights in the shape of TAESD for 16 latent channels, the form ComfyUI's 'Load VAE' recognises."""
    tensors = {}

    def conv(name, out, into, bias=True, gain=1.0):
        tensors[f"{name}.weight"] = torch.randn(out, into, 3, 3, generator=random) * gain / (9 * into) ** 0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(out, generator=random) * 0.1

    def blocks(name, indices):
        for index in indices:
            for part in (0, 2, 4):
                conv(f"{name}.{index}.conv.{part}", 64, 64, gain=0.7)

    conv("taesd_encoder.0", 64, 3)
    blocks("taesd_encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    for index in (2, 6, 10):
        conv(f"taesd_encoder.{index}", 64, 64, bias=False)
    conv("taesd_encoder.14", 16, 64)
    conv("taesd_decoder.1", 64, 16, gain=1.4)
    blocks("taesd_decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    for index in (7, 12, 17):
        conv(f"taesd_decoder.{index}", 64, 64, bias=False)
    conv("taesd_decoder.19", 3, 64, bias=False)
    picture = decode(tensors, 3 * torch.randn(16, 16, 8, 8, generator=random))      # FLUX latents are about so large
    spread, middle = torch.std_mean(picture, (0, 2, 3))
    tensors["taesd_decoder.19.weight"] *= 0.15 / spread[:, None, None, None]
    tensors["taesd_decoder.19.bias"] = 0.5 - 0.15 * middle / spread     # mid grey, inside the range
    return tensors | {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


def decode(tensors, x):
    """What ComfyUI's TAESD decoder computes from a latent: a convolution, and per size three blocks, then twice that."""
    def conv(name, x):
        return conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding=1)

    x = conv("taesd_decoder.1", torch.tanh(x / 3) * 3).relu()
    for index in (3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18):
        name = f"taesd_decoder.{index}"
        if f"{name}.weight" in tensors:
            x = conv(name, interpolate(x, scale_factor=2))
        else:
            x = (x + conv(f"{name}.conv.4", conv(f"{name}.conv.2", conv(f"{name}.conv.0", x).relu()).relu())).relu()
    return conv("taesd_decoder.19", x)
