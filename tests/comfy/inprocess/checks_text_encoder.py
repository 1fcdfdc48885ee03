"""The 4-bit T5 inside ComfyUI's CLIP, beside ComfyUI's own T5 of the dequantised weights."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.tests import random_models
from svdq_pack.tests.comfy.inprocess.support import distance, write_clip_l
from svdq_pack.nodes import text_encoder as node
from svdq_pack.nodes.host.layer import SVDQLinear
from svdq_pack.nodes.host.patcher import SVDQPatcher
from svdq_pack.nodes.host.text_encoder import load_clip
from svdq_pack.nodes.text_encoder import SVDQTextEncoderLoader
from svdq_pack.svdq import text_encoder
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.text_encoder import Shape

import comfy.hooks                  # noqa: E402, comes from the tree that support has chosen
import comfy.model_management       # noqa: E402
import comfy.sd                     # noqa: E402
import comfy_extras.nodes_model_merging as merging      # noqa: E402
from comfy_extras.nodes_hooks import SetClipHooks        # noqa: E402
import folder_paths                 # noqa: E402

SMALL = Shape(d_model=256, d_ff=384, d_kv=32, num_heads=4, num_layers=2)
SAME = 2e-6             # of the same numbers added up in another order
WORDS = "a (red:1.4) fox beside a (((blue))) lake"
Q = "encoder.block.1.layer.0.SelfAttention.q"
WO = "encoder.block.0.layer.1.DenseReluDense.wo"
KEY = f"t5xxl.transformer.{Q}.weight"       # of its weight in a CLIP


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with t5-4bit, t5-dense and clip_l; the dense one holds the same numbers in fp32."""
    folder = tmp_path_factory.mktemp("text_encoders")
    random = torch.Generator().manual_seed(5)
    dense = random_models.write_text_encoder(folder / "t5-4bit.safetensors", random, SMALL)
    save_file(dense, folder / "t5-dense.safetensors")
    write_clip_l(folder / "clip_l.safetensors", random)
    return folder


