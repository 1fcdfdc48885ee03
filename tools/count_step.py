#!/usr/bin/env python3
"""What one step of FLUX.1-dev at 1024 x 1024 launches on a card, counted without one and without its numbers.

    SVDQ_COMFYUI=TREE python tools/count_step.py [CARD | bf16 ...] [--json svdq/step_counts.json]

ComfyUI's own Flux runs with our layers on meta tensors, as on a card: the registry is told its compute capability, so its plans
choose that card's variants. Every operator that reaches torch's dispatcher is written down: views and allocations are none.

An operator is one launch of ours by its contract (variant.prepare, product and modulates, awq_gemv), and in torch one kernel
as its eager mode has it. That is a lower bound where torch composes an operator of several kernels.

Bytes are those of each operand once, a broadcast one as it lies in memory, with no credit for an L2 cache. Two rules:
  between   all bytes of every operator that is no GEMM, no GEMV and no attention: design rule "every byte of every op that is
            no GEMM"
  moved     the activation bytes of every operator, GEMMs and attention included, weights excluded
Bytes of the low-rank branch are among these: its factors, and what its down projection leaves for its up projection.

Test: tests/comfy/inprocess/checks_count_step.py
"""

import argparse
import collections
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
CARDS = {"RTX 2080 Ti": (7, 5), "A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H200": (9, 0), "RTX 5090": (12, 0)}
SHARED = {"RTX 2080 Ti": 64, "A100": 164, "RTX 3090": 100, "RTX 4090": 100, "H200": 228, "RTX 5090": 100}    # KiB of each
PROCESSORS = {"RTX 2080 Ti": 68, "A100": 108, "RTX 3090": 82, "RTX 4090": 128, "H200": 132, "RTX 5090": 170}
PRECISIONS = {"RTX 5090": "nvfp4"}              # the file that precision_for prefers there
STOCK = "bf16"                                  # in the place of a card: ComfyUI's own layers, the same on every card
DEPTH, SINGLE, WIDTH, TEXT, SIDE, RANK = 19, 38, 3072, 512, 128, 32     # SIDE of the latent: two of it are a token
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "linear")
WRITES_ONLY = ("copy_", "fill_", "zero_")
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
        "_unsafe_view", "_reshape_alias")


class Counter(TorchDispatchMode):
    """Rows {(kind, name, shapes): [calls, bytes of activations, of weights, multiply-adds, the low rank's, bytes of that]}."""

    def __init__(self, weights, processors):
        super().__init__()
        self.processors = processors            # of the card: how many CTAs share the rows of an MLP
        self.weights, self.rows = weights, collections.defaultdict(lambda: [0] * 6)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE and not func.is_view:
            self.add(name, *_operands(func, name, args, kwargs, out))
        return out

    def add(self, name, named, read, written):
        tensors = [*read, *written]
        ours = [t for t in tensors if t.untyped_storage()._cdata not in self.weights]
        activations = sum(map(_nbytes, ours))
        kind, macs, low = _work(name, named, read, written)
        shapes = " ".join("x".join(map(str, t.shape)) for t in (read[:1] + written[:1]))
        low_bytes = _low_bytes(name, named, written)
        if name.startswith(("svdq::gemm", "svdq::mlp")):    # operands and an MLP's output are codes
            tokens, n = (named["tokens"], named["qweight"].shape[0]) if "tokens" in named else written[0].shape
            shapes = f"{tokens}x{macs // (tokens * n)} {tokens}x{n}"
        if name.startswith("svdq::mlp"):
            shares = self.add_shares(tokens, n, written[2], written[1].nbytes if named.get("form") else 0)
            activations, low_bytes = (nbytes + shares - written[2].nbytes for nbytes in (activations, low_bytes))
        weights = sum(map(_nbytes, tensors)) - sum(map(_nbytes, ours))
        self.add_row((kind, name, shapes), 1, activations, weights, macs, low, low_bytes)

    def add_shares(self, tokens, n, low, scales):
        """Bytes of what mlp.cuh writes of its low-rank down in fp32, one share per CTA of the same rows. mlp_low adds them up,
        and where scales are normalised reads these bytes of them, too, and writes the largest behind them."""
        from svdq_pack.svdq.kernels import mlp
        ctas = mlp.ctas_of_rows(n, tokens, self.processors)
        shares = ctas * 2 * low.nbytes
        self.add_row(("glue", "mlp_low", f"{ctas}x{tokens}x{RANK} {tokens}x{RANK}"), 1, shares + low.nbytes + scales, 0, 0, 0,
                     shares + low.nbytes)
        return shares

    def add_row(self, key, *figures):
        self.rows[key] = [have + more for have, more in zip(self.rows[key], figures)]

    def attention(self, q, k, v, heads, *given, **more):
        """In the place of optimized_attention, with skip_reshape: q, k, v [B, heads, tokens, 128]."""
        out = q.new_empty(q.shape[0], q.shape[2], heads * q.shape[3])
        self.add("attention", {}, [q, k, v], [out])
        return out

    def rms_norm(self, x, shape, weight=None, eps=None):
        """In the place of torch.rms_norm, which is one kernel on CUDA and several operators on meta tensors."""
        out = torch.empty_like(x)
        self.add("rms_norm", {}, [x] if weight is None else [x, weight], [out])
        return out


