"""Many prompts: runs that continue, and runs that several processes share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from ldm.cli import Parser
from ldm.drawing import draw_pictures, find_device
from ldm.errors import ConfigError, DataError
from ldm.metadata import read_identity, read_settings, save_picture
from ldm.options import add_options, read_options
from ldm.outputs import first_number

ROOT = Path(__file__).parents[2]
# Batches of 3, 3, 3, 3, 2 and 3, 3, 3, 1.
LINES = [f"flower {i}" + (" --w 48" if i >= 14 else "") for i in range(24)]
OPTIONS = ["--batch_size", "3", "--steps", "15", "--seed", "5"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--config_file"]
    + [str(ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml")],
}


def read(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; a PNG's bytes are its pixels and metadata."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def draw(*words: object, rank: int = 0, world: int = 1) -> None:
    """txt2img.py in this process, as one of so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world))
        parser = Parser("txt2img.py")
        add_options(parser, "unused")
        draw_pictures(read_options(parser, [*map(str, words)]))


@pytest.fixture(scope="module")
def command(tiny_model_folder, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(LINES))
    return ["--from-file", str(file), "--model", str(tiny_model_folder), *OPTIONS]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes, its two grids apart."""
    folder = tmp_path_factory.mktemp("alone")
    draw(*command, "--outdir", folder)
    files = read(folder)
    assert {name for name in files if "grid" in name} == {"grid-0000.png", "grid-0001.png"}
    files = {name: data for name, data in files.items() if "grid" not in name}
    assert sorted(files) == [f"samples/{i:05}.png" for i in range(24)]
    return files


@pytest.fixture
def few(tiny_model_folder, tmp_path) -> Callable:
    """`few("--seed", 3)` draws two pictures into `tmp_path`; what is there then."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")

    def run(*words: object, **process: int) -> dict[str, bytes]:
        common = ["--from-file", tmp_path / "prompts.txt", "--model", tiny_model_folder]
        common += ["--dtype", "fp32"]
        draw(*common, "--steps", 1, "--outdir", tmp_path / "out", *words, **process)
        return read(tmp_path / "out")

    return run


