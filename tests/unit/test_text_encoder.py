"""The 4-bit T5: what is read of its file, and what is said of others."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import foreign
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.format import view_layer
from svdq_pack.svdq.kernels import reference
from svdq_pack.svdq.kernels.weights import AWQ128Weight, dequantize
from svdq_pack.svdq.text_encoder import T5XXL, Shape, TextEncoder
from svdq_pack.tests import random_models

SHAPE = Shape(d_model=256, d_ff=384, d_kv=32, num_heads=4, num_layers=2, vocab_size=64)
Q = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def written(request, tmp_path):
    """(path, {name: dense tensor})"""
    path = tmp_path / "t5.safetensors"
    return path, random_models.write_text_encoder(path, torch.Generator().manual_seed(1), SHAPE, request.param,
                                                  lambda module: not module.endswith("1.layer.1.DenseReluDense.wo"))


@pytest.fixture
def spoilt(written):
    """spoilt({name: tensor or None}) -> path of the file with these instead."""
    def spoil(changes):
        path, _ = written
        tensors = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
        save_file(tensors, path)
        return path
    return spoil


def test_golden(golden):
    """Numbers of the original's own packer, to the bit."""
    tensors = golden("awq_text_encoder_g128")
    scales, zeros = (tensors[f"packed.{name}"][:2] for name in ("scales", "scaled_zeros"))
    weight = AWQ128Weight(tensors["packed.qweight"], scales, zeros)
    dense, shift = dequantize(weight)
    codes, *rest = (tensors[f"logical.{name}"] for name in ("codes", "scales", "scaled_zeros"))
    assert torch.equal(dense, reference.dequantize_awq(codes, *rest)) and not shift.any()
    assert weight.shape == tuple(codes.shape) and weight.dtype == torch.float16
    y = tensors["io.x"].float() @ dense.t()
    assert (y - tensors["io.y"]).norm() <= 1e-6 * y.norm()


def test_every_number_is_read(written):
    path, dense = written
    found, packed = {}, 0
    for module, tiles, plain in TextEncoder(path, SHAPE).layers():
        if tiles is not None:
            tile, = view_layer(tiles.stored, {"tiles": [{"row": 0, "col": 0, "kind": "awq_g128", **vars(tiles[0].weight),
                                                         **tiles.sections[0]}]})
            plain, _ = dequantize(tile.weight)
            assert tiles.stored.nbytes < plain.numel() * 0.57
            packed += 1
        found[f"{module}.weight"] = plain.float()
    assert found.keys() == dense.keys() and all(torch.equal(found[name], dense[name]) for name in dense)
    assert packed == 13


def test_either_name_of_the_embedding(written, spoilt):
    path, dense = written
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        twice = load_file(path)
        spoilt({name: None})
        found = {module: plain for module, _, plain in TextEncoder(path, SHAPE).layers()}
        assert torch.equal(found["shared"].float(), dense["shared.weight"])
        save_file(twice, path)


def test_sizes_of_t5_xxl():
    """4.63 billion weights in 168 linears of 4.25 bits, the rest in 16: 2.72 GB, where fp16 takes 9.52 and fp8 4.76."""
    linears = T5XXL.linears()
    assert len(linears) == 168 and sum(n * k for n, k in linears.values()) == 4_630_511_616
    plain = sum(torch.Size(size).numel() for size in T5XXL.plain().values())
    assert 4_630_511_616 * 4.25 / 8 + plain * 2 == 2_723_557_376 and 4_630_511_616 + plain == 4_762_310_656
    assert linears["encoder.block.23.layer.1.DenseReluDense.wo"] == (4096, 10240)


@pytest.mark.parametrize("changes, words", [
    ({f"{Q}.qweight": torch.zeros(256, 16, dtype=torch.int32)}, r"is I32 \[256, 16\], needs to be I16 \[32, 256\]"),
    ({f"{Q}.scales": torch.zeros(4, 128)}, r"q.scales is F32 \[4, 128\], needs to be F16 or BF16 \[2, 128\]"),
    ({f"{Q}.scales": torch.zeros(1, 128, dtype=torch.float16)}, r"q.scales is F16 \[1, 128\]"),
    ({f"{Q}.scaled_zeros": None}, "q.scaled_zeros is missing"),
    ({f"{Q}.qweight": None}, r"q.weight is missing, needs to be F16 or BF16 or F32 \[128, 256\]"),
    ({"shared.weight": None, "encoder.embed_tokens.weight": None}, "shared.weight is missing"),
    ({"encoder.block.2.layer.0.SelfAttention.q.qweight": torch.zeros(1), "encoder.block.2.x": torch.zeros(1)},
     "T5-XXL does not have encoder.block.2.layer.0.SelfAttention.q.qweight, and 1 more"),
], ids=str)
def test_other_files(changes, words, spoilt):
    with pytest.raises(CheckpointError, match=f"no 4-bit T5-XXL that can be loaded: .*{words}.*Needs awq-int4.*or an ordinary"):
        TextEncoder(spoilt(changes), SHAPE)


def test_another_size(written):
    with pytest.raises(CheckpointError, match=r"shared.weight is .*\[64, 256\], needs .*\[32128, 4096\]; .*and \d+ more"):
        TextEncoder(written[0])


@pytest.mark.parametrize("name", [f"{Q}.scales", f"{Q}.scaled_zeros", "encoder.final_layer_norm.weight"])
def test_nan(name, spoilt, written):
    damaged = load_file(written[0])[name].clone()
    damaged[0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight')}.*: contains NaN or Inf. The file is damaged"):
        list(TextEncoder(spoilt({name: damaged}), SHAPE).layers())


def test_padding_is_not_read(written, spoilt):
    """Of scales, rows past the last group: whatever they hold."""
    padded = load_file(written[0])[f"{Q}.scales"].clone()
    assert len(padded) == 8
    padded[2:] = float("nan")
    layers = {module: tiles for module, tiles, _ in TextEncoder(spoilt({f"{Q}.scales": padded}), SHAPE).layers()}
    assert torch.equal(dequantize(layers[Q][0].weight)[0], written[1][f"{Q}.weight"])


def test_named_where_a_model_is_expected():
    assert "'SVDQ Text Encoder Loader'" in foreign.identify([f"{Q}.qweight"], {"I16"})


