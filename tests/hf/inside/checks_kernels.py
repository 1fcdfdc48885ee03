"""What the registry knows serves here, too: the CUDA kernels' own code, run by the CPU emulator where a GPU would run it, and
the kernels of a CPU."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import SVDQFluxTransformer2DModel
from svdq_pack.svdq.hf import operators
from svdq_pack.svdq.kernels import launch, registry
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels.variants.w4a8_sm90 import FP8Weight
from svdq_pack.tests.hf.inside.checks_saving import lora
from svdq_pack.tests.hf.inside.support import distance, layers, noise
from svdq_pack.tests.kernels.executors import Emulator

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
BF16, FP16 = torch.bfloat16, torch.float16
CPU_DEFAULT = 0.012     # relative L2 of a network whose activations are rounded to 8 bits: 0.0075 to 0.0090 of 21 inputs
IN_BLOCKS = ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out")


@pytest.fixture
def emulated(monkeypatch):
    """emulated(names of variants) -> names of the kernels launched, which grows. None of a CPU's own serve."""
    def emulate(*variants):
        emulator = Emulator()
        monkeypatch.setattr(launch, "launch", emulator.launch)
        monkeypatch.setattr(registry, "VARIANTS", tuple(
            dataclasses.replace(variant, device=None, last_resort=True) if variant.name in variants else variant
            for variant in registry.VARIANTS if variant.device != ("cpu",)))
        operators.linear_of.cache_clear()
        return emulator.launched

    yield emulate
    operators.linear_of.cache_clear()


@pytest.fixture
def int4(golden_dir):
    from svdq_pack.tests.hf.inside.support import Golden

    return Golden(golden_dir, "int4")


def test_int4_kernels(int4, emulated):
    launched = emulated("w4a4_sm80", "awq_gemv")
    model = int4.load(BF16, act_bits=None)
    assert distance(int4.run(model, BF16), int4.io["act_quant.out"]) <= 0.15
    kinds = [name.split("_")[0] for name in launched if not name.startswith("mlp_low")]
    tiles, doubles, singles = (sum(len(layer.tiles) for layer in layers(model).values()), len(model.transformer_blocks),
                               len(model.single_transformer_blocks))
    assert kinds.count("gemm") + kinds.count("mlp") == tiles - kinds.count("awq") and kinds.count("awq") > 0
    # Inputs are modulated once per norm, the middle of an MLP is quantised where it is made, attention by itself
    assert kinds.count("adaln") == 4 * doubles + singles
    assert kinds.count("mlp") == kinds.count("quant") == 2 * doubles + singles


@pytest.mark.parametrize("act_bits, result, tolerance", [(None, "weight_only", 0.04), (4, "act_quant", 0.15)])
def test_hopper(int4, emulated, act_bits, result, tolerance):
    """Repacked where a device is given, norms and rotations in the kernels, a LoRA in the branch, rows, saving."""
    plain = int4.load(BF16)
    base = {name: layer.dense(layer.packed)[0] for name, layer in layers(plain).items()}
    launched = emulated("w4a8_sm90", "w4a4_sm90", "awq_gemv")
    model = int4.load(BF16, act_bits=act_bits, device="cpu")
    found = int4.run(model, BF16)
    assert distance(found, int4.io[f"{result}.out"]) <= tolerance
    packed = [tile for layer in layers(model).values() for tile in layer.tiles if tile.weight.precision == "int4"]
    assert packed and all(isinstance(tile.weight, FP8Weight) for tile in packed)
    assert sum(name.startswith("gemm_fp8") for name in launched) == len(packed)
    attentions = [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    assert all(attention.to_qkv.fuses(torch.zeros(1, 1, 256, dtype=BF16), [(0, 0)]) for attention in attentions)
    for name, layer in layers(model).items():
        assert torch.equal(layer.dense(layer.packed)[0], base[name])
    attention = attentions[0]                       # rows of packed bytes
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
    parts = torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], -1)
    assert distance(parts, attention.to_qkv(x)) <= 1e-2
    for one in (model, plain):
        one.load_lora_adapter(lora(one, *IN_BLOCKS), adapter_name="one")
    changed = int4.run(model, BF16)
    assert distance(changed, int4.run(plain, BF16)) <= 1.5 * tolerance and distance(changed, found) > tolerance


