"""Procedural flowers with captions: a data set that needs no download.

Sample i of a split is a pure function of (split, i). The pictures are drawn with polygons at four
times the size and averaged down; the captions use everyday words and always tell the truth. Some
pairs of colour and kind are held out of training, to see whether a model can put together what it
has only seen apart. `ldm.evaluation.flowers` reads colour, number and kind back from the pixels.

Lengths are in units of the picture's side (or of the flower's radius, where said), y points down.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.sample import Sample
from ldm.errors import ConfigError, DataError, suggest
from ldm.rng import Draws

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (214, 30, 40),
    "orange": (246, 126, 16),
    "yellow": (253, 216, 44),
    "blue": (36, 82, 216),
    "purple": (134, 48, 170),
    "pink": (248, 138, 182),
    "white": (252, 251, 248),
    "turquoise": (30, 190, 186),
    "brown": (132, 76, 38),
    "black": (30, 27, 32),
}
"""The petals' colours. Green is left to stems and leaves."""

KINDS: tuple[str, ...] = ("daisy", "tulip", "poppy", "lily", "sunflower", "rose")

COUNTS: dict[int, str] = {1: "one", 2: "two", 3: "three"}

BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "in the grass"),
    "sky": ("against the sky", "under the sky"),
    "sand": ("on sand", "in the desert"),
    "night": ("at night", "in the dark"),
    "wall": ("by a grey wall", "in front of a grey wall"),
}
"""The words for each background; the first is the canonical one."""

GRADIENTS: dict[str, tuple[RGB, RGB]] = {
    "meadow": ((226, 240, 200), (150, 206, 112)),
    "sky": ((132, 194, 240), (214, 238, 251)),
    "sand": ((251, 236, 204), (232, 202, 152)),
    "night": ((36, 38, 90), (80, 76, 146)),
    "wall": ((190, 191, 196), (158, 160, 167)),
}
"""Top and bottom colour of each background."""

LEAF: RGB = (62, 134, 58)
GOLD: RGB = (240, 180, 40)
UMBER: RGB = (74, 44, 26)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "sunflower"),
        ("orange", "lily"),
        ("yellow", "rose"),
        ("blue", "tulip"),
        ("purple", "daisy"),
        ("pink", "poppy"),
        ("white", "sunflower"),
        ("turquoise", "rose"),
        ("brown", "lily"),
        ("black", "daisy"),
    }
)
"""Pairs of colour and kind that only the split `held_out` shows."""

_PLURALS = {"daisy": "daisies", "poppy": "poppies", "lily": "lilies"}
_PREFIXES = ("", "", "", "a drawing of ", "a picture of ")
_SUPERSAMPLING = 4
_RADIUS = {1: 0.31, 2: 0.21, 3: 0.15}

