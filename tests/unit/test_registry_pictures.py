"""The icon and the banner are what tools/registry_pictures.py draws, in the sizes that the registry takes."""

import numpy as np
import pytest
from PIL import Image

from svdq_pack.tools import registry_pictures
from svdq_pack.tools.registry_pictures import FOLDER, PICTURES


@pytest.fixture(scope="module", params=PICTURES)
def pair(request):
    """(the picture in docs/pictures, what is drawn now)."""
    with Image.open(FOLDER / request.param) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture), PICTURES[request.param]()


def difference(first, second):
    return np.abs(first.astype(int) - second.astype(int))


def test_the_files_are_what_is_drawn(pair):
    """To a step of 255, which another numpy's sine may round otherwise."""
    there, drawn = pair
    assert there.shape == drawn.shape
    assert difference(there, drawn).max() <= 1, "Run: python tools/registry_pictures.py --write"


def test_sizes_that_the_registry_takes():
    (width, height), (wide, high) = (Image.open(FOLDER / name).size for name in PICTURES)
    assert width == height <= 400 and wide * 9 == high * 21
    assert all((FOLDER / name).stat().st_size < 300_000 for name in PICTURES)


def test_another_picture_is_seen(monkeypatch):
    """A crater more would be."""
    monkeypatch.setattr(registry_pictures, "CRATERS", [*registry_pictures.CRATERS, (-0.7, 0, 0.1)])
    assert difference(np.asarray(Image.open(FOLDER / "icon.png")), registry_pictures.draw_icon()).max() > 20


def test_what_four_bits_tell_apart():
    """The middles of the right half's cells have the 16 colours of the ramp."""
    picture = registry_pictures.moon(np.zeros((300, 300, 3)), (150, 150), 140, 14)
    levels = registry_pictures.whole(registry_pictures.ramp(np.arange(16) / 15))
    coarse, exact = (registry_pictures.whole(picture[60:260:20, column]) for column in (220, 80))
    apart = [[difference(colour, levels).max(axis=1).min() for colour in colours] for colours in (coarse, exact)]
    assert max(apart[0]) == 0 and max(apart[1]) > 5 and len(np.unique(coarse, axis=0)) > 3