def test_repacked_when_it_comes_to_the_device(int4, emulated):
    """By `.to`, as from the CPU to a GPU: here told apart by the dtype, which kernels have a say in."""
    plain = int4.load(BF16)
    emulated("w4a8_sm90", "w4a4_sm90", "awq_gemv")
    model = int4.load(BF16, act_bits=None)
    model.load_lora_adapter(lora(model, *IN_BLOCKS), adapter_name="one")
    before = int4.run(model, BF16)
    for layer in layers(model).values():
        layer.repack()
        layer.repack()                              # nothing is left to do
    assert all(isinstance(tile.weight, FP8Weight) for layer in layers(model).values() for tile in layer.tiles
               if tile.weight.precision == "int4")
    assert distance(int4.run(model, BF16), before) <= 0.06
    model.delete_adapters("one")
    assert distance(int4.run(model, BF16), int4.run(plain, BF16)) <= 0.06


@pytest.fixture
def ampere(monkeypatch, emulated):
    """A GPU of compute capability 8.6 computes; the emulator runs its kernels."""
    launched = emulated()
    monkeypatch.setattr(Target, "of", lambda device: Target("cuda", (8, 6)))
    return launched


@pytest.mark.parametrize("by", ["loading", "repacking"])
def test_bf16_file_at_fp16(int4, ampere, by):
    """Cast on loading, or when a model goes to a GPU in another dtype than it was loaded in."""
    plain = int4.load()
    if by == "loading":
        model = int4.load(FP16, act_bits=None)
    else:
        model = int4.load(BF16, act_bits=None).to(FP16)
        for layer in layers(model).values():
            layer.repack()
    for name, layer in layers(model).items():
        assert all(tile.weight.dtype == FP16 for tile in layer.tiles)
        assert distance(layer.dense(layer.packed)[0], layers(plain)[name].dense(layers(plain)[name].packed)[0]) <= 1e-6
    assert distance(int4.run(model, FP16), int4.io["act_quant.out"]) <= 0.15
    tiles = sum(len(layer.tiles) for layer in layers(model).values() if layer.tiles[0].weight.precision == "int4")
    assert sum(name.startswith(("gemm_w4a4_fp16", "mlp_w4a4_fp16")) for name in ampere) == tiles


def test_a_cast_keeps_act_bits(int4, ampere):
    """What was asked for at loading holds after a model went to a GPU in another dtype."""
    model = int4.load(BF16, act_bits=8).to(FP16)
    for layer in layers(model).values():
        layer.repack()
    int4.run(model, FP16)
    assert {layer.act_bits for layer in layers(model).values()} == {8}
    assert any(name.startswith("gemm_int8_fp16") for name in ampere) and not any("w4a4" in name for name in ampere)


def test_a_number_that_fp16_has_not(int4, ampere, tmp_path, caplog):
    """Its layer stays as the file has it, wherever the model goes, and that is said once."""
    tensors = load_file(int4.path)
    tensors["transformer_blocks.0.mlp_fc1.smooth"][3] = 1e5
    save_file(tensors, tmp_path / "large.safetensors")
    model = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "large.safetensors", dtype=FP16)
    said, = (record.message for record in caplog.records if "has not" in record.message)
    assert "transformer_blocks.0.ff.net.0.proj (smooth has 1e+05, which would be inf)" in said
    stays, = (layer for layer in layers(model).values() if layer.tiles[0].weight.dtype == BF16)
    packed = stays.packed
    for _ in range(3):
        stays.repack()
    assert stays.packed is packed
    assert sum("has not all its numbers: smooth has 1e+05" in record.message for record in caplog.records) == 1


def test_what_is_saved_of_a_bf16_file_at_fp16(int4, tmp_path):
    """fp16, as all else of such a model. Loaded at bf16 again it is the first file, but for numbers that are nothing."""
    int4.load(FP16).save_pretrained(tmp_path / "half")
    made, first = load_file(tmp_path / "half" / "svdq.safetensors"), load_file(int4.path)
    assert not any(tensor.dtype == BF16 for tensor in made.values())
    SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "half", dtype=BF16).save_pretrained(tmp_path / "back")
    int4.load(BF16).save_pretrained(tmp_path / "plain")
    back, plain = (load_file(tmp_path / folder / "svdq.safetensors") for folder in ("back", "plain"))
    assert back.keys() == plain.keys() and made.keys() <= first.keys()
    for name, tensor in plain.items():
        assert back[name].dtype == tensor.dtype
        assert (back[name].float() - tensor.float()).abs().max() <= 2.0**-24, name


