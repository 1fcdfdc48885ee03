"""Calibration files: what is collected is what was seen, and a file that does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.quantize.calibration import KEY, MOST_TOKENS, Collector, Statistics, inputs
from svdq_pack.tests.unit.helpers import assert_same_tensors, metadata_of, save

SHAPE = flux1.Shape(hidden=128, depth=1, depth_single=1, in_features=64, context_dim=32, vec_dim=16, guidance=True)


@pytest.fixture(scope="module")
def statistics():
    """Of a model that has seen 100 tokens everywhere."""
    collectors = {}
    for i, (layer, k) in enumerate(inputs(SHAPE).items()):
        collectors[layer] = Collector(k, seed=i)
        collectors[layer].update(torch.randn(100, k, generator=torch.Generator().manual_seed(i)))
    return Statistics.from_collectors(SHAPE, collectors, calls=4, note="ünïcode, \"quoted\"")


@pytest.fixture
def path(tmp_path, statistics):
    statistics.save(tmp_path / "calibration.safetensors")
    return tmp_path / "calibration.safetensors"


# Collecting

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_collector(dtype):
    """Over batches of any size, the plain mean, mean square and maximum of all tokens."""
    x = (torch.randn(5000, 32) * torch.logspace(-2, 2, 32) + torch.linspace(-50, 50, 32)).to(dtype)
    collector = Collector(32)
    for part in x.split([1, 3000, 999, 1000]):
        collector.update(part)
    got, exact = collector.result(), x.double()
    torch.testing.assert_close(got.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.square.double(), exact.square().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(got.max, x.float().abs().amax(0)) and collector.count == 5000
    rows = {tuple(row) for row in x.to(torch.bfloat16).tolist()}
    assert got.tokens.shape == (MOST_TOKENS, 32) and all(tuple(row) in rows for row in got.tokens.tolist())
    assert len({tuple(row) for row in got.tokens.tolist()}) == MOST_TOKENS


def test_tokens_are_a_fair_sample():
    """Every quarter of what was seen has its share, however it came: 60 draws of 64 from 4 x 500 tokens."""
    found = torch.zeros(4)
    for seed in range(60):
        collector, other = Collector(1, seed), Collector(1, 1000 + seed)
        for part in torch.arange(1500.0).split(70):
            collector.update(part[:, None].div(500).floor())
        other.update(torch.full((500, 1), 3.0))
        collector.merge(other)
        found += torch.bincount(collector.tokens[:, 0].long(), minlength=4)
    share = found / found.sum()
    assert found.sum() == 60 * MOST_TOKENS and (share - 0.25).abs().max() < 0.03, share     # 4 standard deviations


def test_merging_is_seeing_both():
    x = torch.randn(300, 8)
    one, two, both = Collector(8, 1), Collector(8, 2), Collector(8, 1)
    one.update(x[:200])
    two.update(x[200:])
    one.merge(two)
    both.update(x[:200])
    both.update(x[200:])
    for part in ("mean", "square", "max"):
        torch.testing.assert_close(getattr(one.result(), part), getattr(both.result(), part))
    assert one.count == 300 and len(one.tokens) == MOST_TOKENS


def test_collecting_leaves_the_users_random_numbers_alone():
    before = torch.get_rng_state()
    collector = Collector(8)
    collector.update(torch.ones(100, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_are_all_inputs_of_quantised_linears():
    found = inputs(SHAPE)
    assert len(found) == 13 and found["single_blocks.0.linear2"] == 5 * 128
    assert found["double_blocks.0.txt_mlp.2"] == 4 * 128 and found["double_blocks.0.img_mod.lin"] == 128


# Files

def test_file(path, statistics):
    tensors, about = load_file(path), json.loads(metadata_of(path)[KEY])
    assert set(tensors) == {f"{layer}.{part}" for layer in inputs(SHAPE) for part in ("mean", "square", "max", "tokens")}
    assert about == {"version": 1, "hidden": 128, "depth": 1, "depth_single": 1, "in_features": 64, "context_dim": 32,
                     "vec_dim": 16, "guidance": True, "calls": 4, "tokens": 1300, "note": "ünïcode, \"quoted\""}
    loaded = Statistics.load(path, SHAPE)
    assert_same_tensors(loaded.tensors(), statistics.tensors())
    assert (loaded.shape, loaded.calls, loaded.tokens, loaded.note) == (SHAPE, 4, 1300, statistics.note)
    assert loaded.fingerprint() == statistics.fingerprint()
    columns = loaded["single_blocks.0.linear2"].columns(128, 640)
    assert columns.mean.shape == (512,) and torch.equal(columns.tokens, loaded["single_blocks.0.linear2"].tokens[:, 128:])


def test_fingerprint_sees_every_number(path, statistics):
    tensors = load_file(path)
    tensors["single_blocks.0.linear1.mean"][5] += 1e-6
    changed = Statistics.load(save(path, tensors, metadata_of(path)))
    assert changed.fingerprint() != statistics.fingerprint()


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        Statistics.load(path, SHAPE)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop("double_blocks.0.img_attn.qkv.square"), ["img_attn.qkv.square is missing", "Capture it again"]),
    (lambda t: t.update({"double_blocks.0.img_attn.qkv.mean": torch.zeros(64)}), ["[64]", "needs [128]"]),
    (lambda t: t.update({"double_blocks.0.img_attn.qkv.mean": torch.zeros(128).half()}), ["F16", "needs [128] F32"]),
    (lambda t: t.update({"single_blocks.0.linear2.tokens": torch.zeros(65, 640).bfloat16()}), ["[65, 640]", "[64, 640]"]),
    (lambda t: t.update({"single_blocks.0.linear2.tokens": torch.zeros(0, 640).bfloat16()}), ["[0, 640]", "[1, 640]"]),
    (lambda t: t.update({"single_blocks.0.linear2.tokens": torch.tensor(1.0)}), ["linear2.tokens is []"]),
    (lambda t: t["single_blocks.0.linear2.max"].fill_(float("nan")), ["linear2.max has NaN", "bfloat16"]),
    (lambda t: t["single_blocks.0.linear2.tokens"][3].fill_(float("inf")), ["linear2.tokens has NaN or Inf"]),
    (lambda t: t["single_blocks.0.linear2.square"][3].fill_(-1), ["below zero"])])
def test_bad_tensors(path, edit, words):
    tensors, metadata = load_file(path), metadata_of(path)
    edit(tensors)
    refused(save(path, tensors, metadata), *words)


@pytest.mark.parametrize("text, words", [
    ("", ["not readable"]), ("[]", ["not readable"]), ("[" * 100_000, ["not readable"]),
    ('{"version": 1}', ["not readable"]),
    ({"version": 2}, ["version 2"]), ({"hidden": "128"}, ["impossible sizes"]), ({"depth": -1}, ["impossible sizes"]),
    ({"depth": 10**9}, ["impossible sizes"]), ({"guidance": 1}, ["impossible sizes"]),
    ({"hidden": 256}, ["another kind of model", "hidden 256, the model has 128"]),
    ({"depth": 201}, ["impossible sizes"]), ({"hidden": True}, ["impossible sizes"]),
    ({"depth": float("nan")}, ["impossible sizes"]),
    ({"calls": "4"}, ["calls 4, needs a whole number"]), ({"calls": -1}, ["calls -1"]), ({"calls": True}, ["calls True"]),
    ({"calls": None}, ["calls None"]), ({"tokens": 1 << 70}, ["tokens 1180591620717411303424"]),
    ({"tokens": 1e9}, ["tokens 1000000000.0"]), ({"tokens": [[[3]]]}, ["tokens [[[3]]]"]),
    ({"tokens": float("inf")}, ["tokens inf"]), ({"note": 3}, ["its note is 3"]), ({"note": {"a": []}}, ["its note is {"]),
    ({"note": "x" * 10_001}, ["its note is xxx", "at most 10,000"]),
    ({"in_features": 384}, ["in_features 384, the model has 64"]), ({"guidance": False}, ["guidance False"])])
def test_bad_description(path, text, words):
    tensors, about = load_file(path), json.loads(metadata_of(path)[KEY])
    refused(save(path, tensors, {KEY: text if isinstance(text, str) else json.dumps(about | text)}), *words)


def test_other_files(path, model):
    refused(model, "not a calibration file")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "cut short")
    path.unlink()
    refused(path, "no such file")


def test_capturing_less_than_the_model():
    collectors = {layer: Collector(k) for layer, k in inputs(SHAPE).items()}
    with pytest.raises(CheckpointError, match="13 of 13 layers were never used, the first is double_blocks.0.img_mod.lin"):
        Statistics.from_collectors(SHAPE, collectors)
    for layer, collector in collectors.items():
        collector.update(torch.full((2, collector.k), float("nan") if layer.endswith("linear1") else 1.0))
    with pytest.raises(CheckpointError, match="single_blocks.0.linear1.mean has NaN or Inf: the model overflowed"):
        Statistics.from_collectors(SHAPE, collectors)
