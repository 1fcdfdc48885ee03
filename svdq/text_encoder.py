"""The published 4-bit T5-XXL, `awq-int4-flux.1-t5xxl`: what its file holds, checked, and its linears as packed tiles.

Names are those of transformers' T5EncoderModel. A quantised linear has, in place of `weight`,

    qweight        I16 [N/4, K]               codes, see kernels.layout.pack_awq
    scales         F16 | BF16 [>= K/128, N]   rows past K/128 are padding, which is not read
    scaled_zeros   like scales                W = code * scale + zero

Which linears are quantised is for the file to say. ComfyUI's T5 has the same names, `shared` alone for both names of the
embedding.

Source: checkpoint-format 9. Test: tests/unit/test_text_encoder.py
"""

from dataclasses import dataclass

import torch

from .container import DTYPES, TensorFile
from .errors import CheckpointError, first, shown
from .format import PackedTiles, Tile, finite
from .kernels.weights import AWQ128Weight

GROUP = 128
HALF = ("F16", "BF16")
FLOATS = (*HALF, "F32")
NEEDED = "awq-int4-flux.1-t5xxl.safetensors of nunchaku-t5 on Hugging Face"
ORDINARY = "an ordinary T5-XXL such as t5xxl_fp8_e4m3fn.safetensors"
EMBEDDING, EMBEDDING_TWIN = "shared.weight", "encoder.embed_tokens.weight"
BIAS_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
BUCKETS = 32            # of relative positions
SOME = 3                # problems that a message lists


@dataclass(frozen=True)
class Shape:
    """Sizes of a T5 encoder, by the names that its config has for them. The defaults are T5-XXL."""
    d_model: int = 4096
    d_ff: int = 10240
    d_kv: int = 64
    num_heads: int = 64
    num_layers: int = 24
    vocab_size: int = 32128

    def linears(self):
        """{module: (N, K)}"""
        inner = self.d_kv * self.num_heads
        found = {}
        for i in range(self.num_layers):
            attention, dense = (f"encoder.block.{i}.layer.{part}." for part in ("0.SelfAttention", "1.DenseReluDense"))
            found |= {attention + name: (inner, self.d_model) for name in "qkv"} | {attention + "o": (self.d_model, inner)}
            found |= {f"{dense}wi_{j}": (self.d_ff, self.d_model) for j in (0, 1)} | {dense + "wo": (self.d_model, self.d_ff)}
        return found

    def plain(self):
        """{tensor: shape} of what is never quantised."""
        norms = [f"encoder.block.{i}.layer.{j}.layer_norm" for i in range(self.num_layers) for j in (0, 1)]
        return ({EMBEDDING: (self.vocab_size, self.d_model), BIAS_TABLE: (BUCKETS, self.num_heads)}
                | {f"{norm}.weight": (self.d_model,) for norm in [*norms, "encoder.final_layer_norm"]})


T5XXL = Shape()


def is_4bit(names):
    """Whether tensors of these names are of a quantised T5 encoder, ours or one in another order or with names of its own."""
    return any("encoder.block." in name and name.endswith(".qweight") for name in names)


class TextEncoder:
    """A 4-bit T5 encoder on disk. Raises CheckpointError, which says what came and what is needed, for any other file."""

    def __init__(self, path, shape=T5XXL):
        self.file = TensorFile(path)
        self.path, self.tensors, self.shape = self.file.path, self.file.tensors, shape
        self._embedding = EMBEDDING if EMBEDDING in self.tensors else EMBEDDING_TWIN
        problems = self._problems()
        if problems:
            raise CheckpointError(f"{self.path}: this is no 4-bit T5-XXL that can be loaded: "
                                  f"{'; '.join(first(problems, SOME))}. Needs {NEEDED}, or {ORDINARY}")

    def _problems(self):
        problems, known = [], {EMBEDDING, EMBEDDING_TWIN}
        for name, shape in self._expected():
            known.add(name)
            info = self.tensors.get(self._embedding if name == EMBEDDING else name)
            dtypes = ("I16",) if name.endswith(".qweight") else HALF if name.endswith((".scales", ".scaled_zeros")) else FLOATS
            padded = info is not None and dtypes == HALF and len(info.shape) == 2 and info.shape[0] > shape[0]
            fits = info is not None and info.dtype in dtypes and (
                info.shape == shape or padded and info.shape[1] == shape[1])
            if not fits:
                is_what = "is missing" if info is None else f"is {shown(info.dtype)} {shown(list(info.shape))}"
                problems.append(f"{name} {is_what}, needs to be {' or '.join(dtypes)} {list(shape)}")
        odd = sorted(name for name in set(self.tensors) - known if name.startswith("encoder."))
        if odd and not problems:
            problems.append(f"T5-XXL does not have {', '.join(first([shown(name) for name in odd], 1))}")
        return problems

    def _expected(self):
        """(name, shape) of every tensor that the file must have, with the names of those that it quantises."""
        yield from self.shape.plain().items()
        for module, (n, k) in self.shape.linears().items():
            if f"{module}.qweight" in self.tensors:
                yield f"{module}.qweight", (n // 4, k)
                yield f"{module}.scales", (k // GROUP, n)
                yield f"{module}.scaled_zeros", (k // GROUP, n)
            else:
                yield f"{module}.weight", (n, k)

    def layers(self):
        """(module, PackedTiles or None, plain tensor or None) of every tensor of ComfyUI's T5, in new memory."""
        with self.file.reading() as get:
            for name in self.shape.plain():
                stored = get(self._embedding if name == EMBEDDING else name)
                yield name.removesuffix(".weight"), None, self._checked(name, stored)
            for module, (n, k) in self.shape.linears().items():
                if f"{module}.qweight" in self.tensors:
                    yield module, self._packed(module, n, k, get), None
                else:
                    yield module, None, self._checked(module, get(f"{module}.weight"))

    def _packed(self, module, n, k, get):
        groups = k // GROUP
        half = DTYPES[self.tensors[f"{module}.scales"].dtype]
        blank = [torch.empty(shape, dtype=dtype, device="meta")
                 for shape, dtype in (((n // 4, k), torch.int16), ((groups, n), half), ((groups, n), half))]
        tiles = PackedTiles([Tile(0, 0, AWQ128Weight(*blank))])
        weight = tiles[0].weight
        get(f"{module}.qweight", weight.qweight)
        for name, out in (("scales", weight.wscales), ("scaled_zeros", weight.wzeros)):
            get(f"{module}.{name}", out, (0, groups))
            self._checked(f"{module}.{name}", out)
        return tiles

    def _checked(self, name, tensor):
        if finite(tensor):
            return tensor
        raise CheckpointError(f"{self.path}: {name}: contains NaN or Inf. The file is damaged; get it again")
