"""A judge of procedural flowers: reads colour, number and kind from the pixels alone.

It knows neither the caption nor any network, so it can tell whether a model does what it is told.
Every pixel goes to the nearest of a few known colours in CIELAB (background, leaves, centres,
petals); the petals' colour is the one with most pixels, the number is that of connected regions,
and the kind comes from a linear discriminant on features that do not change when a flower turns.

Letters: n pixels or flowers, p palette entries, f features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from ldm.data.flowers import BACKGROUNDS, COLORS, GOLD, GRADIENTS, KINDS, LEAF, UMBER, render, scene
from ldm.rng import Draws

SIDE = 64
"""The side at which pictures are judged, in pixels; others are scaled to it."""


@dataclass(frozen=True)
class Verdict:
    """What the judge sees.

    Attributes:
        color: a key of `COLORS`, or empty where there is no flower.
        count: number of flowers, from 0.
        kind: one of `KINDS`, or empty where there is no flower.
    """

    color: str
    count: int
    kind: str


def judge(image: Image.Image) -> Verdict:
    """Name the colour, number and kind of the flowers in a picture (square, of any size)."""
    color, flowers = _find_flowers(image)
    if not flowers:
        return Verdict("", 0, "")
    weights, offset = _discriminant()
    scores = np.stack([flower @ weights + offset for flower in flowers]).sum(0)
    return Verdict(color, len(flowers), KINDS[int(scores.argmax())])


def degrade(image: Image.Image, seed: int) -> Image.Image:
    """What an autoencoder does to a picture: a blur of 0.7 pixels and noise of 4 / 255."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
    pixels = pixels + 4 * Draws(seed, "flowers/degrade").normal(*pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 255], channels last, to CIELAB under D65 (CIE 15:2004)."""
    linear = np.where(rgb <= 10.31475, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _find_flowers(image: Image.Image) -> tuple[str, list[np.ndarray]]:
    """The petals' colour, and the features of each flower."""
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = lab(np.asarray(image, dtype=np.float64)).reshape(-1, 3)  # n 3
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[2 : SIDE // 2, 2:-2] = frame[SIDE // 2 :] = False  # the stems stand in the lower half
    border = pixels[frame.ravel()]
    palettes = [_palette(background) for background in BACKGROUNDS]
    costs = [
        _distances(border, colors[names == "back"]).min(1).mean() for names, colors in palettes
    ]
    names, colors = palettes[int(np.argmin(costs))]
    nearest = names[_distances(pixels, colors).argmin(1)]  # n
    votes = {color: int((nearest == color).sum()) for color in COLORS}
    color = max(votes, key=votes.__getitem__)
    petals = (nearest == color).reshape(SIDE, SIDE)
    centre = (nearest == "centre").reshape(SIDE, SIDE)
    # Where petals meet the centre their colours mix into others: these pixels join the two.
    solid = ~np.isin(nearest, ("back", "leaf")).reshape(SIDE, SIDE)
    regions = _regions(solid & _grow(petals | centre))
    regions = [region for region in regions if (region & petals).any()]
    largest = max((int(region.sum()) for region in regions), default=0)
    regions = [region for region in regions if region.sum() >= max(12, 0.3 * largest)]
    return color, [_features(region, petals & region, pixels) for region in regions]


@lru_cache
def _palette(background: str) -> tuple[np.ndarray, np.ndarray]:
    """Names (p) and CIELAB colours (p 3) of all that can be seen before a background."""
    top, bottom = np.array(GRADIENTS[background], dtype=np.float64)
    back = top + (bottom - top) * np.linspace(0, 1, 6)[:, None]
    leaf = np.array(LEAF) * np.array([0.85, 1.0, 1.2])[:, None]
    named: list[tuple[str, np.ndarray]] = [("back", tone) for tone in (*back, bottom * 0.93)]
    if background == "meadow":
        named.append(("back", bottom * 0.84))
    if background == "night":
        named.append(("back", np.array((150, 150, 205))))
    named += [("leaf", tone) for tone in leaf]
    named += [("leaf", (leaf[1] + tone) / 2) for tone in back[::2]]  # a leaf's soft edge
    for tone in (GOLD, UMBER, (150, 72, 20)):
        named.append(("centre", np.array(tone)))
    for color, rgb in COLORS.items():
        named += [(color, np.array(rgb) * shade) for shade in (1.0, 0.85)]
    names, colors = zip(*named, strict=True)
    return np.array(names), lab(np.stack(colors).astype(np.float64))


def _distances(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Euclidean distances in CIELAB: n 3, p 3 -> n p."""
    squares = (pixels**2).sum(1)[:, None] + (colors**2).sum(1) - 2 * pixels @ colors.T
    return np.sqrt(squares.clip(0))


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected regions (of eight neighbours) of a boolean picture, as such pictures."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _grow(labels), 0)
        # A label is the number of a pixel, which may by now have a larger label: go on from there.
        spread = np.append(0, spread)[spread]
        if np.array_equal(spread, labels):
            break
        labels = spread
    return [labels == label for label in np.unique(labels[labels > 0])]


def _grow(values: np.ndarray) -> np.ndarray:
    """The largest value among each pixel and its eight neighbours: h w -> h w."""
    height, width = values.shape
    padded = np.pad(values, 1)
    tall = np.maximum.reduce([padded[i : i + height] for i in range(3)])  # h w+2
    return np.maximum.reduce([tall[:, i : i + width] for i in range(3)])  # h w


def _features(region: np.ndarray, petals: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """A flower's shape in polar coordinates, blind to rotation, size, place and colour: f."""
    rows, columns = np.nonzero(region)
    y, x = rows.mean(), columns.mean()
    reach = np.sqrt(((rows - y) ** 2 + (columns - x) ** 2).max()) + 0.5
    rings, spokes = np.arange(1, 11) / 10 * reach, 2 * np.pi * np.arange(64) / 64
    lightness = pixels[:, 0].reshape(region.shape)
    typical = np.median(lightness[petals])
    maps = []
    for image in (region, petals, np.where(region, (lightness - typical) / 50, 0)):
        at_y = y + rings[:, None] * np.sin(spokes)
        at_x = x + rings[:, None] * np.cos(spokes)
        maps.append(_sample(image.astype(np.float64), at_y, at_x))
    shape = np.abs(np.fft.rfft(np.stack(maps[:2]), axis=-1))[..., :20] / 64
    tone = maps[2].mean(-1)
    spread = np.sqrt(np.linalg.eigvalsh(np.cov(np.stack([rows, columns])))) / reach
    fill = [len(rows) / reach**2, petals.sum() / len(rows), *spread]
    return np.concatenate([shape.ravel(), tone, fill])


def _sample(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear interpolation; 0 outside."""
    padded = np.pad(image, 1)
    y, x = (y + 1).clip(0, image.shape[0]), (x + 1).clip(0, image.shape[1])
    top, left = y.astype(int), x.astype(int)
    down, across = y - top, x - left
    above = padded[top, left] * (1 - across) + padded[top, left + 1] * across
    below = padded[top + 1, left] * (1 - across) + padded[top + 1, left + 1] * across
    return above * (1 - down) + below * down


@lru_cache
def _discriminant() -> tuple[np.ndarray, np.ndarray]:
    """Weights f k and offset k of a linear discriminant, fitted to pictures of every kind.

    Source: Fisher 1936; Hastie, Tibshirani, Friedman 2009, eq. 4.10, with a shrunken covariance.
    """
    samples: list[np.ndarray] = []
    kinds: list[int] = []
    for index, (color, kind, turn) in enumerate(product(COLORS, KINDS, range(3))):
        model = replace(scene(index), color=color, kind=kind, count=1, split="judge")
        clean = render(replace(model, background=tuple(BACKGROUNDS)[turn]), SIDE)
        for image in (clean, degrade(clean, index)):
            _, flowers = _find_flowers(image)
            if len(flowers) == 1:
                samples.append(flowers[0])
                kinds.append(KINDS.index(kind))
    features, classes = np.stack(samples), np.array(kinds)
    means = np.stack([features[classes == kind].mean(0) for kind in range(len(KINDS))])  # k f
    residual = features - means[classes]
    covariance = residual.T @ residual / len(features)
    covariance += 0.05 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T)
    return weights, -0.5 * (means * weights.T).sum(1)
