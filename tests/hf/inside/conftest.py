"""The golden models inside diffusers. It imports none itself: the pytest that starts the one with diffusers reads this, too."""

import pytest
import torch


@pytest.fixture(params=["int4", "nvfp4"])
def golden_model(golden_dir, request):
    from svdq_pack.tests.hf.inside.support import Golden

    return Golden(golden_dir, request.param)


@pytest.fixture
def nvfp4(golden_dir):
    """The one that the golden LoRA is for."""
    from svdq_pack.tests.hf.inside.support import Golden

    return Golden(golden_dir, "nvfp4")


@pytest.fixture(autouse=True)
def quiet():
    """Gradients off, as pipelines have them; checks of training turn them on."""
    with torch.no_grad():
        yield