@pytest.fixture(autouse=True)
def listed(files, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(files)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(text_encoder, "T5XXL", SMALL)
    monkeypatch.setattr(node, "T5_MARKS", {name: (128, 256) for name in node.T5_MARKS})


def load(*names, **settings):
    return SVDQTextEncoderLoader.execute(*names, **settings).args[0]


@pytest.fixture
def clip():
    return load("t5-4bit.safetensors", "clip_l.safetensors")


def stock(files, t5="t5-dense.safetensors", dtype=torch.float32, shape=SMALL):
    """ComfyUI's own CLIP of these files."""
    return comfy.sd.load_clip([str(files / "clip_l.safetensors"), str(files / t5)], None, comfy.sd.CLIPType.FLUX,
                              {"t5xxl_model_config": vars(shape), "dtype": dtype})


@pytest.fixture
def twin(files):
    return stock(files)


def encode(clip, text=WORDS):
    (cond, options), = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return cond, options["pooled_output"]


def lora(*modules, seed=3):
    """A LoRA of rank 8 on these modules of the T5, as OneTrainer names them."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        n, k = SMALL.linears()[module]
        key = f"lora_te2_{module.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": torch.randn(8, k, generator=random) / k ** 0.5,
                    f"{key}.lora_up.weight": torch.randn(n, 8, generator=random) / 4, f"{key}.alpha": torch.tensor(8.0)}
    return tensors


@pytest.mark.parametrize("text", ["", "a fox", WORDS, " ".join(["word"] * 400)], ids=["empty", "short", "weights", "long"])
def test_as_stock(text, clip, twin):
    """Cond, pooled output and shape; the weights of words, too."""
    ours, theirs = encode(clip, text), encode(twin, text)
    assert ours[0].shape == theirs[0].shape and ours[0].dtype == theirs[0].dtype
    assert distance(ours[0], theirs[0]) <= SAME and torch.equal(ours[1], theirs[1])


def test_size_of_t5_xxl(files, tmp_path):
    """One layer of it, with its 4096 and 10240 channels and 64 heads."""
    shape = Shape(num_layers=1, vocab_size=128)
    save_file(random_models.write_text_encoder(tmp_path / "4bit.safetensors", torch.Generator().manual_seed(7), shape),
              tmp_path / "dense.safetensors")
    tokens = [[i % 128 for i in range(256)]]
    clip = load_clip(tmp_path / "4bit.safetensors", files / "clip_l.safetensors", None, shape=shape)
    assert sum(layer.weight.nbytes for layer in clip.patcher.layers().values()) == 192_937_984 * 4.25 / 8
    ours = clip.cond_stage_model.t5xxl(tokens)[0]
    theirs = stock(files, tmp_path / "dense.safetensors", shape=shape).cond_stage_model.t5xxl(tokens)[0]
    assert ours.shape == (1, 256, 4096) and distance(ours, theirs) <= SAME


def test_prompts_at_once(clip, twin):
    """A batch in one forward gives what each gives alone."""
    tokens = [[token for token, *_ in clip.tokenize(text)["t5xxl"][0]] for text in ("a fox", "a lake")]
    both, one = clip.cond_stage_model.t5xxl(tokens)[0], clip.cond_stage_model.t5xxl(tokens[:1])[0]
    assert both.shape == (2, 256, 256) and distance(both[:1], one) <= SAME
    assert distance(both, twin.cond_stage_model.t5xxl(tokens)[0]) <= SAME


def test_memory_is_that_of_the_file(clip, files):
    """ComfyUI counts packed bytes, and none beside them stays after a prompt."""
    packed = sum(layer.weight.nbytes for layer in clip.patcher.layers().values())
    tensors = load_file(files / "t5-4bit.safetensors")
    codes = sum(value.nbytes for name, value in tensors.items() if name.endswith(".qweight"))
    assert len(clip.patcher.layers()) == 14 and codes * 1.06 < packed < codes * 1.08
    layers = [module for module in clip.cond_stage_model.t5xxl.modules() if isinstance(module, SVDQLinear)]
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    rest = sum(value.nbytes for name, value in clip.cond_stage_model.state_dict().items()
               if not name.endswith(".svdq") and not any(f"{module}.weight" in name for module in SMALL.linears()))
    described = sum(layer.svdq.nbytes for layer in layers)
    assert clip.patcher.model_size() == packed + rest + described and described < packed / 100
    encode(clip)
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert comfy.model_management.module_size(clip.cond_stage_model) == clip.patcher.model_size()


@pytest.mark.parametrize("modules", [[Q], [Q, WO]], ids=len)
def test_lora(modules, clip, twin):
    """By the stock loader, and taken out again to the bit."""
    before = encode(clip)[0]
    changed = [comfy.sd.load_lora_for_models(None, one, lora(*modules), 0, 0.7)[1] for one in (clip, twin)]
    ours, theirs = (encode(one)[0] for one in changed)
    assert isinstance(changed[0].patcher, SVDQPatcher)
    assert distance(theirs, before) > 1e-2 and distance(ours, theirs) <= 1e-3 * distance(theirs, before) + SAME
    assert torch.equal(encode(clip)[0], before)


def test_lora_hook(clip, twin):
    """By 'Set CLIP Hooks', as ComfyUI's own T5 has it; the CLIP it was made from stays as it was."""
    before = encode(clip)[0]
    hook = comfy.hooks.create_hook_lora(lora(Q, WO), 0.0, 0.7)
    ours, theirs = (encode(SetClipHooks().apply_hooks(one, False, True, hook)[0])[0] for one in (clip, twin))
    assert distance(theirs, before) > 1e-2 and distance(ours, theirs) <= 1e-3 * distance(theirs, before) + SAME
    assert torch.equal(encode(clip)[0], before)


def test_clip_l_has_loras_as_ever(clip, files):
    random = torch.Generator().manual_seed(4)
    tensors = {"lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_down.weight": torch.randn(8, 768, generator=random),
               "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_up.weight": torch.randn(3072, 8, generator=random)}
    before, twin = encode(clip)[1], stock(files, dtype=torch.float16)
    ours, theirs = (encode(comfy.sd.load_lora_for_models(None, one, tensors, 0, 1.0)[1])[1] for one in (clip, twin))
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)


