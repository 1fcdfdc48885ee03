"""The golden models inside diffusers."""

import pytest
import torch

from svdq_pack.tests.hf.support import Golden


@pytest.fixture(params=["int4", "nvfp4"])
def golden_model(golden_dir, request):
    return Golden(golden_dir, request.param)


@pytest.fixture
def nvfp4(golden_dir):
    """The one that the golden LoRA is for."""
    return Golden(golden_dir, "nvfp4")


@pytest.fixture(autouse=True)
def quiet():
    """Gradients off, as pipelines have them; checks of training turn them on."""
    with torch.no_grad():
        yield
