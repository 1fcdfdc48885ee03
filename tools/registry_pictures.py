#!/usr/bin/env python3
"""Draw the icon and the banner that ComfyUI's registry and its Manager show for this pack.

    python tools/registry_pictures.py --write           docs/pictures/icon.png and docs/pictures/banner.png

`python` is one with numpy and Pillow, such as ComfyUI's. A moon, exact on its left; on its right the same in cells of 16
colours, which is what four bits can tell apart. Everything is a distance to a shape, in numpy: no font, no chance, the same
pixels anywhere. Sizes are the registry's (docs.comfy.org/registry/specifications): an icon of at most 400 x 400, a banner of
21:9. tests/unit/test_registry_pictures.py compares the files with what is drawn.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
ICON, BANNER = (400, 400), (1680, 720)          # width, height
LEVELS = 16
NIGHT = np.array([[17, 18, 38], [38, 30, 72]]) / 255            # the background, top left to bottom right
INK = np.array([246, 240, 228]) / 255
MOON = np.array([[30, 18, 62], [84, 26, 108], [158, 42, 112], [222, 78, 84], [250, 144, 66], [254, 208, 112], [255, 246, 214]]
                ) / 255                                         # its ramp from shadow to light
LIGHT = np.array([-0.50, -0.46, 0.73])
CRATERS = [(-0.42, 0.30, 0.20), (0.08, -0.44, 0.13), (-0.52, -0.30, 0.10), (-0.05, 0.62, 0.10), (0.36, 0.22, 0.24),
           (0.52, -0.32, 0.14), (-0.12, 0.02, 0.09)]            # x, y, radius on the disc of radius 1
STEPS = (0, 1, -1, 0, 2, 0, -1, 1, 0, -2, 1, 0, -1)             # cells by which the border between its halves goes to and fro


def grid(width, height):
    """x and y of the pixels' middles, [height, width] each."""
    return np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)


def cover(distance):
    """How much of a pixel a shape covers, by the signed distance of its middle from the edge in pixels; inside is negative."""
    return np.clip(0.5 - distance, 0, 1)


def over(picture, colour, alpha):
    return picture + (colour - picture) * alpha[..., None]


def ramp(level):
    """The moon's colour at a brightness of 0 to 1, between the colours of MOON."""
    at = np.clip(level, 0, 1) * (len(MOON) - 1)
    low = np.minimum(at.astype(int), len(MOON) - 2)
    return MOON[low] + (MOON[low + 1] - MOON[low]) * (at - low)[..., None]


def brightness(x, y):
    """Of the moon at a place of its disc of radius 1: a lit ball with craters, whose far rims catch the light."""
    z = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
    nx, ny = x, y
    for cx, cy, radius in CRATERS:
        inside = np.clip(1 - ((x - cx) ** 2 + (y - cy) ** 2) / radius**2, 0, 1)
        nx, ny = nx - 1.7 * inside * (x - cx) / radius, ny - 1.7 * inside * (y - cy) / radius
    length = np.sqrt(nx * nx + ny * ny + z * z)
    light = (nx * LIGHT[0] + ny * LIGHT[1] + z * LIGHT[2]) / np.maximum(length, 1e-6) / np.linalg.norm(LIGHT)
    return 0.14 + 0.86 * np.clip(light, 0, 1) ** 0.85


def moon(picture, middle, radius, cells):
    """Paint it; cells: so many across its disc."""
    x, y = grid(picture.shape[1], picture.shape[0])
    x, y, size = (x - middle[0]) / radius, (y - middle[1]) / radius, 2 / cells
    away = np.hypot(x, y) - 1
    picture = over(picture, MOON[2], np.clip(1 - away / 0.55, 0, 1) ** 2 * 0.3 * (away > 0))
    column, row = np.floor((x + 1) / size), np.floor((y + 1) / size)
    mx, my = (column + 0.5) * size - 1, (row + 0.5) * size - 1
    coarse = column >= cells // 2 + np.take(STEPS, row.astype(int), mode="wrap")
    picture = over(picture, ramp(brightness(x, y)), cover(away * radius) * ~coarse)
    level = np.round(brightness(mx, my) * (LEVELS - 1)) / (LEVELS - 1)
    square = np.maximum(np.abs(x - mx), np.abs(y - my)) * radius - (size * radius / 2 - 1.2)
    return over(picture, ramp(level), cover(square) * (coarse & (np.hypot(mx, my) < 1)))


