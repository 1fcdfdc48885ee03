"""The loaders' files: names in the list, what tells a replaced file, what the Hub loader says about a file that was there."""

import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.tests.comfy.inprocess import support
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels import build
from svdq_pack.nodes import demo, loaders, models, prompt_server
from svdq_pack.nodes.host import load
from svdq_pack.nodes.info import SVDQInfo
from svdq_pack.nodes.loaders import SVDQHubLoader, SVDQModelLoader
from svdq_pack.svdq.checkpoint import BLOCKS_FILE, JSON_FILES, REST_FILE
from svdq_pack.svdq import serving
from svdq_pack.svdq.errors import CheckpointError

import folder_paths             # noqa: E402


DEMO = ["svdq-fp4_r16-demo.safetensors", "svdq-int4_r16-demo.safetensors"]
ON_CPU = "INT4, rank 16 · fused kernels, 4-bit weights, 8-bit activations on cpu"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/diffusion_models, after the old models/unet as in ComfyUI."""
    places = [tmp_path / "unet", tmp_path / "diffusion_models"]
    for place in places:
        place.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (list(map(str, places)), {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return places[1]


@pytest.fixture
def legacy(folder, int4):
    """A legacy folder in the list."""
    path, tensors = folder / "old" / "svdq-legacy", load_file(int4.path)
    path.mkdir(parents=True)
    inside = [name for name in tensors if "transformer_blocks." in name]
    save_file({name: tensors[name] for name in inside}, path / BLOCKS_FILE)
    save_file({name: tensors[name] for name in tensors.keys() - inside}, path / REST_FILE)
    return path


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("name", ["svdq-int4.safetensors", "deep/er/svdq-int4.safetensors"])
@pytest.mark.parametrize("notice", [None, "it is not certain"])
@pytest.mark.parametrize("given", [("owner/flux", "", "", "auto", "auto", " "),
                                   ("owner/not", "", "", "auto", "auto", "owner/flux")])
def test_hub_loader(name, notice, given, folder, int4, monkeypatch, caplog):
    """model_name is a name of the list, and what is not known of the file stands on the node and in the log."""
    said = []

    def download(repo_id, filename, revision, place, *, wants_fp4, progress, say):
        assert (repo_id, filename, revision, place) == ("owner/flux", "", "main", str(folder))
        say("asking")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(int4.path, folder / name)
        return str(folder / name), notice

    monkeypatch.setattr(loaders.hub, "download", download)
    monkeypatch.setattr(prompt_server, "running", lambda: SimpleNamespace(send_progress_text=lambda *sent: said.append(sent)))
    monkeypatch.setattr(SVDQHubLoader, "hidden", SimpleNamespace(unique_id="7"))
    model, listed = SVDQHubLoader.execute(*given).args
    assert listed == name and listed in models.names()
    assert "svdq-int4.safetensors" in SVDQInfo.execute(listed).args[0]
    before = "" if notice is None else f"{notice}  \n"
    assert said == [(text, "7") for text in ("asking", f"{before}loading INT4, rank 16", f"{before}{ON_CPU}")]
    assert [record.message for record in caplog.records if "certain" in record.message] == (
        [] if notice is None else [f"SVDQ: {notice}"])
    assert support.comfy.model_management.get_torch_device().type == "cpu" and not loaders._wants_fp4(None, None) and model


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("capability, chosen, asked", [
    ((12, 0), (None, None), (torch.bfloat16, None)), ((12, 0), (torch.float16, 8), (torch.float16, 8)),
    ((7, 5), (None, None), (torch.float16, None))])
def test_the_registry_says_which_file(monkeypatch, capability, chosen, asked, precision):
    """For the device that ComfyUI computes on, and how it will compute."""
    seen = []
    support.pretend_gpu(monkeypatch, capability)
    monkeypatch.setattr(loaders.registry, "precision_for", lambda *given: seen.append(given) or precision)
    assert loaders._wants_fp4(*chosen) == (precision == "nvfp4")
    assert seen == [(Target("cuda", capability), *asked)]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("kernels, last", [((), ON_CPU), (("w4a4_sm80",), "INT4, rank 16 · fused W4A4 kernels on cpu")])
def test_the_loader_says_on_the_node_what_serves(kernels, last, folder, int4, monkeypatch):
    """After what it is waiting for: kernels that are compiled, here from a thread as with NVRTC."""
    said = []
    if kernels:
        support.emulate_kernels(monkeypatch, *kernels)
    plan = serving.plan_for

    def compiling(precision, device, dtype, act_bits):
        thread = threading.Thread(target=build._announce_compiling, args=("w4a4", "sm_86", "NVRTC", True))
        thread.start()
        thread.join()
        return plan(precision, device, torch.bfloat16 if kernels else dtype, act_bits)    # on a CPU ComfyUI casts to fp32

    for where in (load, serving):
        monkeypatch.setattr(where, "plan_for", compiling)
    monkeypatch.setattr(prompt_server, "running", lambda: SimpleNamespace(send_progress_text=lambda *sent: said.append(sent)))
    monkeypatch.setattr(SVDQModelLoader, "hidden", SimpleNamespace(unique_id="7"))
    shutil.copy(int4.path, folder / "a.safetensors")
    SVDQModelLoader.execute("a.safetensors", "bfloat16" if kernels else "auto")
    waiting = "compiling w4a4 for sm_86 with NVRTC, once; this may take a minute"
    assert said == [(text, "7") for text in ("loading INT4, rank 16", waiting, waiting, last)]
    assert build._listeners == []


@pytest.mark.parametrize("name", [5, None, 0.5, ["a.safetensors"], {}])
def test_names_that_are_none(name, folder):
    """What is linked to an input reaches a node unchecked."""
    for read in (SVDQModelLoader.execute, SVDQModelLoader.fingerprint_inputs, SVDQInfo.execute, SVDQInfo.fingerprint_inputs):
        with pytest.raises(CheckpointError, match="^.{1,20}: no such model in models/diffusion_models. Press R"):
            read(name)
    with pytest.raises(CheckpointError, match="needs the form owner/name"):
        SVDQHubLoader.execute(name)
    with pytest.raises(CheckpointError, match="needs the name of"):
        SVDQHubLoader.execute("owner/name", name or "x", name)


@pytest.mark.parametrize("choice, words", [
    ({"compute_dtype": "float64"}, "compute_dtype is float64, needs to be one of auto, bfloat16, float16. Choose"),
    ({"compute_dtype": None}, "compute_dtype is None, needs"),
    ({"compute_dtype": ["auto"]}, "compute_dtype is ..auto.., needs"),
    ({"act_bits": "5"}, "act_bits is 5, needs to be one of auto, 4, 8, 16. Choose"), ({"act_bits": 4}, "act_bits is 4, needs")])
def test_choices_that_are_none(choice, words, folder, int4, monkeypatch):
    """Refused before anything is fetched."""
    shutil.copy(int4.path, folder / "a.safetensors")
    monkeypatch.setattr(loaders.hub, "download", None)
    for use in (lambda: SVDQModelLoader.execute("a.safetensors", **choice),
                lambda: SVDQHubLoader.execute("owner/flux", **choice)):
        with pytest.raises(CheckpointError, match=f"^{words}"):
            use()


def test_listed(legacy):
    assert models.names() == ["old/svdq-legacy", *DEMO]
    assert models.listed(f"old/svdq-legacy/{BLOCKS_FILE}") == models.listed(f"old/svdq-legacy/{REST_FILE}") == "old/svdq-legacy"


@pytest.mark.parametrize("node", [SVDQModelLoader, SVDQInfo])
@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "\x1b[31mred", ""])
def test_names_of_no_file(node, name, folder):
    for use in (node.execute, node.fingerprint_inputs):
        with pytest.raises(CheckpointError, match="no such model in models/diffusion_models") as caught:
            use(name)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("node", [SVDQModelLoader, SVDQInfo])
def test_every_file_of_a_legacy_folder_counts(node, legacy):
    name = "old/svdq-legacy"
    for file in (BLOCKS_FILE, REST_FILE, *JSON_FILES.values()):
        before = node.fingerprint_inputs(name)
        assert node.fingerprint_inputs(name) == before == node.fingerprint_inputs(name)
        with open(legacy / file, "ab") as changed:      # the JSON files come, the others grow
            changed.write(b" ")
        grown = node.fingerprint_inputs(name)
        os.utime(legacy / file, (1, 1))
        assert len({repr(stamp) for stamp in (before, grown, node.fingerprint_inputs(name))}) == 3
    (legacy / JSON_FILES["config"]).unlink()
    assert node.fingerprint_inputs(name) != grown


def test_a_replaced_file_counts(folder, int4):
    (folder / "a.safetensors").write_bytes(b"1")
    (folder / "b.safetensors").write_bytes(b"1")
    before = SVDQModelLoader.fingerprint_inputs("a.safetensors")
    assert SVDQModelLoader.fingerprint_inputs("a.safetensors", act_bits="8") != before
    (folder / "b.safetensors").write_bytes(b"12")
    assert SVDQModelLoader.fingerprint_inputs("a.safetensors") == before
    (folder / "a.safetensors").write_bytes(b"12")
    assert SVDQModelLoader.fingerprint_inputs("a.safetensors") != before


def test_the_demo_without_its_files(folder, tmp_path, monkeypatch):
    """The lists hold the user's files, and its VAE is an error in words; what lies beside the VAE is not taken for it."""
    monkeypatch.setattr(demo, "MODELS", tmp_path / "models")
    (folder / "svdq-mine.safetensors").touch()
    assert models.names() == ["svdq-mine.safetensors"]
    for name in (None, "._svdq-demo-vae.safetensors", "other.safetensors"):
        if name:
            (demo.MODELS / "vae").mkdir(parents=True, exist_ok=True)
            (demo.MODELS / "vae" / name).touch()
        with pytest.raises(CheckpointError, match="svdq-demo-vae.safetensors: is not there, .*Install the pack again"):
            demo.SVDQDemoVAE.execute()


def test_a_file_named_as_the_demo_is_the_users(folder, int4):
    shutil.copy(int4.path, folder / DEMO[1])
    assert sorted(models.names()) == DEMO and models.path_of(DEMO[1]) == str(folder / DEMO[1])
    assert models.path_of(DEMO[0]) == demo.files("diffusion_models")[DEMO[0]]


@pytest.mark.parametrize("device, instead, wanted", [
    ("cuda", torch.float32, torch.float32), ("cuda", torch.float16, torch.float16), ("cuda", None, torch.bfloat16),
    ("cpu", torch.float32, torch.bfloat16)])
def test_dtype_that_a_gpu_lacks(monkeypatch, device, instead, wanted):
    """What ComfyUI would cast to: fp16 on an RTX 20, fp32 on a GTX 16, which it trusts with neither. A CPU computes in what is
    asked for."""
    monkeypatch.setattr(load.comfy.model_management, "unet_manual_cast", lambda *_: instead)
    assert load.compute_dtype(torch.device(device), 1, torch.bfloat16) == wanted