def test_order_of_the_files(clip):
    other = load("clip_l.safetensors", "t5-4bit.safetensors", device="cpu")
    assert torch.equal(encode(clip)[0], encode(other)[0])


def test_length(clip):
    """512 tokens as in the earlier program, kept by clones."""
    long = load("t5-4bit.safetensors", "clip_l.safetensors", t5_min_length=512)
    assert [encode(one, "a fox")[0].shape[1] for one in (clip, long, long.clone())] == [256, 512, 512]


@pytest.mark.parametrize("device, devices", [("cpu", {"load_device", "offload_device"}), ("default", set())])
@pytest.mark.parametrize("t5", ["t5-4bit.safetensors", "t5-dense.safetensors"])
def test_settings_reach_either_loader(t5, device, devices, files, twin, monkeypatch):
    """Files, folders of textual inversions, devices and length, whichever of the two loaders has the T5."""
    given = []
    monkeypatch.setattr(node, "load_clip", lambda t5, clip, *rest: given.append(([clip, t5], *rest)) or twin)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda paths, embeddings, kind, options:
                        given.append((paths, embeddings, options)) or twin)
    assert encode(load(t5, "clip_l.safetensors", t5_min_length=300, device=device), "a fox")[0].shape[1] == 300
    (paths, embeddings, options, *_), = given
    assert paths == [str(files / "clip_l.safetensors"), str(files / t5)]
    assert embeddings == folder_paths.get_folder_paths("embeddings") and embeddings
    assert options == dict.fromkeys(devices, torch.device("cpu"))


def test_a_plain_patcher_of_the_same_files(clip):
    """ComfyUI asks for one where its dynamic patcher does not do: for hooks, say."""
    make, given = clip.patcher.cached_patcher_init
    other = make(*given, disable_dynamic=True)
    assert isinstance(other, SVDQPatcher) and not other.is_dynamic() and other.model is not clip.patcher.model
    assert other.layers().keys() == clip.patcher.layers().keys()
    assert torch.equal(other.layers()[KEY].weight, clip.patcher.layers()[KEY].weight)


def test_some_linears_in_16_bit(files, tmp_path, monkeypatch):
    """What the file does not quantise runs as ComfyUI's."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(files), str(tmp_path)], {".safetensors"}))
    dense = random_models.write_text_encoder(tmp_path / "some.safetensors", torch.Generator().manual_seed(6), SMALL,
                                             torch.bfloat16, lambda module: not module.endswith("wo"))
    save_file(dense, tmp_path / "dense.safetensors")
    ours = load("some.safetensors", "clip_l.safetensors")
    assert len(ours.patcher.layers()) == 12
    twin = stock(files, tmp_path / "dense.safetensors")
    assert distance(encode(ours)[0], encode(twin)[0]) <= SAME


def test_ordinary_t5(files, twin, monkeypatch):
    """ComfyUI's own loader has it, whatever its dtype."""
    loaded = []
    monkeypatch.setattr(comfy.sd, "load_clip", lambda *given: loaded.append(given) or twin)
    assert load("t5-dense.safetensors", "clip_l.safetensors") is twin
    (paths, embeddings, kind, options), = loaded
    assert paths == [str(files / "clip_l.safetensors"), str(files / "t5-dense.safetensors")]
    assert kind == comfy.sd.CLIPType.FLUX and not options and embeddings == folder_paths.get_folder_paths("embeddings")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_ordinary_t5_of_any_dtype(dtype, files, tmp_path, twin, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(files), str(tmp_path)], {".safetensors"}))
    save_file({name: value.to(dtype) for name, value in load_file(files / "t5-dense.safetensors").items()},
              tmp_path / "t5.safetensors")
    stock_loader = comfy.sd.load_clip
    monkeypatch.setattr(comfy.sd, "load_clip", lambda paths, embeddings, kind, options: stock_loader(
        paths, embeddings, kind, options | {"t5xxl_model_config": vars(SMALL)}))
    assert 0 < distance(encode(load("clip_l.safetensors", "t5.safetensors"))[0], encode(twin)[0]) < 0.1


