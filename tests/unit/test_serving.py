"""svdq/serving.py: what people are told of who serves their model, and of a dtype that their CPU is slow in."""

import logging

import pytest
import torch

from svdq_pack.svdq import serving
from svdq_pack.svdq.kernels import build, registry, variant
from svdq_pack.svdq.kernels.variant import FLOATS, HALVES, Target
from svdq_pack.tests.unit.layers import BF16, F16, F32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    """Nothing was said or trusted before a test, nor is it after one."""
    serving._said.clear()
    registry.trusted.cache_clear()
    variant.cpu_multiplies.cache_clear()
    yield
    serving._said.clear()
    registry.trusted.cache_clear()
    variant.cpu_multiplies.cache_clear()


@pytest.fixture
def trusting(monkeypatch):
    monkeypatch.setattr(registry, "trusted", lambda variant, target: True)


@pytest.fixture
def onednn(monkeypatch):
    """onednn(*dtypes): this CPU, an x86-64, has instructions for these. onednn.ops: what torch.ops.mkldnn has."""
    class Ops:
        pass

    def multiplies(*dtypes):
        for dtype, name in HALVES.items():
            setattr(Ops, f"_is_mkldnn_{name}_supported", staticmethod(lambda dtype=dtype: dtype in dtypes))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: BF16 in dtypes)
    multiplies.ops = Ops
    monkeypatch.setattr(variant.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", Ops, raising=False)
    return multiplies


# precision, act_bits, how
SERVED = [("int4", None, "fused kernels, 4-bit weights, 8-bit activations"), ("int4", 8, "fused kernels, 4-bit weights, 8-bit "
          "activations"), ("int4", 16, "4-bit weights, exact activations"), ("nvfp4", None, "4-bit weights, exact activations")]


@pytest.mark.parametrize("precision, act_bits, how", SERVED)
def test_words_on_a_cpu(trusting, onednn, caplog, precision, act_bits, how):
    """How they run, once in the log; no warning."""
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert serving.announce(precision, CPU, F32, act_bits) == f"{how} on cpu"
    said, = caplog.records
    assert said.levelno == logging.INFO
    assert said.getMessage().startswith(f"SVDQ: {precision} layers run on cpu in torch.float32 as '")


@pytest.mark.parametrize("precision, name", [("int4", "w4a8_cpu"), ("nvfp4", "exact_cpu")])
def test_words_on_a_cpu_without_a_compiler(monkeypatch, onednn, caplog, precision, name):
    """Torch serves, and pictures differ from those with kernels; a warning, once."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    for _ in range(2):
        words = serving.announce(precision, CPU, F32, None)
        assert words.startswith("weight-only on cpu: slower than with kernels, and pictures differ a little from theirs, "
                                f"because {name} did not build, or failed its self-test; `") and "doctor` says why" in words
    said, = caplog.records
    assert said.levelno == logging.WARNING and "'weight_only'" in said.getMessage() and name in said.getMessage()


@pytest.mark.parametrize("target, why", [(Target("cuda", (7, 5)), "w4a4_sm75 takes float16, not bfloat16"),
                                         (Target("cuda", (7, 0)), "no kernel of this pack multiplies INT4 weights on sm_70"),
                                         (Target("mps"), "no kernel of this pack runs there")])
def test_words_without_kernels_elsewhere(monkeypatch, target, why):
    monkeypatch.setattr(serving.Target, "of", lambda device: target)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080")
    name = "RTX 2080" if target.type == "cuda" else "mps"
    assert serving.announce("int4", torch.device(target.type), BF16, None) == (
        f"weight-only on {name}: slower than a 16-bit model, because {why}")


def test_words_where_nobody_is_to_round(monkeypatch):
    """Not a list of all that rounds."""
    monkeypatch.setattr(serving.Target, "of", lambda device: Target("cuda", (8, 9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert serving.announce("int4", torch.device("cuda"), BF16, 16) == (
        "weight-only on RTX 4090: slower than a 16-bit model, because act_bits is 16 and every faster kernel here rounds "
        "activations")
    assert "because no kernel of this pack " in serving.announce("nvfp4", torch.device("cuda"), BF16, 16)


@pytest.mark.parametrize("capability, act_bits, words", [
    ((8, 6), None, "fused W4A4 kernels on RTX 3090"), ((8, 6), 8, "{} on RTX 3090"), ((12, 0), None, "{} on RTX 3090"),
    ((13, 0), None, "{} on RTX 3090"),
    ((12, 0), 4, "weight-only on RTX 3090: slower than a 16-bit model, because w4a8_int8 rounds activations to 8 bits, not 4")])
def test_words_on_gpus(monkeypatch, capability, act_bits, words):
    monkeypatch.setattr(serving.Target, "of", lambda device: Target("cuda", capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    said = serving.announce("int4", torch.device("cuda"), BF16, act_bits)
    assert said == words.format("fused kernels, 4-bit weights, 8-bit integer activations")


@pytest.mark.parametrize("precision, capability, act_bits, why", [
    ("nvfp4", (8, 6), None, "no kernel of this pack multiplies NVFP4 weights on sm_86"),
    ("int4", (8, 6), 16, "act_bits is 16 and every faster kernel here rounds activations"),
    ("int4", (7, 5), None, "w4a4_sm75 takes float16, not bfloat16")])
def test_words_where_a_kernel_only_unpacks(monkeypatch, caplog, precision, capability, act_bits, why):
    """Its user learns the same as without: not faster than 16 bit, and why nothing better serves. The log names it."""
    monkeypatch.setattr(serving.Target, "of", lambda device: Target("cuda", capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3080")
    for _ in range(2):
        assert serving.announce(precision, torch.device("cuda"), BF16, act_bits) == (
            f"weight-only on RTX 3080: slower than a 16-bit model, because {why}")
    said, = caplog.records
    assert said.levelno == logging.WARNING and " as 'dequant': weights dequantised by a kernel" in said.getMessage()


@pytest.mark.parametrize("precision, act_bits, words", [
    ("int4", 4, "; not w4a8_cpu, which rounds activations to 8 bits, not 4"), ("int4", 16, ""), ("nvfp4", None, ""),
    ("nvfp4", 8, "; nothing here rounds activations to 8 bits"), ("nvfp4", 16, "")])
def test_activations_that_stay_exact(trusting, onednn, precision, act_bits, words):
    """Said where they were to be rounded, and nowhere else."""
    assert serving.announce(precision, CPU, F32, act_bits) == f"4-bit weights, exact activations on cpu{words}"


def test_a_kernel_that_failed_is_named(monkeypatch, onednn):
    """Though another one serves."""
    monkeypatch.setattr(registry, "trusted", lambda variant, target: variant.name != "w4a8_cpu")
    said = serving.announce("int4", CPU, F32, None)
    assert said.startswith("4-bit weights, exact activations on cpu; not w4a8_cpu, which did not build, or failed its self")


@pytest.mark.parametrize("multiplied", [(), (BF16,), (BF16, F16)], ids=str)
def test_a_dtype_that_a_cpu_is_slow_in(trusting, onednn, multiplied):
    """In fp32 none is, nor on another device; the sentence ends what is said of the layers."""
    onednn(*multiplied)
    for dtype in FLOATS:
        said = serving.slow_dtype(CPU, dtype)
        slow = dtype in (BF16, F16) and dtype not in multiplied
        name = "bfloat16" if dtype == BF16 else "float16"
        assert said == (f". In {name} this CPU computes everything else several times slower than in float32" if slow else "")
        assert serving.announce("int4", CPU, dtype, None) == f"{SERVED[0][2]} on cpu{said}"
        for device in ("cuda", "mps", "meta"):
            assert serving.slow_dtype(torch.device(device), dtype) == ""


def test_a_cpu_that_nobody_measured(onednn, monkeypatch):
    onednn()
    monkeypatch.setattr(variant.platform, "machine", lambda: "arm64")
    assert serving.slow_dtype(CPU, BF16) == ""


def test_a_torch_without_onednn(onednn, monkeypatch):
    """It has nobody to ask, and computes 16-bit products number by number."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not hasattr(onednn.ops, "_is_mkldnn_bf16_supported") and "slower than in float32" in serving.slow_dtype(CPU, BF16)


def test_this_torch():
    """It knows the questions; a name that torch changes would call every CPU slow."""
    for dtype in HALVES:
        assert variant.cpu_multiplies(dtype) in (True, False)
        assert hasattr(torch.ops.mkldnn, f"_is_mkldnn_{HALVES[dtype]}_supported") or not torch.backends.mkldnn.is_available()
