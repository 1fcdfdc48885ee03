"""Pictures that are drawn from a few words, and the words: what the demo model is trained on and judged by."""

import math
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {"red": (0.86, 0.16, 0.15), "orange": (0.97, 0.52, 0.09), "yellow": (0.98, 0.85, 0.16),
           "green": (0.17, 0.62, 0.26), "blue": (0.13, 0.33, 0.86), "purple": (0.54, 0.22, 0.72), "pink": (0.98, 0.50, 0.72),
           "white": (0.97, 0.97, 0.97), "black": (0.08, 0.08, 0.09)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted")
GROUNDS = ("plain", "striped", "checkered", "dotted", "faded")
PLACES = {"middle": (0, 0), "left": (-0.48, 0), "right": (0.48, 0), "top": (0, -0.48), "bottom": (0, 0.48)}
SIZES = {"small": 0.26, "large": 0.46}
NUMBERS = {"two": ((-0.42, 0), (0.42, 0)), "three": ((0, -0.42), (-0.45, 0.4), (0.45, 0.4)),
           "four": ((-0.42, -0.42), (0.42, -0.42), (-0.42, 0.42), (0.42, 0.42))}
LAYOUTS = ("one", "beside", "above", *NUMBERS)


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    texture: str

    def words(self, article="a", plural=""):
        return " ".join(filter(None, (article, "" if self.texture == "plain" else self.texture, self.colour,
                                      self.shape if not plural else self.shape + ("es" if self.shape == "cross" else "s"))))


@dataclass(frozen=True)
class Scene:
    """What a caption says; everything it leaves open, `draw` draws at random."""
    layout: str
    first: Thing
    second: Thing | None        # beside, above
    place: str | None           # one
    size: str | None            # one
    ground: str
    ground_colour: str
    sticker: bool = False       # the style of the demo's LoRA: no word says it

    @property
    def caption(self):
        if self.layout == "one":
            where = "in the middle" if self.place == "middle" else f"at the {self.place}"
            what = f"{self.first.words(f'a {self.size}')} {where}"
        elif self.layout in NUMBERS:
            what = self.first.words(self.layout, plural="s")
        else:
            what = f"{self.first.words()} {'left of' if self.layout == 'beside' else 'above'} {self.second.words()}"
        pattern = "" if self.ground == "plain" else f"{self.ground} "
        return f"{what} on a {pattern}{self.ground_colour} background"


def any_scene(random):
    """A scene of random choices: random is a numpy Generator."""
    def pick(options, weights=None):
        return str(random.choice(list(options), p=weights))

    ground_colour = pick(COLOURS)
    others = [name for name in COLOURS if name != ground_colour]        # a thing must show
    first = Thing(pick(SHAPES), pick(others), pick(TEXTURES, (0.6, 0.2, 0.2)))
    second = place = size = None
    layout = pick(LAYOUTS, (0.3, 0.2, 0.2, 0.1, 0.1, 0.1))
    if layout == "one":
        place, size = pick(PLACES), pick(SIZES)
    elif layout in ("beside", "above"):
        second = first
        while second == first:
            second = Thing(pick(SHAPES), pick(others), pick(TEXTURES, (0.6, 0.2, 0.2)))
    return Scene(layout, first, second, place, size, pick(GROUNDS, (0.4, 0.15, 0.15, 0.15, 0.15)), ground_colour)


def draw(scene, random, size=192):
    """float32 [size, size, 3] in 0..1. Position, scale and turn are a little random."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(axis, axis)
    picture = _ground(scene, x, y, random)
    if scene.layout == "one":
        placed = [(scene.first, PLACES[scene.place], SIZES[scene.size])]
    elif scene.layout in NUMBERS:
        placed = [(scene.first, at, 0.29) for at in NUMBERS[scene.layout]]
    else:
        step = (0.47, 0) if scene.layout == "beside" else (0, 0.47)
        placed = [(scene.first, (-step[0], -step[1]), 0.39), (scene.second, step, 0.39)]
    for thing, (cx, cy), radius in placed:
        cx, cy = cx + random.uniform(-0.05, 0.05), cy + random.uniform(-0.05, 0.05)
        radius *= random.uniform(0.92, 1.08)
        turn = math.radians(random.uniform(-12, 12))
        u, v = (x - cx) / radius, (y - cy) / radius
        u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        far = distance(thing.shape, u, v) * radius
        soft = 2 / size                             # one pixel
        if scene.sticker:
            shadow = np.clip(0.5 - np.roll(far, (size // 40, size // 40), (0, 1)) / 0.10 + 0.9, 0, 1)
            picture *= 1 - 0.55 * shadow[..., None]
            _paint(picture, np.clip(0.5 - (far - 0.085) / soft, 0, 1), np.float32((1, 1, 1)))
        _paint(picture, np.clip(0.5 - far / soft, 0, 1), _fill(thing, u, v, far))
    return np.clip(picture, 0, 1).astype(np.float32)


def _paint(picture, cover, colour):
    picture += cover[..., None] * (colour - picture)


def _fill(thing, u, v, far):
    colour = np.float32(COLOURS[thing.colour])
    tone = 0.35 * colour if colour.mean() > 0.3 else colour + 0.45
    mark = {"plain": np.zeros_like(u), "striped": _edge(np.sin((u + v) * 7.5), 0.25),
            "dotted": _edge(np.cos(u * 8.4) * np.cos(v * 8.4) - 0.35, 0.12)}[thing.texture]
    filled = colour * (1 - 0.16 * v[..., None].clip(-1, 1)) + mark[..., None] * (tone - colour)
    rim = np.clip(1 + far / 0.035, 0, 1)[..., None]                     # a darker edge, so that like shows on like
    return filled * (1 - 0.45 * rim)


def _ground(scene, x, y, random):
    colour = 0.60 * np.float32(COLOURS[scene.ground_colour]) + 0.30      # paler than any thing
    a, b = random.uniform(0, 2 * math.pi, 2)
    mark = {"plain": lambda: np.zeros_like(x), "striped": lambda: _edge(np.sin(x * 14 + a), 0.2),
            "checkered": lambda: _edge(np.sin(x * 9.4 + a) * np.sin(y * 9.4 + b), 0.05),
            "dotted": lambda: _edge(np.cos(x * 12 + a) * np.cos(y * 12 + b) - 0.45, 0.1),
            "faded": lambda: 1.6 * (y + 1) / 2}[scene.ground]()
    return colour * (1 - 0.28 * mark[..., None]) + np.zeros_like(x)[..., None]


def _edge(wave, width):
    return np.clip(0.5 + wave / width, 0, 1)


def distance(shape, u, v):
    """How far points lie outside a shape of radius about 1: negative inside, exact enough for smooth edges."""
    def box(half_u, half_v, u=u, v=v):
        a, b = abs(u) - half_u, abs(v) - half_v
        return np.hypot(a.clip(0), b.clip(0)) + np.maximum(a, b).clip(max=0)

    def disc(cu, cv, radius):
        return np.hypot(u - cu, v - cv) - radius

    if shape == "circle":
        return disc(0, 0, 0.95)
    if shape == "ring":
        return abs(disc(0, 0, 0.72)) - 0.25
    if shape == "square":
        return box(0.82, 0.82)
    if shape == "cross":
        return np.minimum(box(0.98, 0.33), box(0.33, 0.98))
    if shape == "moon":
        return np.maximum(disc(0, 0, 0.98), -disc(0.55, -0.12, 0.80))
    if shape == "heart":
        turned = box(0.52, 0.52, (u + v - 0.18) * math.sqrt(0.5), (v - u - 0.18) * math.sqrt(0.5))
        return np.minimum(np.minimum(disc(-0.42, -0.30, 0.53), disc(0.42, -0.30, 0.53)), turned)
    corners = 3 if shape == "triangle" else 10
    radii = (1.12,) * 3 if shape == "triangle" else (1.08, 0.46) * 5
    lift = 0.2 if shape == "triangle" else 0.0
    angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return _polygon([(r * math.cos(a), r * math.sin(a) + lift) for r, a in zip(radii, angles)], u, v)


def _polygon(corners, u, v):
    """Signed distance: the nearest edge, and by the parity of edges to the right whether a point is inside."""
    nearest, inside = np.full_like(u, np.inf), np.zeros(u.shape, bool)
    for (au, av), (bu, bv) in zip(corners, corners[1:] + corners[:1]):
        eu, ev = bu - au, bv - av
        along = (((u - au) * eu + (v - av) * ev) / (eu * eu + ev * ev)).clip(0, 1)
        np.minimum(nearest, np.hypot(u - au - along * eu, v - av - along * ev), out=nearest)
        if ev:
            inside ^= ((av > v) != (bv > v)) & (u < eu * (v - av) / ev + au)
    return np.where(inside, -nearest, nearest)


LABELS = {"layout": LAYOUTS, "place": tuple(PLACES), "size": tuple(SIZES), "shape": SHAPES, "colour": tuple(COLOURS),
          "texture": TEXTURES, "second shape": SHAPES, "second colour": tuple(COLOURS), "second texture": TEXTURES,
          "ground": GROUNDS, "ground colour": tuple(COLOURS), "sticker": (False, True)}


def labels(scene):
    """{name in LABELS: index, -100 where the caption does not say}: -100 is what torch's cross_entropy passes over."""
    values = {"layout": scene.layout, "place": scene.place, "size": scene.size, "ground": scene.ground,
              "ground colour": scene.ground_colour, "sticker": scene.sticker}
    for prefix, thing in (("", scene.first), ("second ", scene.second)):
        for name in ("shape", "colour", "texture"):
            values[prefix + name] = thing and getattr(thing, name)
    return {name: -100 if values[name] is None else options.index(values[name]) for name, options in LABELS.items()}


def as_sticker(scene):
    return replace(scene, sticker=True)
