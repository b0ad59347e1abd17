"""The same run, whole or in pieces, on one process or two, gives the same model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_helpers import OWN, ROOT, assert_same_run, metrics, run_all, weights

OPTIONS = {
    "max_train_steps": 40,
    "checkpointing_steps": 10,
    "validation_steps": 20,
    "use_ema": True,
    "lr_scheduler": "cosine",
}
RESUME = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, pictures: Path) -> dict[str, object]:
    return OPTIONS | {
        "pretrained_model_name_or_path": str(tiny_model_folder),
        "train_data_dir": str(pictures),
        "random_flip": True,
    }


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """Undisturbed runs, and the same killed right after step 23: cached or not, with or without
    loader workers."""
    folder = tmp_path_factory.mktemp("runs")
    plan = []
    for cached in (False, True):
        own = {"cache_latents": cached, "random_flip": not cached}
        plan.append(("unet", _unet(base, folder / f"whole-{cached}", **own), {}))
        for workers in (0, 2):
            options = _unet(base, folder / f"{cached}-{workers}", **own)
            options["dataloader_num_workers"] = workers
            plan.append(("unet", options, {"kill_at": 23}))
            plan.append(("unet", options | RESUME, {}))
    run_all(plan)
    return folder


def _unet(base, output, **options):
    """Options that JSON can carry: the U-Net is the tiny model's own."""
    return base | {"output_dir": str(output), "unet": None} | options


def test_killed_script_resumes_bit_for_bit(base, runs, tmp_path):
    """scripts/train.py, two loader workers, SIGKILL when metrics.jsonl shows step 23."""
    output, whole = tmp_path / "run", runs / "whole-False"
    options = _unet(base, output, dataloader_num_workers=2) | {
        k: v for k, v in OWN["unet"].items() if k != "unet"
    }
    settings = {
        "resolution": 32, "train_batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 5,
        "validation_split": 0.3, "validation_samples": 6, "logging_steps": 1, "report_to": "none",
    } | options  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML, too
    command = [sys.executable, "scripts/train.py", "unet", "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A long sample grid at step 24, so that the run cannot end before the kill. What a grid draws
    # changes nothing of what is learnt.
    pause = ["--validation_steps", "24", "--num_inference_steps", "900"]
    process = subprocess.Popen(command + pause, cwd=ROOT, env=environment)
    log, deadline = output / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 23,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert max(int(f.name.split("-")[1]) for f in output.glob("checkpoint-*")) == 20
    with log.open("a") as stream:
        stream.write('{"step": 24, "lo')  # as a kill in the middle of writing leaves it
    (output / ".checkpoint-30.9999999-0123abcd.tmp").mkdir()

    resumed = subprocess.run(
        [*command, "--resume_from_checkpoint", "latest"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"resumed from {output / 'checkpoint-20'}" in resumed.stdout
    assert not list(output.glob(".checkpoint-*"))
    # The killed run had no validation at step 20: the rest of the log is the same.
    rows = [row for row in metrics(whole) if row["step"] != 20 or "loss" in row]
    assert metrics(output) == rows
    ours, theirs = weights(output / "checkpoint-40"), weights(whole / "checkpoint-40")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_resume_bit_for_bit(runs, cached, workers):
    assert_same_run(runs / f"{cached}-{workers}", runs / f"whole-{cached}", 40)


def test_the_comparison_can_fail(runs):
    """Other steps have other weights; unflipped pictures have other losses."""
    whole = runs / "whole-False"
    a, b = weights(whole / "checkpoint-30"), weights(whole / "checkpoint-40")
    trained = [name for name in a if "training_state" in name]
    assert trained and not any(torch.equal(a[n], b[n]) for n in trained if ".step" not in n)
    assert metrics(whole) != metrics(runs / "whole-True")


def test_killed_gan_resumes_bit_for_bit(pictures, tmp_path):
    """The autoencoder against its discriminator, which joins between two checkpoints."""
    options = {
        "train_data_dir": str(pictures), "max_train_steps": 12, "checkpointing_steps": 4,
        "validation_steps": 6, "disc_start": 6, "kl_scale": 1e-4,
    }  # fmt: skip
    straight, pieces = (options | {"output_dir": str(tmp_path / n)} for n in ("whole", "pieces"))
    run_all([
        ("vae", straight, {}),
        ("vae", pieces, {"kill_at": 7}),  # resumed before the discriminator has joined
        ("vae", pieces | RESUME, {"kill_at": 11}),  # and after
        ("vae", pieces | RESUME, {}),
    ])  # fmt: skip
    assert_same_run(tmp_path / "pieces", tmp_path / "whole", 12)
    state = "training_state/discriminator.optimizer.safetensors"
    assert not _moments(tmp_path / "whole" / "checkpoint-4" / state)
    assert _moments(tmp_path / "whole" / "checkpoint-12" / state)


def _moments(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
