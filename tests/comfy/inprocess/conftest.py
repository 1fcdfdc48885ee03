"""test_inprocess.py runs this folder once per ComfyUI tree. By hand:

SVDQ_COMFYUI=TREE pytest --import-mode=importlib tests/comfy/inprocess/checks_model.py
"""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from svdq_pack.svdq.families import flux1
from svdq_pack.tests import random_models
from svdq_pack.tests.comfy.inprocess import support

GOLDEN = {"int4": "model_int4_flux_schnell_like", "nvfp4": "model_nvfp4_flux_dev_like"}


@pytest.fixture(autouse=True)
def clean():
    """No gradients, and no model of this test loaded in the next."""
    with torch.no_grad():
        yield
    support.comfy.model_management.unload_all_models()


@pytest.fixture(autouse=True, scope="session")
def folders(tmp_path_factory):
    """Files of the tests go here, not into ComfyUI's tree."""
    import folder_paths
    base = tmp_path_factory.mktemp("comfy")
    for kind in ("input", "output", "temp"):
        (base / kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(base / kind))
    return base


@pytest.fixture(params=GOLDEN)
def case(request, golden, golden_dir):
    return support.Case(golden_dir / f"{GOLDEN[request.param]}.safetensors", golden(f"{GOLDEN[request.param]}.io"))


@pytest.fixture
def int4(golden, golden_dir):
    """The golden INT4 model."""
    return support.Case(golden_dir / f"{GOLDEN['int4']}.safetensors", golden(f"{GOLDEN['int4']}.io"))


@pytest.fixture
def dev(golden, golden_dir):
    """The golden model that LoRAs exist for."""
    return support.Case(golden_dir / f"{GOLDEN['nvfp4']}.safetensors", golden(f"{GOLDEN['nvfp4']}.io"))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(precision="int4", rank=16, **shape) -> Case of a tiny random SVDQ FLUX, made once per session."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(precision="int4", rank=16, **changes):
        shape = flux1.Shape(**{"hidden": 128, "depth": 1, "depth_single": 1, "in_features": 64, "context_dim": 128,
                               "vec_dim": 64, "guidance": True} | changes)
        if (shape, precision, rank) not in made:
            made[shape, precision, rank] = support.Case(folder / f"svdq-{len(made)}.safetensors")
            random = torch.Generator().manual_seed(len(made))
            random_models.write_model(made[shape, precision, rank].path, random, shape, rank, precision)
        return made[shape, precision, rank]

    return make


@pytest.fixture
def folder(tmp_path, golden_dir, monkeypatch):
    """models/loras, with the golden LoRAs; nothing in the cache of files."""
    import folder_paths
    for name in ("peft", "kohya_bfl"):
        shutil.copy(golden_dir / f"lora_model_nvfp4_flux_dev_like_{name}.safetensors", tmp_path / f"{name}.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras",
                        ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(support.loras, "_files", {})
    return tmp_path


@pytest.fixture
def write(folder):
    """write(name, tensors) -> the file's name in models/loras."""
    def write(name, tensors):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        return f"{name}.safetensors"
    return write