def test_saved_by_no_node(clip, folders):
    with pytest.raises(RuntimeError, match=r"cannot be saved by 'Save CLIP' \(CLIPSave\). Keep its own file"):
        merging.CLIPSave().save(clip, "clip/mine")


@pytest.mark.parametrize("place", [0, 1])
def test_replaced_file(place, files):
    names = "t5-4bit.safetensors", "clip_l.safetensors"
    before = SVDQTextEncoderLoader.fingerprint_inputs(*names)
    assert SVDQTextEncoderLoader.fingerprint_inputs(*names) == before
    assert SVDQTextEncoderLoader.fingerprint_inputs(*names, t5_min_length=512) != before
    with open(files / names[place], "r+b") as changed:
        changed.seek(0, 2)
        changed.write(b"\0")
    assert SVDQTextEncoderLoader.fingerprint_inputs(*names) != before
    with open(files / names[place], "r+b") as changed:
        changed.truncate(changed.seek(0, 2) - 1)


Q0 = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize("tensors, words", [
    ({"text_model.encoder.layers.0.mlp.fc1.weight": [5120, 1280]},
     r"a CLIP of another size .*\[5120, 1280\] and not \[3072, 768\]"),
    ({f"{Q0}.weight": [1024, 1024]}, r"a T5 of another size or packing.*\[1024, 1024\]"),
    ({f"{Q0}.{name}": [8, 8] for name in ("qweight", "qzeros", "scales")}, "no 4-bit T5-XXL that can be loaded: .*awq-int4"),
    ({f"transformer.{Q0}.qweight": [8, 8]}, "no 4-bit T5-XXL that can be loaded: shared.weight is missing"),
    ({"model.layers.0.self_attn.q_proj.qweight": [8, 8]}, "a 4-bit file of a model this pack does not know"),
    ({"multi_modal_projector.linear_1.weight": [8, 8], "language_model.model.layers.0.x": [8]}, "no text encoder that is"),
    ({"transformer_blocks.0.qkv_proj.qweight": [8, 8]}, "a 4-bit file"),
    ({"decoder.conv_in.weight": [8, 8]}, "this is a VAE; load it with 'Load VAE'")], ids=lambda value: str(value)[:40])
def test_other_files(tensors, words, files):
    path = files / "other.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in tensors.items()}, path)
    try:
        with pytest.raises(CheckpointError, match=words) as said:
            load("other.safetensors", "t5-4bit.safetensors" if "CLIP" in words else "clip_l.safetensors")
        assert re.search(r"[Nn]eeds", str(said.value))
    finally:
        path.unlink()


@pytest.mark.parametrize("names, settings, words", [
    (("clip_l.safetensors",) * 2, {}, "are both a CLIP, needs one CLIP-L and one T5-XXL"),
    (("t5-4bit.safetensors",) * 2, {}, "are both a 4-bit T5, needs one CLIP-L"),
    (("t5-4bit.safetensors", "t5-dense.safetensors"), {}, "are both a T5, needs one CLIP-L"),
    (("t5-4bit.safetensors", "nowhere.safetensors"), {}, "no such file in models/text_encoders"),
    (("t5-4bit.safetensors", None), {}, "None: no such file"),
    (("t5-4bit.safetensors", "clip_l.safetensors"), {"t5_min_length": 0}, "t5_min_length is 0, needs"),
    (("t5-4bit.safetensors", "clip_l.safetensors"), {"t5_min_length": float("nan")}, "t5_min_length is nan, needs"),
    (("t5-4bit.safetensors", "clip_l.safetensors"), {"device": "gpu:7"}, "device is gpu:7, needs to be default or cpu"),
], ids=str)
def test_choices_that_are_none(names, settings, words):
    with pytest.raises(CheckpointError, match=words):
        load(*names, **settings)
