"""Which file a path or a name means: what is here goes before what is there, and what is neither is said."""

import os
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import SVDQFluxTransformer2DModel
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.hf import source
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.tests.hf.inside.support import write
from svdq_pack.tests.unit.helpers import metadata_of, save_legacy

REPO = "nunchaku-tech/nunchaku-flux.1-dev"
INT4, FP4 = "svdq-int4_r32-flux.1-dev.safetensors", "svdq-fp4_r32-flux.1-dev.safetensors"


@pytest.fixture
def hub(tmp_path, nvfp4, monkeypatch):
    """Hugging Face with three repositories, and a cache that fills; gives what was asked of it."""
    asked, cache = [], tmp_path / "cache"
    files = {REPO: [INT4, FP4, "README.md"], "mit-han-lab/svdq-int4-flux.1-schnell": source.LEGACY,
             "a/two": ["x/a.safetensors"]}

    def path(repo, name):
        return cache / repo.replace("/", "--") / name

    def fetch(repo, name, local_files_only=False, **_):
        asked.append(("file", repo, name))
        if name not in files.get(repo, ()):
            raise huggingface_hub.errors.EntryNotFoundError("no")
        path(repo, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nvfp4.path, path(repo, name))
        return str(path(repo, name))

    def snapshot(repo, allow_patterns, **_):
        asked.append(("folder", repo, tuple(allow_patterns)))
        path(repo, "").parent.mkdir(parents=True, exist_ok=True)
        return str(save_legacy(path(repo, ""), load_file(nvfp4.path), metadata_of(nvfp4.path)))

    class Api:
        def __init__(self, token=None):
            pass

        def model_info(self, repo, **_):
            asked.append(("list", repo))
            if repo not in files:
                raise huggingface_hub.errors.RepositoryNotFoundError("no", response=_Response())
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in files[repo]]})

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda repo, name, **_: str(path(repo, name)) if path(repo, name).exists() else None)
    monkeypatch.chdir(tmp_path)
    return asked


class _Response:
    status_code, headers, request, url = 404, {}, None, ""


def load(where, **options):
    return SVDQFluxTransformer2DModel.from_pretrained(where, dtype=torch.float32, **options)


def test_files_and_folders(nvfp4, tmp_path):
    wanted = nvfp4.run(nvfp4.load())
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(nvfp4.path, folder / "svdq-fp4_r32-x.safetensors")
    legacy = save_legacy(tmp_path / "legacy", load_file(nvfp4.path), metadata_of(nvfp4.path))
    for where, options in ((str(nvfp4.path), {}), (nvfp4.path, {}), (folder, {}), (tmp_path, {"subfolder": "model"}),
                           (legacy, {}), (legacy / "transformer_blocks.safetensors", {}),
                           (folder, {"filename": "svdq-fp4_r32-x.safetensors"})):
        assert torch.equal(nvfp4.run(load(where, act_bits=16, **options)), wanted)
    model = SVDQFluxTransformer2DModel.from_single_file(nvfp4.path, torch_dtype=torch.float16)
    assert model.dtype == torch.float16
    for options, dtype in (({}, torch.bfloat16), ({"dtype": "float16"}, torch.float16),
                           ({"torch_dtype": "auto"}, torch.bfloat16),
                           ({"torch_dtype": None, "low_cpu_mem_usage": True}, torch.float32)):         # as pipelines ask
        assert SVDQFluxTransformer2DModel.from_pretrained(pretrained_model_name_or_path=nvfp4.path, **options).dtype == dtype
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").touch()
    with pytest.raises(CheckpointError, match='subfolder="transformer"'):
        load(tmp_path / "pipe")