def _operands(func, name, args, kwargs, out):
    """({name: argument}, tensors read, tensors written)"""
    arguments, read, written = func._schema.arguments, [], []
    named = dict(zip((argument.name for argument in arguments), args)) | kwargs
    for argument in arguments:
        value = named.get(argument.name)
        tensors = [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not writes or name not in WRITES_ONLY and (argument.name != "out" or named.get("accumulate")):
            read += tensors
        if writes:
            written += tensors
    if not written:
        written = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)]
    return named, read, written


def _nbytes(tensor):
    """Of a tensor as it lies in memory: what a stride of 0 repeats counts once."""
    size = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride()):
        size *= n if stride else min(n, 1)
    return size


def _work(name, named, read, written):
    """(kind, multiply-adds, those of the low-rank branch)"""
    if name == "attention":
        b, heads, tokens, size = read[0].shape
        return "attention", 2 * b * heads * tokens * read[1].shape[2] * size, 0
    if name in GEMMS:
        a, b = read[-2:] if name != "linear" else (read[0], read[1].t())
        return "gemm", a.numel() * b.shape[-1], 0
    if name.startswith("svdq::mlp"):                # up of this layer, down of the next; shares of the down are apart
        n, tokens = named["qweight"].shape[0], named["tokens"]
        return "gemm", tokens * 2 * named["qweight"].nbytes, 2 * tokens * n * RANK
    if name.startswith("svdq::gemm"):
        tokens, n = written[0].shape
        return "gemm", tokens * 2 * named["qweight"].nbytes, tokens * n * RANK         # two codes a byte
    if name == "svdq::awq_gemv":
        return "gemv", read[0].shape[0] * read[0].shape[1] * sum(t.shape[1] for t in written), 0
    if name == "svdq::dequant":
        return "dequant", 0, 0
    if name.startswith("svdq::"):
        inputs = named["x"] if isinstance(named["x"], list) else [named["x"]]       # of adaln: one for all layers, or one each
        layers = max(len(written) // 3, 1)
        return "quantiser", 0, layers // len(inputs) * sum(x.numel() for x in inputs) * RANK
    return "glue", 0, 0


def _low_bytes(name, named, written):
    """Of the operands of an operator of ours those that the low-rank branch has to itself."""
    if not name.startswith("svdq::"):
        return 0
    down = named.get("proj_down")
    operands = [named.get("low"), named.get("proj_up"), *(down if isinstance(down, list) else [down])]
    made = [] if name.startswith("svdq::gemm") or down is None else written[2::3]      # codes, scales and low of each layer
    return sum(_nbytes(tensor) for tensor in (*operands, *made) if tensor is not None)


# ---- the model

def host(tree):
    """ComfyUI in this process, and the pack as svdq_pack."""
    pack = sys.modules.setdefault("svdq_pack", types.ModuleType("svdq_pack"))
    pack.__path__ = [str(ROOT)]
    sys.path[:] = [tree, *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tools"))]
    from svdq_pack.workflows.headless import comfy_main, maker
    keep = comfy_main.declare_operators() if maker.vision_cannot_load().exists() else None
    import comfy.cli_args
    import utils.extra_config  # noqa: F401, before ComfyUI's nodes.py makes `utils` mean another
    comfy.cli_args.args.cpu = True
    return keep


def build(card, depth=DEPTH, single=SINGLE):
    """(ComfyUI's Flux of our layers on the meta device, its dtype) as on a card."""
    import comfy.ldm.flux.model as flux

    from svdq_pack.nodes.host.blocks import fuse
    from svdq_pack.nodes.host.layer import SVDQOps
    from svdq_pack.svdq.families.family import by_layer
    from svdq_pack.svdq.families.flux1 import Shape
    from svdq_pack.svdq.format import PackedTiles, Tile
    from svdq_pack.svdq.kernels import registry

    dtype = torch.float16 if CARDS[card] < (8, 0) else torch.bfloat16
    places, state = Shape(WIDTH, depth, single, 64, 4096, 768, True), {}
    # A layout may ask its numbers for a rare case (fp8: a code of -8), and meta tensors have none
    with torch.device("meta"), mock.patch.object(torch.Tensor, "__bool__", lambda tensor: False):
        for layer in by_layer(places.comfy_places()):
            tiles = [Tile(place.row, place.col, registry.pack(weight(place.slot, PRECISIONS.get(card, "int4"), dtype), dtype))
                     for place in layer.places]
            tiles = PackedTiles(tiles)
            state[f"{layer.name}.weight"] = tiles.stored
            state[f"{layer.name}.bias"] = torch.empty(layer.n, dtype=dtype)
            state[f"{layer.name}.svdq"] = torch.frombuffer(bytearray(tiles.description(act_bits=None), "utf-8"),
                                                           dtype=torch.uint8)
        for place in places.comfy_plain():
            state[place.alias or place.name] = torch.empty(place.tensor.shape, dtype=dtype)
        model = flux.Flux(dtype=dtype, device="meta", operations=SVDQOps, **shape(depth, single))
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise SystemExit(f"count_step: ComfyUI's Flux lacks {missing[:3]}, or does not know {unexpected[:3]}.")
    fuse(model)
    return model, dtype


def stock(depth=DEPTH, single=SINGLE):
    """(ComfyUI's Flux as it is, its dtype) on the meta device."""
    import comfy.ldm.flux.model as flux
    import comfy.ops
    return flux.Flux(dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init,
                     **shape(depth, single)), torch.bfloat16


def shape(depth, single):
    """What comfy.ldm.flux.model.Flux is told of FLUX.1-dev."""
    return dict(image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
                hidden_size=WIDTH, mlp_ratio=4.0, num_heads=WIDTH // 128, depth=depth, depth_single_blocks=single,
                axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])


def weight(slot, precision, dtype):
    """The weight of a slot on the meta device, as the file has it."""
    from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, k = slot.n, slot.k
    if slot.kind == "awq":
        return AWQWeight(empty(n // 4, k // 2, dtype=torch.int32), empty(k // 64, n), empty(k // 64, n))
    nv = precision == "nvfp4"
    return W4A4Weight(precision, slot.unsigned(precision), empty(n, k // 2, dtype=torch.int8),
                      empty(k // (16 if nv else 64), n, dtype=torch.float8_e4m3fn if nv else dtype), empty(k), empty(k, RANK),
                      empty(n, RANK), empty(n) if nv else None)


def count(card, depth=DEPTH, single=SINGLE):
    """[row as a dict] of one step on a card, or of STOCK."""
    import comfy.ldm.flux.math as math

    from svdq_pack.svdq.kernels import epilogues, launch, rows
    from svdq_pack.svdq.kernels.variant import Target

    def overlaps(a, b):                             # addresses of meta tensors are all 0
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata

    with mock.patch.object(Target, "of", lambda device: Target("cuda", CARDS[card])), torch.no_grad():
        model, dtype = stock(depth, single) if card == STOCK else build(card, depth, single)
        weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        counter = Counter(weights, PROCESSORS.get(card))
        given = [torch.empty(shape, dtype=dtype, device="meta") for shape in (
            (1, 16, SIDE, SIDE), (1,), (1, TEXT, 4096), (1, 768), (1,))]
        with (mock.patch.object(epilogues, "overlaps", overlaps), mock.patch.object(rows, "overlaps", overlaps),
              mock.patch.object(launch, "shared_memory", lambda device: SHARED[card] << 10),
              mock.patch.object(math, "optimized_attention", counter.attention),
              mock.patch.object(torch, "rms_norm", counter.rms_norm), counter):
            model(given[0], given[1], given[2], given[3], guidance=given[4])
    return [dict(zip(("kind", "name", "shapes", "calls", "activations", "weights", "macs", "low_rank_macs", "low_rank_bytes"),
                     (*key, *row)))
            for key, row in counter.rows.items()]


def totals(rows):
    """The figures of a step. Bytes of weights are in `weights` alone."""
    def total(field, *kinds):
        return sum(row[field] for row in rows if not kinds or row["kind"] in kinds)

    return {"launches": total("calls"),
            "launches_of_ours": sum(row["calls"] for row in rows if row["name"].startswith("svdq::")),
            "between_gb": round((total("activations", "glue", "quantiser") + total("weights", "glue", "quantiser")) / 1e9, 2),
            "moved_gb": round(total("activations") / 1e9, 2), "weights_gb": round(total("weights") / 1e9, 2),
            "low_rank_gb": round(total("low_rank_bytes") / 1e9, 2),
            "by_kind_gb": {kind: round(total("activations", kind) / 1e9, 2) for kind in sorted({r["kind"] for r in rows})},
            "gemm_tmac": round(total("macs", "gemm") / 1e12, 3), "attention_tmac": round(total("macs", "attention") / 1e12, 3),
            "low_rank_tmac": round(total("low_rank_macs") / 1e12, 3)}


def as_json(found):
    """{card: rows} as svdq/step_counts.json has it, a row a line."""
    cards = (f'"{card}": [\n' + ",\n".join(map(json.dumps, rows)) + "]" for card, rows in found.items())
    return "{\n" + ",\n".join(cards) + "}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", metavar="CARD", help=", ".join((*CARDS, STOCK)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every row")
    options = parser.parse_args()
    if unknown := set(options.cards) - {*CARDS, STOCK}:
        parser.error(f"no card is called {', '.join(sorted(unknown))}. Needs some of {', '.join((*CARDS, STOCK))}, none: all")
    if "SVDQ_COMFYUI" not in os.environ:
        parser.error("SVDQ_COMFYUI is not set. Needs the folder of a ComfyUI, such as .environment/comfyui-0.30.0")
    kept = host(os.environ["SVDQ_COMFYUI"])         # noqa: F841, declared operators live as long as it
    found = {}
    for card in options.cards or (*CARDS, STOCK):
        found[card] = count(card)
        print(card, json.dumps(totals(found[card]), indent=1), flush=True)
    if options.json:
        options.json.write_text(as_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
