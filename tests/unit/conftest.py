"""The golden checkpoints, for every test that takes one of each precision; one thread for all."""

import pytest
import torch

from svdq_pack.tests.unit.helpers import MODELS


@pytest.fixture(params=MODELS)
def precision(request):
    return request.param


@pytest.fixture
def model(golden_dir, precision):
    return golden_dir / f"{MODELS[precision]}.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are small: torch's threads would only wait for each other, on a busy machine most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
