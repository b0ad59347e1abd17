"""The doctor does what a run does, small, says what is true of it, and leaves nothing behind."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from train_helpers import ROOT, make_config, metrics, own_processes, run

from ldm.training.data import open_data
from ldm.training.doctor import Report, examine


@pytest.fixture(scope="module")
def examined(pictures, tiny_model_folder, tmp_path_factory) -> tuple[Report, Path]:
    """A U-Net's run over pictures of which two are bad and one has a long caption."""
    folder = tmp_path_factory.mktemp("doctor")
    for file in pictures.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:20])
    (folder / "07.txt").write_text("a red rose " * 60)
    output = folder / "outputs" / "run"
    options = {
        "train_data_dir": str(folder), "pretrained_model_name_or_path": str(tiny_model_folder),
        "unet": None, "output_dir": str(output), "max_train_steps": 1000, "resolution": 64,
        "on_bad_sample": "skip", "checkpointing_steps": 250, "validation_split": 0,
    }  # fmt: skip
    config = make_config("unet", **options)
    with own_processes():
        report = examine("unet", config, open_data(config))
    assert list(output.parent.iterdir()) == []  # nothing is left
    return report, output


def test_what_the_headers_tell(examined):
    lines = "\n".join(examined[0].lines)
    assert "headers of 24 of 24 samples read, 2 bad\nthe first bad one: " in lines
    assert "03.png" in lines
    assert "pictures' shorter sides: 32 to 32 px" in lines
    assert re.search(r"captions: \d{3} tokens at most, 1 over 77, 0 empty", lines)


def test_what_was_done_and_how_long_it_takes(examined):
    report, _ = examined
    lines = "\n".join(report.lines)
    seconds, rate, share = re.search(  # type: ignore[union-attr]
        r"step: (\S+) s for 4 pictures, (\S+) images/s, (\d+)% of it waiting", lines
    ).groups()
    assert float(rate) == pytest.approx(4 / float(seconds), rel=0.02) and 0 <= int(share) <= 100
    assert re.search(r"U-Net: \S+ GFLOP a picture", lines)
    for word in ("validation: ", "checkpoint: ", "peak memory: ", "disk: "):
        assert word in lines
    epochs = re.search(r"to finish 1000 steps: \S+ h; every sample is seen (\S+) times", lines)
    assert epochs and float(epochs[1]) == pytest.approx(1000 * 4 / 24, rel=0.01)


def test_advice(examined):
    advice = "\n".join(examined[0].advice)
    assert "8.3% of the samples are bad: mend them" in advice
    assert "100% of the pictures are smaller than 64 px" in advice
    assert "4.5% of the captions have more than 77 tokens" in advice
    assert "--cache_latents true" in advice


def test_two_processes(pictures, tmp_path):
    """Started by torchrun, with an all-reduce; one of them speaks, and nothing is left."""
    options = {
        "train_data_dir": str(pictures), "resolution": 32, "train_batch_size": 4,
        "output_dir": str(tmp_path / "out" / "run"), "validation_split": 0.3,
        "vae": {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(options))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "scripts/doctor.py", "vae", "--config", str(tmp_path / "run.yaml"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert re.search(r"all-reduce of all gradients: \d+ ms over 2 processes", done.stdout)
    assert done.stdout.count("peak memory") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_rates_are_of_all_steps_since_the_last_line(pictures, tmp_path):
    """What the log and the doctor call waiting for data is a share."""
    options = {"train_data_dir": str(pictures), "max_train_steps": 10, "logging_steps": 5}
    output = run("vae", **options, output_dir=tmp_path / "run")
    assert len([row for row in metrics(output) if "loss" in row]) == 10
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    assert len(waits) == 2 and all(0 < wait < 1 for wait in waits)