def launch(launcher: str, words: list[str]) -> subprocess.Popen:
    """Two processes, whose lines open with which of them it was."""
    module, *options = LAUNCHERS[launcher]
    script = [str(ROOT / "scripts" / "txt2img.py"), *words, "--device", "cpu"]
    threads = str(torch.get_num_threads())  # another number may add up in another order
    return subprocess.Popen(
        [sys.executable, "-m", module, *options, "--tee", "3", *script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
    )


def test_two_processes_are_killed_and_started_again(alone, command, tmp_path):
    words = [*command, "--outdir", str(tmp_path)]
    process = launch("torchrun", words)
    while len(list((tmp_path / "samples").glob("[0-9]*"))) < 7:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert sum(words[0] in child.cmdline() for child in children) == 2
    for child in [process, *children]:
        child.kill()
    process.communicate()
    psutil.wait_procs(children)
    there = {f"samples/{file.name}" for file in (tmp_path / "samples").glob("[0-9]*")}
    assert 7 <= len(there) < 24
    assert all(read(tmp_path)[name] == alone[name] for name in there)

    process = launch("accelerate", words)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert read(tmp_path) == alone
    assert "[default0]:" in said and "[default1]:" in said
    assert f"{len(there)} of 24 pictures are there already; no grid" in said
    assert said.count("  seed ") == 24 - len(there)


@pytest.mark.parametrize("world", [2, 12])
def test_processes_at_different_times(alone, command, tmp_path, world):
    for rank in reversed(range(world)):
        draw(*command, "--outdir", tmp_path, rank=rank, world=world)
    assert read(tmp_path) == alone


def test_what_is_there_is_left_alone(alone, command, tmp_path, capsys):
    samples = tmp_path / "samples"
    samples.mkdir()
    kept = [0, 1, 2, 4, 13, 23]  # a whole batch, and parts of others
    for i in kept:
        (samples / f"{i:05}.png").write_bytes(alone[f"samples/{i:05}.png"])
    times = {file: file.stat().st_mtime_ns for file in samples.iterdir()}
    (samples / ".00003.123.png").write_bytes(b"half of a picture")
    draw(*command, "--outdir", tmp_path)
    assert read(tmp_path) == alone
    assert {file: file.stat().st_mtime_ns for file in times} == times
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("6 of 24 pictures are there already")
    assert [int(Path(line.split()[0]).stem) for line in lines] == sorted({*range(24)} - {*kept})


CHANGES = {
    "seed": ["--seed", 43],
    "negative": ["--negative_prompt", "grey"],
    "steps": ["--steps", 2],
    "guidance": ["--scale", 2],
    "sampler": ["--sampler", "euler"],
    "dtype": ["--dtype", "bf16"],
    "prompts": ["--prompt", "c"],
    "variation": ["--variation_seed", 1, "--variation_strength", 0.1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_loses_nothing(few, capsys, change):
    once = few("--skip_grid")
    both = few("--skip_grid", *CHANGES[change])
    new = 3 if change == "prompts" else 2
    assert both.items() > once.items() and len(both) == 2 + new
    assert few("--skip_grid", *CHANGES[change]) == few("--skip_grid") == both
    said = capsys.readouterr().out.splitlines()[2 + new :]
    assert said == [f"{n} of {n} pictures are there already" for n in (new, 2)]


def test_another_model_is_another_run(few, tiny_model_folder, tmp_path):
    from ldm.pipeline import LatentDiffusionPipeline

    once = few("--skip_grid")
    other = LatentDiffusionPipeline.from_pretrained(tiny_model_folder)
    other.unet.conv_in.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    words = ["--skip_grid", "--model", tmp_path / "other"]
    assert few(*words).items() > once.items() and len(few(*words)) == 4


def test_more_prompts_continue(few, tmp_path):
    once = few("--skip_grid")
    (tmp_path / "prompts.txt").write_text("# now three\na\nb\nc\n")
    assert few("--skip_grid").items() > once.items()
    assert read_settings(tmp_path / "out" / "samples" / "00002.png").prompt == "c"


def test_own_default_is_no_other_setting(few, tiny_pipeline):
    once = few("--skip_grid")
    assert few("--skip_grid", "--scale", tiny_pipeline.defaults["guidance_scale"]) == once


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_other_formats_continue(few, tmp_path, ending):
    words = ["--format", ending, "--skip_grid"]
    whole = few(*words)
    (tmp_path / "out" / "samples" / f"00001.{ending}").unlink()
    assert few(*words) == few(*words, rank=1, world=2) == whole
    assert len(few("--skip_grid")) == 4  # PNGs, which have numbers of their own


def test_without_metadata_nothing_is_recognised(few):
    words = ["--no_metadata", "--skip_grid"]
    assert few(*words).items() < few(*words).items()


def test_a_long_jpeg_prompt(few, tmp_path):
    (tmp_path / "prompts.txt").write_text("a " * 20000)
    words = ["--format", "jpg", "--skip_grid"]
    assert few(*words) == few(*words) and len(few(*words)) == 1


@pytest.mark.parametrize(
    ("there", "first", "places"),
    [
        ("", 0, ""),
        ("a", 0, "0"),
        ("ab", 0, "01"),
        ("-b", 0, "1"),
        ("abc", 0, "012"),
        ("b", 1, ""),
        ("xy", 2, ""),
        ("x-", 1, ""),
        ("xab", 1, "01"),
        ("xa-x", 4, ""),
        ("axc", 3, ""),
        ("-x", 2, ""),
        ("---x", 0, ""),
        ("abcx", 0, "012"),
        ("?", 1, ""),
        ("a?", 2, ""),
    ],
)
def test_where_a_run_begins(tmp_path, there, first, places):
    """The run draws a, b and c; what is there stands at its number, `-` is a gap, ? no picture."""
    for number, what in enumerate(there):
        if what == "?":
            (tmp_path / f"{number:05}.png").touch()
        elif what != "-":
            file = tmp_path / f"{number:05}.png"
            save_picture(Image.new("RGB", (8, 8)), file, "x", {"identity": what})
            assert read_identity(file) == what
    assert first_number(tmp_path, ".png", "abc") == (first, set(map(int, places)))


def test_a_name_is_taken_meanwhile(tmp_path, monkeypatch):
    picture, file = Image.new("RGB", (8, 8)), tmp_path / "00000.png"
    save_picture(picture, file, "theirs", new=True)
    theirs = file.read_bytes()
    for links in (True, False):
        with pytest.raises(DataError, match="cannot write .*00000.png .File exists"):
            save_picture(picture, file, "ours", new=True)
        assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == theirs
        if links:  # and on a file system that has none
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    save_picture(picture, tmp_path / "00001.png", "ours", new=True)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", -1], "several processes would each choose a random seed"),
        (["--variation_strength", 0.2], "several processes would each choose a random seed"),
        (["--no_metadata"], "several processes cannot share no_metadata"),
        (["--skip_save"], "several processes cannot share skip_save"),
    ],
)
def test_what_processes_cannot_share(few, tmp_path, words, line):
    with pytest.raises(ConfigError, match=line):
        few(*words, world=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gpus", "found"), [(8, "cuda:5"), (4, "cuda:1"), (0, "cpu")])
def test_a_gpu_each(monkeypatch, gpus, found):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(0))
    assert find_device(None) == found
    assert find_device("cpu") == "cpu" and find_device("cuda:2") == "cuda:2"
