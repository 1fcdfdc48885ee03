"""The golden checkpoints, for every test that takes one of each precision."""

import pytest
from svdq_pack.tests.unit.helpers import MODELS


@pytest.fixture(params=MODELS)
def precision(request):
    return request.param


@pytest.fixture
def model(golden_dir, precision):
    return golden_dir / f"{MODELS[precision]}.safetensors"
