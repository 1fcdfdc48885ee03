"""Models, inputs and measures for the checks inside diffusers. Importing this imports diffusers."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import SVDQFluxTransformer2DModel
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.hf import operators
from svdq_pack.svdq.hf.layer import SVDQLinear
from svdq_pack.svdq.kernels import epilogues, registry
from svdq_pack.tests import random_models
from svdq_pack.tests.unit.helpers import MODELS

LORA = "lora_model_nvfp4_flux_dev_like"
STRENGTH = 0.75                                 # that of the golden results with a LoRA
# A golden result in fp32 was made on another CPU: an exp that is an ulp off moves the angles of a timestep in the thousands,
# and with them everything by 7e-6.
GOLDEN = 2e-5
ROUNDED = 2e-3                                  # what rounding the factors of LoRAs to bf16 does to a result
SHAPE = flux1.Shape(hidden=256, depth=1, depth_single=2, in_features=64, context_dim=128, vec_dim=64, guidance=True)


class Golden:
    """A golden checkpoint with its inputs and results.

    path, io   as tests/fixtures/format has them; io in fp32
    """

    def __init__(self, folder, precision):
        self.path = folder / f"{MODELS[precision]}.safetensors"
        self.io = {name: tensor.float() for name, tensor in load_file(folder / f"{MODELS[precision]}.io.safetensors").items()}

    def load(self, dtype=torch.float32, act_bits=16, **options):
        """16: golden results are of activations that nobody rounds, whatever kernels there are."""
        return SVDQFluxTransformer2DModel.from_pretrained(self.path, dtype=dtype, act_bits=act_bits, **options)

    def inputs(self, dtype=torch.float32):
        names = {"hidden_states": "img", "encoder_hidden_states": "txt", "pooled_projections": "y", "timestep": "timestep",
                 "guidance": "guidance"}
        found = {ours: self.io[f"input.{name}"].to(dtype) for ours, name in names.items() if f"input.{name}" in self.io}
        return found | {name: self.io[f"input.{name}"][0] for name in ("img_ids", "txt_ids")}

    def run(self, model, dtype=torch.float32, **more):
        """The output [1, tokens, 64] for the golden input."""
        with torch.no_grad():
            return model(**self.inputs(dtype), **more).sample


def write(folder, precision="int4", seed=0, **changes):
    """A random model's file: SHAPE with changes."""
    path = folder / f"svdq-{precision}-{seed}.safetensors"
    shape = flux1.Shape(**vars(SHAPE) | changes)
    random_models.write_model(path, torch.Generator().manual_seed(seed), shape, precision=precision)
    return path


def random_model(folder, dtype=torch.float32, act_bits=16, **changes):
    return SVDQFluxTransformer2DModel.from_pretrained(write(folder, **changes), dtype=dtype, act_bits=act_bits)


def layers(model):
    """{name without PEFT's word for what it wraps: SVDQLinear}"""
    return {name.removesuffix(".base_layer"): module for name, module in model.named_modules()
            if isinstance(module, SVDQLinear)}


def dense_twin(model):
    """diffusers' own model with the numbers that the 4-bit layers stand for, fp32."""
    from diffusers import FluxTransformer2DModel

    twin = FluxTransformer2DModel(**{name: value for name, value in model.config.items() if not name.startswith("_")})
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items() if not name.endswith(".packed")}
    for name, layer in layers(model).items():
        weight, shift = layer.dense(layer.packed)
        bias = layer.bias.detach().float() + shift
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in flux1.DIFFUSERS_ROWS.get(leaf, ())] or [name]
        for part, rows, ends in zip(parts, weight.chunk(len(parts)), bias.chunk(len(parts))):
            state[f"{part}.weight"], state[f"{part}.bias"] = rows, ends
        if len(parts) > 1:
            del state[f"{name}.bias"]
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@contextmanager
def epilogues_in_kernels():
    """Layers that say they fuse, as those of kernels with epilogues; torch does it after them here."""
    def with_epilogue(variant):
        def product(prepared, weight, out, bias, accumulate, epilogue=None):
            y = torch.empty_like(out) if isinstance(epilogue, epilogues.Gated) and not accumulate else out
            variant.product(prepared, weight, y, bias, accumulate)
            if epilogue is not None:
                out.copy_(epilogues.rounded(epilogue.of(y), out.dtype))
        return dataclasses.replace(variant, epilogues=epilogues.ALL, product=product)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "VARIANTS", tuple(
            with_epilogue(variant) if variant.name == "weight_only" else variant
            for variant in registry.VARIANTS if variant.device != ("cpu",)))
        operators.linear_of.cache_clear()
        yield
    operators.linear_of.cache_clear()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(actual, expected):
    """Relative L2."""
    actual, expected = actual.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    return ((actual - expected).norm() / expected.norm()).item()