def test_several_files(nvfp4, tmp_path):
    shutil.copy(nvfp4.path, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no model")
    assert source.find(tmp_path) == tmp_path / "a.safetensors"
    write(tmp_path)
    with pytest.raises(CheckpointError, match="filename"):
        source.find(tmp_path)


def test_what_is_here_goes_first(hub, nvfp4, tmp_path):
    folder = tmp_path / REPO
    folder.mkdir(parents=True)
    shutil.copy(nvfp4.path, folder)
    load(REPO)
    assert hub == []


def test_on_the_hub(hub):
    load(REPO)
    assert hub == [("list", REPO), ("file", REPO, INT4)]
    hub.clear()
    load(REPO)                                          # in the cache: nobody is asked which files there are
    assert hub == []
    load(f"{REPO}/{FP4}")
    load(REPO, filename=FP4)
    assert hub == [("file", REPO, FP4)] * 2


@pytest.mark.parametrize("precision, name", [("nvfp4", FP4), ("int4", INT4)])
def test_the_registry_says_which(hub, monkeypatch, precision, name):
    """Asked for the device that the model goes to, or the GPU where none is given, and for how it is to compute there."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(source.Target, "of", lambda device: Target("cuda", (12, 0)) if device.type == "cuda" else Target("cpu"))
    monkeypatch.setattr(source.registry, "precision_for", lambda *given: asked.append(given) or precision)
    load(REPO)
    source.find(REPO, dtype=torch.float16, act_bits=8, device=torch.device("cuda:1"))
    assert hub[-1] == ("file", REPO, name)
    assert asked == [(Target("cuda", (12, 0)), torch.float32, None), (Target("cuda", (12, 0)), torch.float16, 8)]
    load(REPO, filename=INT4)                           # who names a file is asked nothing
    assert len(asked) == 2


def test_a_legacy_repository(hub):
    load("mit-han-lab/svdq-int4-flux.1-schnell")
    assert [what for what, *_ in hub] == ["list", "folder"]
    hub.clear()
    load("mit-han-lab/svdq-int4-flux.1-schnell", local_files_only=True)
    assert hub == []


@pytest.mark.parametrize("where, options, words", [
    ("nothing", {}, "no such file or folder"), ("./nothing/here", {}, "no such file or folder"),
    ("/nothing/here.safetensors", {}, "no such file or folder"), (None, {}, "Needs a file"), (5, {}, "Needs a file"),
    ("some/where/else", {}, "subfolder"), ("some/file.safetensors", {}, "owner/name/FILE"),
    (f"{REPO}/{FP4}", {"filename": INT4}, "one of them"), ("a/b", {}, "no such repository"),
    ("a/two", {}, "no file named svdq-int4"), (REPO, {"filename": "other.safetensors"}, "has no file"),
    (REPO, {"local_files_only": True}, "local_files_only"), (REPO, {"revision": "../x"}, "revision"),
    (REPO, {"filename": "../x.safetensors"}, "filename"), ("empty", {}, "no .safetensors file")])
def test_neither(hub, tmp_path, where, options, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=words):
        load(where, **options)
    assert not any(what == "file" and "other" not in name for what, _, *name in hub for name in name)


@pytest.mark.parametrize("options, error, words", [
    ({"dtype": torch.int8}, ValueError, "dtype is torch.int8"), ({"dtype": "bf16"}, ValueError, "dtype is 'bf16'"),
    ({"dtype": torch.float32, "torch_dtype": torch.float16}, ValueError, "Give one of them"),
    ({"filename": "other.safetensors"}, CheckpointError, "Give one of them"),
    ({"device_map": "balanced"}, ValueError, "Needs one device"), ({"device": "somewhere"}, ValueError, "Needs one device"),
    ({"offload": True}, TypeError, "'offload' is no argument"), ({"quantization_config": 1}, ValueError, "quantised as it is"),
    ({"variant": "fp16"}, ValueError, "Leave it out"), ({"act_bits": 5}, ValueError, "act_bits is 5")])
def test_arguments(nvfp4, options, error, words):
    with pytest.raises(error, match=words):
        SVDQFluxTransformer2DModel.from_pretrained(nvfp4.path, **options)


def test_devices(nvfp4):
    for options in ({"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device": torch.device("cpu")}):
        assert load(nvfp4.path, **options).device.type == "cpu"
    assert os.path.samefile(load(nvfp4.path).svdq_path, nvfp4.path)