_PAIRS = tuple((color, kind) for color in COLORS for kind in KINDS)
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)
_SPLIT_PAIRS = {
    "train": _SEEN,
    "validation": _SEEN,
    "held_out": tuple(pair for pair in _PAIRS if pair in HELD_OUT),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `split` and `index` address the draws of its geometry.

    Attributes:
        color: a key of `COLORS`.
        kind: one of `KINDS`.
        count: flowers in the picture, 1 to 3.
        background: a key of `BACKGROUNDS`.
        small: whether the flowers are clearly smaller than the count makes them.
        caption: true words about the picture; they need not say everything.
        split: the split it belongs to.
        index: its number in the split, from 0.
    """

    color: str
    kind: str
    count: int
    background: str
    small: bool
    caption: str
    split: str
    index: int


def scene(index: int, split: str = "train") -> Scene:
    """Scene `index` (any integer from 0) of a split, the same one on every call.

    Raises:
        DataError: the split does not exist.
    """
    if split not in _SPLIT_PAIRS:
        raise DataError(f"flowers: no split {split!r}; {suggest(split, _SPLIT_PAIRS)}")
    draws = Draws(0, f"flowers/{split}/scene", index)
    pairs = _SPLIT_PAIRS[split]
    color, kind = pairs[draws.integer(len(pairs))]
    count = 1 + draws.integer(len(COUNTS))
    background = tuple(BACKGROUNDS)[draws.integer(len(BACKGROUNDS))]
    say_kind, say_place, say_small, be_small = draws.uniform(4)
    small = bool(be_small < 0.25)
    caption = _PREFIXES[draws.integer(len(_PREFIXES))] + prompt(
        color,
        kind if say_kind < 0.75 else None,
        count,
        background if say_place < 0.6 else None,
        small=small and bool(say_small < 0.7),
        wording=draws.integer(2),
    )
    return Scene(color, kind, count, background, small, caption, split, index)


def prompt(
    color: str,
    kind: str | None = None,
    count: int = 1,
    background: str | None = None,
    *,
    small: bool = False,
    wording: int = 0,
) -> str:
    """A caption in the words of the training set: `two small red daisies in a meadow`.

    Args:
        color: a key of `COLORS`.
        kind: one of `KINDS`; None says `flower`.
        count: 1 to 3; one flower is `a` or `an`.
        background: a key of `BACKGROUNDS`, or None for no word about it.
        small: whether to call the flowers small.
        wording: 0 for the canonical words, 1 for the other ones.
    """
    noun = kind or "flower"
    if count > 1:
        noun = _PLURALS.get(noun, noun + "s")
    words = f"{'small ' if small else ''}{color} {noun}"
    article = "an" if words[0] in "aeiou" else "a"
    words = f"{article if count == 1 else COUNTS[count]} {words}"
    return f"{words} {BACKGROUNDS[background][wording]}" if background else words


def parse(caption: str) -> dict[str, str | int | bool | None]:
    """What a caption of this data set says: color, kind, count, background, small; None is unsaid.

    Raises:
        DataError: the caption is not one that `prompt` writes.
    """
    nouns = {_PLURALS.get(kind, kind + "s"): kind for kind in (*KINDS, "flower")}
    nouns |= {kind: kind for kind in (*KINDS, "flower")}
    match = re.fullmatch(
        r"(?:a (?:drawing|picture) of )?(an?|two|three) (small )?(\w+) (\w+)(?: (.+))?", caption
    )
    places = {words: name for name, both in BACKGROUNDS.items() for words in both}
    if (
        match is None
        or match[3] not in COLORS
        or match[4] not in nouns
        or (match[5] and match[5] not in places)
    ):
        raise DataError(f"flowers: {caption!r} is no caption of the procedural flowers")
    kind = nouns[match[4]]
    return {
        "color": match[3],
        "kind": None if kind == "flower" else kind,
        "count": {"two": 2, "three": 3}.get(match[1], 1),
        "background": places[match[5]] if match[5] else None,
        "small": bool(match[2]),
    }


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The picture of a scene, RGB, `size` pixels a side."""
    draws = Draws(0, f"flowers/{scene.split}/geometry", scene.index)
    canvas = _Canvas(scene.background, size * _SUPERSAMPLING)
    _decorate(canvas, scene.background, draws)
    # One tint for the whole picture: its flowers share one colour, a little off the nominal one.
    petals = np.clip(np.array(COLORS[scene.color]) + 16 * (draws.uniform(3) - 0.5), 0, 255)
    blooms = _place(scene, draws)
    for bloom in blooms:
        _stem(canvas, bloom, scene.kind, draws)
    for bloom in blooms:
        _DRAWERS[scene.kind](canvas, bloom, petals, draws)
    return canvas.image.reduce(_SUPERSAMPLING)


@dataclass(frozen=True)
class _Bloom:
    middle: complex
    radius: float


class _Canvas:
    """A supersampled picture that is drawn on in units of its side. Points are x + iy."""

    def __init__(self, background: str, side: int):
        top, bottom = np.array(GRADIENTS[background], dtype=np.float64)
        ramp = top + (bottom - top) * np.linspace(0, 1, side)[:, None]  # h 3
        column = ramp.round().astype(np.uint8)[:, None]
        self.image = Image.fromarray(column).resize((side, side), Image.Resampling.NEAREST)
        self.side = side
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, color: np.ndarray | RGB) -> None:
        """Fill one polygon of n corners; points n, complex."""
        self._draw.polygon((points * self.side).view(np.float64).tolist(), fill=_rgb(color))

    def disc(self, middle: complex, radius: float, color: np.ndarray | RGB) -> None:
        """Fill a circle."""
        x, y, reach = middle.real * self.side, middle.imag * self.side, radius * self.side
        self._draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=_rgb(color))


