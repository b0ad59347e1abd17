"""The procedural flowers: a pure function, truthful captions, balanced contents."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ldm.data.flowers import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    HELD_OUT,
    KINDS,
    Flowers,
    parse,
    prompt,
    render,
    scene,
)
from ldm.errors import ConfigError, DataError

TRAIN = [scene(index) for index in range(3000)]


def _digest(index: int) -> str:
    what = scene(index)
    return hashlib.sha256(what.caption.encode() + render(what).tobytes()).hexdigest()


def test_pure_function_of_split_and_index() -> None:
    indices = [5, 0, 11, 3]
    first = {index: _digest(index) for index in indices}
    assert {index: _digest(index) for index in reversed(indices)} == first
    program = (
        "import hashlib\nfrom ldm.data.flowers import render, scene\n"
        f"for i in {sorted(indices)}:\n    s = scene(i)\n"
        "    print(hashlib.sha256(s.caption.encode() + render(s).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert other.stdout.decode().split() == [first[index] for index in sorted(indices)]
    assert len(set(first.values())) == len(indices)
    assert render(scene(0)).tobytes() != render(replace(scene(0), split="validation")).tobytes()


def test_held_out_pairs() -> None:
    assert len(HELD_OUT) == 10
    for split in ("train", "validation"):
        assert not {(s.color, s.kind) for s in (scene(i, split) for i in range(3000))} & HELD_OUT
    assert {(s.color, s.kind) for s in (scene(i, "held_out") for i in range(300))} == HELD_OUT
    # Every colour and every kind is still seen with most of the others.
    assert max(Counter(color for color, _ in HELD_OUT).values()) <= 1
    assert max(Counter(kind for _, kind in HELD_OUT).values()) <= 2


@pytest.mark.parametrize(
    ("field", "shares"),
    [
        ("color", dict.fromkeys(COLORS, 1 / 10)),
        ("kind", {k: (10 - sum(k == held for _, held in HELD_OUT)) / 50 for k in KINDS}),
        ("count", dict.fromkeys(COUNTS, 1 / 3)),
        ("background", dict.fromkeys(BACKGROUNDS, 1 / 5)),
        ("small", {True: 0.25, False: 0.75}),
    ],
)
def test_frequencies(field: str, shares: dict) -> None:
    found = Counter(getattr(s, field) for s in TRAIN)
    assert found.keys() == shares.keys()
    for value, share in shares.items():
        spread = np.sqrt(share * (1 - share) / len(TRAIN))
        assert abs(found[value] / len(TRAIN) - share) < 4.5 * spread, value


def test_captions_tell_the_truth() -> None:
    silent = Counter()
    for s in TRAIN:
        said = parse(s.caption)
        assert (said["color"], said["count"]) == (s.color, s.count), s.caption
        assert said["kind"] in (s.kind, None), s.caption
        assert said["background"] in (s.background, None), s.caption
        assert s.small or not said["small"], s.caption
        silent.update(name for name in ("kind", "background") if said[name] is None)
    assert abs(silent["kind"] / len(TRAIN) - 0.25) < 0.04
    assert abs(silent["background"] / len(TRAIN) - 0.4) < 0.04


def test_prompt_words() -> None:
    assert prompt("red") == "a red flower"
    assert prompt("orange", "lily", background="night") == "an orange lily at night"
    assert prompt("red", "daisy", 2) == "two red daisies"
    assert prompt("blue", None, 3, "meadow", small=True) == "three small blue flowers in a meadow"
    for caption in ("a photo of my dog", "a red rose on mars", "a mauve rose", "a red dog"):
        with pytest.raises(DataError, match="no caption"):
            parse(caption)


def _changed(what, **fields) -> tuple[np.ndarray, np.ndarray]:
    """The picture, and where it differs from the same one with other fields."""
    first = np.asarray(render(what), dtype=int)
    other = np.asarray(render(replace(what, **fields)), dtype=int)
    return first, np.abs(first - other).max(-1)


@pytest.mark.parametrize("color", COLORS)
def test_petal_pixels_have_the_color(color: str) -> None:
    """Recolouring changes the petals alone, and these lie nearest to their own colour."""
    palette = np.array(list(COLORS.values()))
    for index in range(12):
        what = replace(
            scene(index), color=color, kind=("tulip", "poppy", "lily", "rose")[index % 4]
        )
        far = "yellow" if color in ("blue", "black", "purple") else "blue"
        pixels, change = _changed(what, color=far)
        petals = pixels[change > 60]
        assert len(petals) > 50
        # The median petal pixel, as edges and shadows are darker.
        median = np.median(petals, axis=0)
        nearest = np.linalg.norm(palette - median, axis=1).argmin()
        assert list(COLORS)[nearest] == color
        assert np.abs(median - COLORS[color]).max() < 45


def test_flowers_stand_apart_and_inside() -> None:
    """No petal touches the picture's frame; flowers are recognised by what recolouring changes."""
    for index in range(60):
        what = replace(scene(index), color="red")
        _, change = _changed(what, color="blue")
        frame = np.concatenate([change[0], change[-1], change[:, 0], change[:, -1]])
        assert frame.max() < 40, what


def test_sizes_agree() -> None:
    """A larger rendering averaged down is the smaller one, to rounding."""
    for index in (1, 2, 3):
        small = np.asarray(render(scene(index), 64), dtype=float)
        large = np.asarray(render(scene(index), 256), dtype=float)
        down = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small - down).mean() < 2.5


def test_source() -> None:
    source = Flowers(length=10, size=32, split="held_out")
    sample = source[3]
    assert (len(source), sample.key, source.key(3)) == (10, "held_out/000003", "held_out/000003")
    assert sample.caption == scene(3, "held_out").caption
    assert sample.image.tobytes() == render(scene(3, "held_out"), 32).tobytes()
    assert source.fingerprint == Flowers(length=10, size=32, split="held_out").fingerprint
    assert source.fingerprint != Flowers(length=11, size=32, split="held_out").fingerprint
    with pytest.raises(IndexError):
        source[10]
    with pytest.raises(ConfigError):
        Flowers(length=0)
    with pytest.raises(DataError, match="did you mean 'train'"):
        Flowers(split="trian")
