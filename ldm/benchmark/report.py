"""What was measured, for people: lines, a table for a README, a chart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm.benchmark.measure import label
from ldm.errors import ConfigError

Result = Mapping[str, Any]

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#65a30d")


def read_results(file: Path) -> list[dict[str, Any]]:
    """What an earlier run has written.

    Raises:
        ConfigError: there is no such file, or something else is in it.
    """
    try:
        results = json.loads(file.read_text())
        return [result for result in results if result["points"]]
    except FileNotFoundError:
        raise ConfigError(f"no file {file}; give a case, or the --json of an earlier run") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} was not written by benchmark.py --json") from None


def lines(result: Result) -> list[str]:
    """Everything that one would ask, a line for each variant at each point."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    said = [
        f"{result['name']}: {what(result)}, {result['device']}; {result['machine']}, {versions}",
        f"matrix products at {result['matrix_rate'] / 1e12:.3g} TFLOP/s; differences to diffusers,"
        " of the largest value:",
    ]
    for name, (greatest, average) in result["differences"].items():
        said.append(f"  {name:24} {greatest:.1e} at most, {average:.1e} on average")
    for point in result["points"]:
        said.append(f"{label(point)}: {point['flop'] / 1e9:,.2f} GFLOP")
        for name, seconds in point["median"].items():
            words = [f"{_seconds(seconds):>8}", f"{_ratio(point['ratio'][name]):>19}"]
            words.append(f"peak {point['memory'][name] / 2**30:.2f} GiB")
            words.append(f"opened in {result['opened'][name]:.1f} s")
            words.append(f"first in {_seconds(point['warm_up'][name])}")
            if share := point["share"][name]:
                words.append(f"{share:.0%} of the matrix rate")
            if name in point["outside"]:
                words.append(f"{point['outside'][name]:.1%} outside networks, optimizer, average")
            said.append(f"  {name:24} {'   '.join(words)}")
    return said


def what(result: Result) -> str:
    """The work in words."""
    return f"{result['what']}, {result['size']}, {result['dtype']}"


def markdown(results: Sequence[Result]) -> list[str]:
    """A table with a row for each other variant, and the commands that made it."""
    rows = [
        "| work | diffusers | ldm's time | its time | times as fast | memory |",
        "|---" * 6 + "|",
    ]
    for result in results:
        first, *others = result["variants"]
        for point in result["points"]:
            for name in others:
                mine, theirs = (point["median"][n] for n in (first, name))
                memory = point["memory"][first] / point["memory"][name]
                words = [f"{what(result)}, {label(point)}", name, _seconds(mine), _seconds(theirs)]
                words += [_ratio(point["ratio"][name]), f"{memory:.0%}"]
                rows.append(f"| {' | '.join(words)} |")
    commands = dict.fromkeys(result["command"] for result in results)
    return [*rows, "", "```sh", *commands, "```"]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _ratio(ratio: Sequence[float]) -> str:
    middle, least, most = ratio
    return f"{middle:.2f} ({least:.2f}–{most:.2f})"


def axis_of(results: Sequence[Result]) -> str:
    """Over what a plot of them goes: steps or height.

    Raises:
        ConfigError: not exactly one of the two has several values, or there are several cases.
    """
    points = [point for result in results for point in result["points"]]
    axes = [axis for axis in ("steps", "height") if len({point[axis] for point in points}) > 1]
    if len(axes) != 1 or len({result["name"] for result in results}) > 1:
        raise ConfigError(
            "--plot draws one case against steps or picture size; give several --steps or several"
            " --height, one of the two"
        )
    return axes[0]


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw time against steps or picture size, a line for each variant.

    Args:
        results: of one case; points of several runs may be put together.
        file: PNG or WebP.
    """
    axis, points = axis_of(results), [point for result in results for point in result["points"]]
    series: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda point: point[axis]):
        for name, seconds in point["median"].items():
            series.setdefault(name, []).append((point[axis], seconds))
    result, first = results[0], points[0]
    fixed = f", {first['width']} px" if axis == "steps" else ""
    fixed = f", {first['steps']} steps" if axis == "height" and first["steps"] else fixed
    title = f"{what(result)}, {result['device']}{fixed}"
    chart(series, title, "steps" if axis == "steps" else "picture side, pixels").save(file)


def chart(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, below: str
) -> Image.Image:
    """Lines over two axes that begin at 0, each with its name at its end.

    Args:
        series: points (x, seconds) by name.
        title: above it.
        below: what x is.
    """
    width, height, left, right, top, bottom = 1400, 800, 110, 340, 90, 110
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font: Any = ImageFont.load_default(26)
    xs = sorted({x for own in series.values() for x, _ in own})
    highest = max(y for own in series.values() for _, y in own)
    tick = 10 ** math.floor(math.log10(highest)) / 2
    tick *= next(k for k in (0.4, 1, 2, 4) if highest / (tick * k) <= 6)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x / xs[-1] * (width - left - right)
        return across, height - bottom - y / (highest * 1.05) * (height - top - bottom)

    draw.text((left, 24), title, "#111827", ImageFont.load_default(30))
    draw.text((place(xs[-1] / 2, 0)[0], height - 30), below, "#374151", font, "mm")
    for i in range(int(highest * 1.05 / tick) + 1):
        start, y = place(0, i * tick)
        draw.line([(start, y), (width - right, y)], "#e5e7eb", 2)
        draw.text((start - 14, y), f"{i * tick:.3g}" + " s" * (i > 0), "#374151", font, "rm")
    for x in xs:
        draw.text((place(x, 0)[0], height - bottom + 28), f"{x:g}", "#374151", font, "mm")
    ends: list[float] = []
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(series)}
    for name, own in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        color = colors[name]
        path = [place(*point) for point in own]
        draw.line(path, color, 5, "curve")
        for x, y in path:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), color)
        # names that would stand on each other move down
        ends.append(max(path[-1][1], ends[-1] + 32 if ends else 0))
        draw.text((path[-1][0] + 22, ends[-1]), name, color, font, "lm")
    return image