def test_state_dict_of_another_dtype(int4):
    """Bytes come with what they mean."""
    model, other = int4.load(BF16), int4.load(FP16)
    wanted = int4.run(model.float())
    other.load_state_dict(model.state_dict())
    assert distance(int4.run(other.float()), wanted) <= 1e-5
    assert {tile.weight.dtype for layer in layers(other).values() for tile in layer.tiles} == {BF16}


def test_state_dict_that_says_not_of_which_dtype(int4, caplog):
    """A plain dict has lost that: once, the log says what its bytes are taken for."""
    model = int4.load(BF16)
    before = int4.run(model, BF16)
    model.load_state_dict(dict(model.state_dict()))
    assert torch.equal(int4.run(model, BF16), before)
    assert sum("nothing says which 16-bit dtype" in record.message for record in caplog.records) == 1


def test_saving_brings_the_published_order_back(int4, emulated, tmp_path):
    emulated("w4a8_sm90", "w4a4_sm90", "awq_gemv")
    int4.load(BF16, act_bits=None, device="cpu").save_pretrained(tmp_path / "packed")
    int4.load(BF16).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "packed" / "svdq.safetensors").read_bytes() == (tmp_path / "plain" / "svdq.safetensors").read_bytes()


def test_the_path_is_said_once(int4, caplog):
    from svdq_pack.svdq import serving
    serving._said.clear()
    operators.linear_of.cache_clear()
    model = int4.load(torch.float32, act_bits=None)
    with caplog.at_level("INFO"):
        int4.run(model)
        int4.run(model)
    said = [record for record in caplog.records if "layers run on" in record.message]
    assert len(said) == 1 and said[0].levelname == "INFO" and "'w4a8_cpu': fused kernels" in said[0].message


def test_the_path_without_kernels_is_a_warning(int4, emulated, caplog):
    from svdq_pack.svdq import serving
    serving._said.clear()
    emulated()
    with caplog.at_level("INFO"):
        int4.run(int4.load(torch.float32))
    said, = (record for record in caplog.records if "layers run on" in record.message)
    assert said.levelname == "WARNING" and "'weight_only'" in said.message


# ---- those of a CPU, by themselves

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, CPU_DEFAULT), (BF16, 1.5 * CPU_DEFAULT)])
def test_default_on_a_cpu(int4, dtype, tolerance):
    """Without a wish, INT4 layers round activations to 8 bits: near golden numbers, and each time the same to the bit."""
    model, exact = int4.load(dtype, act_bits=None), int4.load(dtype)
    serve = {plan.variant.name for layer in layers(model).values() for plan in layer.plans(torch.device("cpu"), dtype)}
    assert serve == {"w4a8_cpu", "exact_cpu"}
    found = int4.run(model, dtype)
    assert distance(found, int4.io["weight_only.out"]) <= tolerance and distance(found, int4.run(exact, dtype)) > 1e-3
    for again in (model, int4.load(dtype, act_bits=None)):
        assert torch.equal(int4.run(again, dtype), found)


def test_default_on_a_cpu_with_a_lora(int4):
    """In the branch, which nobody rounds: it changes what it changes in the exact model, and off again it leaves no trace."""
    model, exact = int4.load(act_bits=None), int4.load()
    before, plain = int4.run(model), int4.run(exact)
    for one in (model, exact):
        one.load_lora_adapter(lora(one, *IN_BLOCKS), adapter_name="one")
    changed, wanted = int4.run(model), int4.run(exact)
    assert distance(changed, wanted) <= CPU_DEFAULT < distance(plain, wanted)
    model.disable_lora()
    assert torch.equal(int4.run(model), before)
    model.enable_lora()
    assert torch.equal(int4.run(model), changed)
    model.delete_adapters("one")
    assert torch.equal(int4.run(model), before)


def test_default_on_a_cpu_has_exact_gradients(int4):
    """Rounded on the way forward alone."""
    for name, layer in layers(int4.load(act_bits=None)).items():
        x, dy = noise(2, 5, layer.in_features).requires_grad_(), noise(2, 5, layer.out_features, seed=1)
        with torch.enable_grad():
            y = layer(x)
            y.backward(dy)
        assert torch.equal(y.detach(), layer(x.detach())), name
        assert distance(x.grad, dy @ layer.dense(layer.packed)[0]) <= 2e-5, name