def _rgb(color: np.ndarray | RGB) -> RGB:
    red, green, blue = color.tolist() if isinstance(color, np.ndarray) else color
    return min(255, round(red)), min(255, round(green)), min(255, round(blue))


def _mix(color: np.ndarray | RGB, other: np.ndarray | RGB, share: float) -> np.ndarray:
    return np.asarray(color) * (1 - share) + np.asarray(other) * share


def _edge(color: np.ndarray) -> np.ndarray:
    """The line between petals: darker than they are, lighter where they are nearly black."""
    if color.max() < 70:
        return _mix(color, (150, 148, 165), 0.45)
    if color.min() > 190:
        return _mix(color, (120, 128, 160), 0.42)
    return color * 0.7


@lru_cache(maxsize=1024)
def _leaf_shape(start: float, end: float, width: float, base: float, tip: float) -> np.ndarray:
    """An outline along the x axis, from x = start to end; half its width at the widest is `width`.

    The half width goes as t ** base * (1 - t) ** tip: 0.5 is round, 1 pointed, 0.3 nearly square.
    """
    t = (1 - np.cos(np.linspace(0, np.pi, 13))) / 2
    profile = t**base * (1 - t) ** tip
    peak = base / (base + tip)
    half = width * profile / (peak**base * (1 - peak) ** tip)
    side = start + (end - start) * t + 1j * half
    return np.concatenate([side, side[-2:0:-1].conj()])


def _circle(angles: np.ndarray) -> np.ndarray:
    """The points of the unit circle at angles in radians."""
    return np.exp(1j * angles)


def _petals(
    canvas: _Canvas,
    bloom: _Bloom,
    angles: np.ndarray,
    shape: tuple[float, float, float, float, float],
    color: np.ndarray,
    shades: np.ndarray,
    vein: float = 0.9,
) -> None:
    """One petal of a `_leaf_shape` at each angle: edge, face and a darker base."""
    start, end, width, base, tip = shape
    rim = 0.035
    edge = _leaf_shape(start, end, width, base, tip)
    face = _leaf_shape(start + rim, end - rim, width - rim, base, tip)
    heart = _leaf_shape(start + rim, start + 0.62 * (end - start), 0.45 * width, base, tip)
    line = _edge(color)
    for spoke, shade in zip(bloom.radius * _circle(angles), shades, strict=True):
        canvas.polygon(bloom.middle + spoke * edge, line)
        canvas.polygon(bloom.middle + spoke * face, color * shade)
        canvas.polygon(bloom.middle + spoke * heart, color * (shade * vein))


def _spread(count: int, turn: float, draws: Draws, jitter: float = 0.08) -> np.ndarray:
    """`count` angles round the circle, each off by up to `jitter` of the step between them."""
    step = 2 * np.pi / count
    return step * (np.arange(count) + turn + jitter * (2 * draws.uniform(count) - 1))


def _shades(count: int, draws: Draws, depth: float = 0.05) -> np.ndarray:
    return 1 - depth + 2 * depth * draws.uniform(count)


