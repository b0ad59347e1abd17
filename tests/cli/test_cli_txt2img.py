"""The whole command, on a tiny model: pictures, what their files say, and the grid."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.images import read_parameters

SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"
PROMPTS = ["a red flower", "빨간 꽃"]
OPTIONS = ["--n_samples", "2", "--seed", "7", "--negative_prompt", "grey", "--steps", "3"]


@pytest.fixture
def txt2img(tiny_model_folder, monkeypatch):
    """The script's main, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda *words: main([*words, "--model", str(tiny_model_folder)])


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def test_pictures_parameters_and_grid(tiny_pipeline, tiny_model_folder, txt2img, tmp_path):
    command = [sys.executable, SCRIPT, *PROMPTS, *OPTIONS, "--model", tiny_model_folder]
    process = subprocess.run(
        [*map(str, command), "--outdir", str(tmp_path / "all")],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONUTF8": "1"},
    )
    assert process.returncode == 0, process.stderr
    files = [tmp_path / "all" / "samples" / f"{i:05}.png" for i in range(4)]
    assert sorted((tmp_path / "all").rglob("*.png")) == [tmp_path / "all" / "grid-0000.png", *files]
    expected = tiny_pipeline(
        PROMPTS, negative_prompt="grey", seed=7, num_images_per_prompt=2, num_inference_steps=3
    ).images
    lines = process.stdout.splitlines()
    for i, file in enumerate(files):
        assert np.abs(pixels(file) - np.asarray(expected[i])).max() <= 1
        assert read_parameters(file) == (
            f"{PROMPTS[i // 2]}\nNegative prompt: grey\nSteps: 3, Sampler: ddim, Schedule type:"
            f" leading, CFG scale: 3.0, Seed: {7 + i}, Size: 32x32"
        )
        assert lines[i] == f"{file}  seed {7 + i}  {PROMPTS[i // 2]}"
    assert lines[4] == str(tmp_path / "all" / "grid-0000.png")
    grid = pixels(tmp_path / "all" / "grid-0000.png")
    assert grid.shape == (66, 66, 3)
    np.testing.assert_array_equal(grid[34:, 34:], pixels(files[3]))
    assert "|" not in process.stdout  # the progress bar goes to stderr

    for size in ("1", "3"):
        outdir = tmp_path / size
        txt2img(*PROMPTS, *OPTIONS, "--batch_size", size, "--outdir", str(outdir))
        for file in files:
            assert np.abs(pixels(outdir / "samples" / file.name) - pixels(file)).max() <= 1


def test_files_are_never_overwritten(txt2img, tmp_path):
    samples = tmp_path / "samples"
    for _ in range(2):
        txt2img("a", "b", "--steps", "1", "--outdir", str(tmp_path))
    assert sorted(path.name for path in samples.iterdir()) == [f"{i:05}.png" for i in range(4)]
    assert (tmp_path / "grid-0001.png").is_file()
    (samples / "00001.png").unlink()  # a gap is not filled, what comes after it is kept
    before = (samples / "00003.png").read_bytes()
    txt2img("c", "--steps", "1", "--outdir", str(tmp_path), "--skip_grid")
    assert (samples / "00003.png").read_bytes() == before
    assert (read_parameters(samples / "00004.png") or "").startswith("c\nSteps: 1,")
    assert len(list(tmp_path.glob("grid-*.png"))) == 2


def test_prompts_from_everywhere_and_a_random_seed(txt2img, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffthree\n\n  four \n", encoding="utf-8")
    words = ["one", "--prompt", "two", "--from-file", str(tmp_path / "prompts.txt")]
    options = ["--steps", "1", "--seed", "-1", "--sampler", "euler_a", "--scale", "1"]
    txt2img(*words, *options, "--width", "48", "--outdir", str(tmp_path))
    texts = [read_parameters(tmp_path / "samples" / f"{i:05}.png") or "" for i in range(4)]
    assert [text.splitlines()[0] for text in texts] == ["one", "two", "three", "four"]
    seeds = [
        int(line.split("seed ")[1].split()[0]) for line in capsys.readouterr().out.split("\n")[:4]
    ]
    assert seeds == list(range(seeds[0], seeds[0] + 4)) and seeds[0] >= 0
    assert texts[2].splitlines()[-1] == (
        f"Steps: 1, Sampler: euler_a, Schedule type: leading, CFG scale: 1.0, Seed: {seeds[2]},"
        " Size: 48x32"
    )
    assert pixels(tmp_path / "samples" / "00000.png").shape == (32, 48, 3)