def background(width, height):
    x, y = grid(width, height)
    return NIGHT[0] + (NIGHT[1] - NIGHT[0]) * ((x / width + y / height) / 2)[..., None]


# ---- the wordmark: strokes of one width, in units of the letters' height ----

def segment(x, y, x0, y0, x1, y1):
    """The distance to a line between two points."""
    along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
    return np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))


def arc(x, y, cx, cy, rx, ry, start, end):
    """The distance to an arc of an ellipse by 90 short lines; degrees, clockwise from the right."""
    turns = np.radians(np.linspace(start, end, 91))
    px, py = cx + rx * np.cos(turns), cy + ry * np.sin(turns)
    return np.min([segment(x, y, *ends) for ends in zip(px, py, px[1:], py[1:])], axis=0)


def letters(x, y):
    """The distance to SVDQ, each letter 0.72 wide and 1 high, from (0, 0)."""
    s = np.minimum(arc(x, y, 0.34, 0.255, 0.31, 0.255, -32, -270), arc(x, y, 0.34, 0.755, 0.34, 0.245, -90, 148))
    v = np.minimum(segment(x, y, 0.98, 0, 1.30, 1), segment(x, y, 1.30, 1, 1.62, 0))
    d = np.min([segment(x, y, 2.02, 0, 2.02, 1), segment(x, y, 2.02, 0, 2.18, 0), segment(x, y, 2.02, 1, 2.18, 1),
                arc(x, y, 2.18, 0.5, 0.46, 0.5, -90, 90)], axis=0)
    q = np.minimum(arc(x, y, 3.42, 0.5, 0.46, 0.5, 0, 360), segment(x, y, 3.56, 0.72, 3.86, 1.04))
    return np.min([s, v, d, q], axis=0)


WORD = 3.9                      # width of SVDQ in heights of a letter
STROKE = 0.075                  # half a stroke's width


def draw_icon():
    """[400, 400, 4] uint8, its corners rounded."""
    width, height = ICON
    x, y = grid(width, height)
    picture = moon(background(width, height), (200, 200), 150, 18)
    side = np.maximum(np.hypot(np.maximum(np.abs(x - 200) - 120, 0), np.maximum(np.abs(y - 200) - 120, 0)) - 80, -1)
    return np.dstack([whole(picture), whole(cover(side)[..., None])])


def draw_banner():
    """[720, 1680, 3] uint8."""
    width, height = BANNER
    picture = moon(background(width, height), (1270, 360), 265, 26)
    high, left, top = 168, 170, 230
    x, y = grid(width, height)
    there = np.s_[top - 40:top + high + 40, left - 40:left + int(WORD * high) + 40]
    away = letters((x[there] - left) / high, (y[there] - top) / high) - STROKE
    picture[there] = over(picture[there], INK, cover(away * high))
    # Under it the sixteen levels of four bits.
    size = WORD * high / LEVELS
    column = np.clip(np.floor((x - left) / size), 0, LEVELS - 1)
    middle = left + (column + 0.5) * size
    square = np.maximum(np.abs(x - middle) - (size / 2 - 3), np.abs(y - 486) - (size / 2 - 3))
    return whole(over(picture, ramp((column + 0.5) / LEVELS * 0.92 + 0.08), cover(square)))


def whole(picture):
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


PICTURES = {"icon.png": draw_icon, "banner.png": draw_banner}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: docs/pictures")
    options = parser.parse_args(arguments)
    for name, draw in PICTURES.items():
        Image.fromarray(draw()).save(options.out / name, optimize=True)
        print(options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