def _disc_color(petals: np.ndarray, dark: bool) -> RGB:
    """Gold or dark brown, whichever is asked for unless the petals are too much like it."""
    brightness = float(petals @ np.array([0.3, 0.6, 0.1]))
    if dark:
        return GOLD if brightness < 95 and petals[2] < 100 and petals[0] < 180 else UMBER
    warm = petals[0] > 220 and petals[2] < 90
    return (150, 72, 20) if warm else GOLD


def _daisy(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    count, turn = 11 + draws.integer(3), draws.uniform(1)[0]
    angles = _spread(count, turn, draws)
    _petals(canvas, bloom, angles, (0.12, 1, 0.135, 0.9, 0.35), color, _shades(count, draws))
    disc = np.array(_disc_color(color, dark=False))
    canvas.disc(bloom.middle, 0.29 * bloom.radius, disc * 0.78)
    canvas.disc(bloom.middle, 0.25 * bloom.radius, disc)
    shine = bloom.middle - (0.07 + 0.07j) * bloom.radius
    canvas.disc(shine, 0.12 * bloom.radius, _mix(disc, (255, 255, 255), 0.25))


def _sunflower(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    count, turn = 14 + draws.integer(4), draws.uniform(1)[0]
    shape = (0.38, 1.0, 0.15, 0.55, 0.85)
    for half, depth in ((0.5, 0.86), (0.0, 1.0)):
        angles = _spread(count, turn + half, draws)
        _petals(canvas, bloom, angles, shape, color * depth, _shades(count, draws))
    disc = np.array(_disc_color(color, dark=True))
    canvas.disc(bloom.middle, 0.5 * bloom.radius, disc * 0.7)
    canvas.disc(bloom.middle, 0.46 * bloom.radius, disc)
    # Seeds on the golden spiral (Vogel 1979).
    seeds = np.arange(1, 22)
    spots = 0.41 * np.sqrt(seeds / 21) * _circle(seeds * 2.399963 + turn)
    light = _mix(disc, (255, 200, 120), 0.28)
    for spot in bloom.middle + bloom.radius * spots:
        canvas.disc(spot, 0.04 * bloom.radius, light)


def _poppy(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    turn = draws.uniform(1)[0]
    angles = _spread(4, turn, draws, 0.03)
    shape = (0.0, 1.0, 0.53, 0.75, 0.32)
    shades = _shades(4, draws)
    _petals(canvas, bloom, angles[::2], shape, color, shades[::2] * 0.94, 0.84)
    _petals(canvas, bloom, angles[1::2], shape, color, shades[1::2], 0.84)
    disc = np.array(_disc_color(color, dark=True))
    dots = 2 * np.pi * (np.arange(10) + turn) / 10
    for dot in bloom.middle + 0.28 * bloom.radius * _circle(dots):
        canvas.disc(dot, 0.045 * bloom.radius, disc)
    canvas.disc(bloom.middle, 0.19 * bloom.radius, disc)
    canvas.disc(bloom.middle, 0.09 * bloom.radius, _mix(disc, LEAF, 0.6))


def _lily(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    angles = _spread(6, draws.uniform(1)[0], draws, 0.04)
    shape = (0.0, 1.06, 0.21, 0.8, 0.95)
    shades = _shades(6, draws)
    _petals(canvas, bloom, angles[::2], shape, color, shades[::2] * 0.95, 0.92)
    _petals(canvas, bloom, angles[1::2], shape, color, shades[1::2], 0.92)
    stamen = np.array(_disc_color(color, dark=False))
    for tip in bloom.middle + 0.25 * bloom.radius * _circle(angles + np.pi / 6):
        canvas.disc(tip, 0.055 * bloom.radius, stamen)
    canvas.disc(bloom.middle, 0.1 * bloom.radius, _mix(stamen, LEAF, 0.5))


def _rose(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    turn = draws.uniform(1)[0]
    for ring, (count, end, width) in enumerate(((5, 0.95, 0.6), (5, 0.7, 0.44), (3, 0.46, 0.4))):
        angles = _spread(count, turn + 0.5 * ring, draws, 0.04)
        shape = (0.0, end, width, 0.6, 0.3)
        tone = color * (1 - 0.07 * ring)
        _petals(canvas, bloom, angles, shape, tone, _shades(count, draws), 0.93)
    canvas.disc(bloom.middle, 0.17 * bloom.radius, _edge(color))
    canvas.disc(bloom.middle, 0.12 * bloom.radius, color * 0.84)


def _tulip(canvas: _Canvas, bloom: _Bloom, color: np.ndarray, draws: Draws) -> None:
    lean = 0.16 * (draws.uniform(1)[0] - 0.5)
    shades = _shades(5, draws, 0.03)
    foot = _Bloom(bloom.middle + 0.92j * bloom.radius, bloom.radius)
    up = -np.pi / 2 + lean
    backs = up + np.array([-0.2, 0.2])
    _petals(canvas, foot, backs, (0, 1.72, 0.3, 0.5, 0.8), color * 0.84, shades[:2])
    sides = up + np.array([-0.3, 0.3])
    _petals(canvas, foot, sides, (0, 1.82, 0.42, 0.42, 0.72), color * 0.95, shades[2:4], 0.95)
    _petals(canvas, foot, np.array([up]), (0, 1.6, 0.47, 0.42, 0.68), color, shades[4:], 0.95)


_DRAWERS: dict[str, Callable[[_Canvas, _Bloom, np.ndarray, Draws], None]] = {
    "daisy": _daisy,
    "tulip": _tulip,
    "poppy": _poppy,
    "lily": _lily,
    "sunflower": _sunflower,
    "rose": _rose,
}


def _place(scene: Scene, draws: Draws) -> list[_Bloom]:
    """Where the flowers stand: apart from each other, one size for all."""
    middles = {
        1: (0.5 + 0.4j,),
        2: (0.265 + 0.37j, 0.735 + 0.47j),
        3: (0.19 + 0.34j, 0.5 + 0.57j, 0.81 + 0.34j),
    }[scene.count]
    scale, flip = draws.uniform(2)
    low, high = (0.66, 0.74) if scene.small else (0.88, 1.0)
    radius = _RADIUS[scene.count] * (low + (high - low) * scale)
    # Two and three flowers stand high and low by turns, or low and high.
    if scene.count > 1 and flip < 0.5:
        middles = [middle.conjugate() + 0.9j for middle in middles]
    play = 0.02 + 0.6 * (_RADIUS[scene.count] - radius)
    moves = 2 * play * (draws.uniform(2 * scene.count) - 0.5).view(np.complex128)
    return [
        _Bloom(complex(middle + move), radius) for middle, move in zip(middles, moves, strict=True)
    ]


def _stem(canvas: _Canvas, bloom: _Bloom, kind: str, draws: Draws) -> None:
    """A stem from the flower to the ground with its leaves."""
    bend, shade, height, *sway = draws.uniform(5)
    green = np.array(LEAF) * (0.9 + 0.2 * shade)
    thickness = 0.008 + 0.03 * bloom.radius
    t = np.linspace(0, 1, 9)
    y = bloom.middle.imag + (1.02 - bloom.middle.imag) * t
    x = bloom.middle.real + 0.5 * (bend - 0.5) * bloom.radius * t**2
    canvas.polygon(np.concatenate([x - thickness + 1j * y, (x + thickness + 1j * y)[::-1]]), green)
    reach = min(0.3, 0.06 + 0.85 * bloom.radius)
    for side, wave in zip((-1, 1), sway, strict=True):
        if kind == "tulip":
            root, angle, length = 1.03, 0.28 + 0.14 * wave, 1.5 * reach
        else:
            ground = bloom.middle.imag + bloom.radius
            root = ground + (0.99 - ground) * (0.6 + 0.3 * wave * (side * (height - 0.5) + 0.5))
            angle, length = 0.85 + 0.3 * wave, reach
        node = np.interp(root, y, x) + 1j * root
        spoke = length * np.exp(1j * (side * angle - np.pi / 2))
        tone = green * (0.92 if side < 0 else 1.06)
        canvas.polygon(node + spoke * _leaf_shape(0, 1, 0.175, 0.8, 0.9), tone)
        canvas.polygon(node + spoke * _leaf_shape(0, 0.8, 0.04, 0.5, 0.9), green * 1.2)


def _decorate(canvas: _Canvas, background: str, draws: Draws) -> None:
    """A few quiet shapes that tell the place, all close in colour to its gradient."""
    top, bottom = np.array(GRADIENTS[background], dtype=np.float64)
    phase = draws.uniform(4)
    if background in ("meadow", "sand"):
        x = np.linspace(0, 1, 25)
        for hill, tone in ((0, 0.97), (1, 0.93)):
            rise = 0.045 * np.sin(2 * np.pi * ((0.8 + 0.4 * hill) * x + phase[hill]))
            edge = x + 1j * (0.62 + 0.17 * hill + rise)
            canvas.polygon(np.append(edge, [1 + 1.01j, 1.01j]), bottom * tone)
    if background == "meadow":
        blade = _leaf_shape(0, 0.1, 0.008, 0.4, 0.9)
        for root, tilt in draws.uniform(36).reshape(18, 2):
            spoke = np.exp(1j * (0.9 * (tilt - 0.5) - np.pi / 2))
            canvas.polygon(root + 1.01j + spoke * blade, bottom * 0.84)
    elif background == "sky":
        for cloud, level in enumerate((0.13, 0.5, 0.8)):
            middle = (phase[cloud] + 0.3 * cloud) % 1 + 1j * level
            tone = _mix(_mix(top, bottom, level), (222, 241, 252), 0.5)
            for shift, radius in ((-0.09 + 0.012j, 0.045), (0, 0.065), (0.09 + 0.015j, 0.04)):
                canvas.disc(middle + shift, radius, tone)
    elif background == "night":
        for star in draws.uniform(36).view(np.complex128):
            canvas.disc(star, 0.008, (150, 150, 205))
    elif background == "wall":
        line, joint = np.array([0, 1, 1 + 0.008j, 0.008j]), np.array([0, 0.008, 0.008, 0])
        for row in range(9):
            level = (row + 0.35) / 8
            mortar = _mix(top, bottom, level) * 0.95
            canvas.polygon(line + 1j * level, mortar)
            for brick in range(5):
                left = (brick + 0.5 * (row % 2) + phase[0]) / 4 - 0.25
                canvas.polygon(left + joint + 1j * (level - np.array([0.125, 0.125, 0, 0])), mortar)


class Flowers:
    """The procedural flowers as a `DataSource`.

    Args:
        length: samples in the data set.
        size: side of the pictures, in pixels.
        split: `train`, `validation` (other pictures of the same pairs) or `held_out`.

    Raises:
        ConfigError: the length or the size is not positive.
        DataError: the split does not exist.
    """

    def __init__(self, length: int = 20000, size: int = 64, split: str = "train"):
        if length < 1 or size < 1:
            raise ConfigError(f"flowers: length {length} and size {size} must be positive")
        scene(0, split)
        self.length, self.side, self.split = length, size, split

    @property
    def fingerprint(self) -> str:
        """A hash that names the data."""
        name = f"flowers/1/{self.split}/{self.length}/{self.side}"
        return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The sample's name."""
        return f"{self.split}/{index:06d}"

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"flowers: index {index} of {self.length}")
        what = scene(index, self.split)
        return Sample(render(what, self.side), what.caption, self.key(index))

    def caption(self, index: int) -> str:
        """What is said of the sample."""
        return scene(index, self.split).caption

    def label(self, index: int) -> None:
        """There are no classes."""

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.side, self.side
