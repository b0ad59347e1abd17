"""scripts/benchmark.py as a user runs it: real processes on the tiny model, and its figures."""

import json
from statistics import median

import pytest
from PIL import Image

from ldm.benchmark.report import COLORS, markdown
from ldm.errors import ConfigError, LdmError


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run, and where it wrote."""
    import runpy
    import sys
    from pathlib import Path

    place, scripts = tmp_path_factory.mktemp("benchmark"), Path(__file__).parents[2] / "scripts"
    sys.path.insert(0, str(scripts))
    main = runpy.run_path(str(scripts / "benchmark.py"))["main"]
    words = "txt2img --size tiny --rounds 3 --steps 1,2 --variants ldm,diffusers --device cpu"
    files = ["--json", place / "x.json", "--plot", place / "x.webp", "--work_dir", place]
    main([*words.split(), *map(str, files)])
    sys.path.remove(str(scripts))
    return place, json.loads((place / "x.json").read_text())


def test_figures_follow_from_the_rounds(measured):
    [result] = measured[1]
    assert set(result["differences"]) == set(result["variants"]) == {"ldm", "diffusers"}
    assert result["differences"]["ldm"][0] < 1e-3 and result["matrix_rate"] > 1e9
    assert [point["steps"] for point in result["points"]] == [1, 2]
    for point in result["points"]:
        ours, theirs = (point["seconds"][name] for name in ("ldm", "diffusers"))
        assert len(ours) == len(theirs) == 3 and min(ours + theirs) > 0
        pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
        assert point["ratio"]["diffusers"] == [median(pairs), min(pairs), max(pairs)]
        assert point["median"] == {"ldm": median(ours), "diffusers": median(theirs)}
        share = point["flop"] / median(ours) / result["matrix_rate"]
        assert point["share"]["ldm"] == pytest.approx(share)
        assert min(point["memory"].values()) > 100 * 2**20  # each has torch in its own process


def test_the_table_and_the_plot_show_them(measured, script, capsys):
    place, [result] = measured
    script("benchmark", place / "x.json", "--markdown", model=None)
    shown = capsys.readouterr().out
    for line in markdown([result]):
        assert line in shown
    for point in result["points"]:
        [row] = [
            row for row in shown.splitlines() if f"{point['steps']} steps" in row and "|" in row
        ]
        middle, least, most = point["ratio"]["diffusers"]
        assert f"{middle:.2f} ({least:.2f}–{most:.2f})" in row
        assert f"{point['memory']['ldm'] / point['memory']['diffusers']:.0%}" in row
    assert result["command"] in shown and result["command"].startswith("python scripts/benchmark")
    colors = {color for _, color in Image.open(place / "x.webp").convert("RGB").getcolors(2**20)}
    for name in COLORS[:2]:
        wanted = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
        assert min(sum(abs(a - b) for a, b in zip(c, wanted, strict=True)) for c in colors) < 40


WRONG = {
    "case": ("txt2imgg", "no case 'txt2imgg'; did you mean 'txt2img'"),
    "size": ("unet --size tinny", "no size 'tinny'; did you mean 'tiny'"),
    "dtype": ("unet --dtype bf61", "no dtype 'bf61'; did you mean 'bf16'"),
    "variant": ("unet --variants ldm,difusers", "no variant 'difusers'; did you mean 'diffusers'"),
    "other variant": ("unet --variants ldm,diffusers images", "no variant 'diffusers images'"),
    "steps": ("unet --steps 4", "unet has no steps; leave out --steps"),
    "steps of none": ("txt2img --steps 4,0", "0 is out of range; it must be 1 or more"),
    "sizes": ("txt2img --height 64,128 --width 64,128,192", "2 heights and 3 widths"),
    "shapes of training": ("train_unet --batch_size 2,4", "train_unet has one batch of squares"),
    "side": ("unet --size tiny --height 17", "height is 17; it must be a positive multiple of 2"),
    "rounds": ("unet --rounds 0", "--rounds: 0 is out of range"),
    "no file": ("no.json", "no file no.json"),
    "another file": ("{wrong}", "wrong.json was not written by benchmark.py --json"),
    "device": ("unet --size tiny --device cuda:99", "no device 'cuda:99'"),
    "place": ("unet --json nowhere/x.json", "cannot write nowhere/x.json"),
    "picture": ("unet --plot x.pong", "--plot x.pong must end in .png or .webp"),
    "plot": ("unet --size tiny --plot x.png", "give several --steps or several --height"),
    "plot of two": ("unet text --size tiny --plot x.png", "--plot draws one case"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_arguments_are_one_line_before_anything_is_measured(
    script, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text('{"points": 1}')
    monkeypatch.setattr("ldm.benchmark.measure.Worker", None)
    words = words.replace("ldm,diffusers images", "ldm,diffusers\u00a0images").split(" ")
    words = [w.replace("\u00a0", " ").format(wrong=tmp_path / "wrong.json") for w in words]
    with pytest.raises(ConfigError, match=message) as caught:
        script("benchmark", *words, model=None)
    assert "\n" not in str(caught.value) and isinstance(caught.value, LdmError)
