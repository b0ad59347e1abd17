"""The judge of flowers against the truth of fresh pictures, clean and degraded."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.data.flowers import BACKGROUNDS, COLORS, KINDS, Scene, render, scene
from ldm.evaluation.flowers import _regions, degrade, judge, lab


@pytest.fixture(scope="module")
def fresh() -> list[tuple[Scene, Image.Image]]:
    """300 pictures that the judge was not fitted to, a quarter of them of held-out pairs."""
    scenes = [scene(10_000 + i, "validation" if i % 4 else "held_out") for i in range(300)]
    return [(truth, render(truth)) for truth in scenes]


@pytest.mark.parametrize("degraded", [False, True], ids=["clean", "degraded"])
def test_accuracy(fresh: list[tuple[Scene, Image.Image]], degraded: bool) -> None:
    right, total = Counter(), Counter()
    for index, (truth, image) in enumerate(fresh):
        seen = judge(degrade(image, index) if degraded else image)
        right.update(color=seen.color == truth.color, count=seen.count == truth.count)
        total.update(color=1, count=1)
        if truth.count == 1:
            right.update(kind=seen.kind == truth.kind)
            total.update(kind=1)
    assert right["color"] >= 0.99 * total["color"]
    assert right["count"] >= 0.98 * total["count"]
    assert right["kind"] >= 0.95 * total["kind"]


@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_pixels(kind: str) -> None:
    """One geometry, every colour and background: the verdict changes with the pixels alone."""
    for turn, color in enumerate(COLORS):
        background = list(BACKGROUNDS)[turn % len(BACKGROUNDS)]
        truth = replace(scene(7), color=color, kind=kind, count=2, background=background)
        seen = judge(render(truth))
        assert (seen.color, seen.count, seen.kind) == (color, 2, kind)


def test_recolored_pixels() -> None:
    """Swapping the red and blue channels of a red flower by a grey wall shows a blue one."""
    image = render(replace(scene(3), color="red", kind="poppy", count=1, background="wall"))
    assert judge(image).color == "red"
    assert judge(Image.fromarray(np.asarray(image)[..., ::-1].copy())).color == "blue"


def test_deterministic_and_of_any_size() -> None:
    truth = replace(scene(5), color="pink", kind="lily", count=3)
    image = render(truth, 256)
    assert judge(image) == judge(image.copy())
    assert (judge(image).color, judge(image).count, judge(image).kind) == ("pink", 3, "lily")


def test_no_flower() -> None:
    assert judge(Image.new("RGB", (64, 64), (174, 175, 181))).count == 0


def test_regions_against_flood_fill() -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.4
    left, expected = {tuple(at) for at in np.argwhere(mask).tolist()}, []
    while left:
        stack, region = [left.pop()], set()
        while stack:
            y, x = stack.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        expected.append(region)
    found = [{tuple(at) for at in np.argwhere(region).tolist()} for region in _regions(mask)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_lab_of_known_colors() -> None:
    """Values of Lindbloom's calculator (D65)."""
    rgb = np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255], [119, 119, 119]], dtype=float)
    expected = [[100, 0, 0], [53.241, 80.093, 67.203], [32.297, 79.188, -107.86], [50.03, 0, 0]]
    np.testing.assert_allclose(lab(rgb), expected, atol=0.03)
