"""A process that dies at any moment costs the steps since the last checkpoint, and nothing else."""

import mmap
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import GAN, before_file_operations, digest, exit_code, fork, in_new_process
from train_helpers import VAE, assert_same_run, make_config, own_processes, prepared_run

from ldm.checkpoint.io import recover, verify
from ldm.training import loop
from ldm.training.state import TrainingState, checkpoints, find_checkpoint, publish

pytestmark = pytest.mark.crash
KILLS, IN_A_SAVE = 15, 5  # of each of two stages


def test_death_at_every_file_operation_of_a_save(pictures, tmp_path):
    """Before and after each: writing, flushing, renaming, pruning, publishing."""
    options = GAN | {
        "train_data_dir": str(pictures), "disc_start": 0, "max_train_samples": 4,
        "vae": replace(VAE, block_out_channels=(8,), norm_num_groups=4),
    }  # fmt: skip
    moments = in_new_process(_die_at_every_operation, options, tmp_path)
    for operation in (
        "serialize_file",
        "fsync",
        "rename",
        "rmdir",
        "unlink",
        "sendfile",
        "mkdir",
        "open",
    ):
        assert operation in moments
    print(len(moments), "moments")


def _die_at_every_operation(options: dict[str, Any], folder: Path) -> list[str]:
    """Train, save at steps 1 and 2 and publish; from there, save step 3 and publish, dying."""
    before, output = folder / "before", folder / "output"
    with own_processes():
        run = prepared_run("vae", output_dir=str(before), **options)
        reader = prepared_run("vae", output_dir=str(output), **options).state
        state, digests = run.state, {}
        with run.loader() as loader:
            for step in (1, 2, 3):
                run.update([next(loader)])
                digests[f"checkpoint-{step}"] = digest(state)
                if step < 3:
                    newest = state.save()
                    (newest / "model_index.json").write_text(f'{{"step": {step}}}')
        publish(newest, before)
    state.config = reader.config  # the folder

    def save_and_publish() -> None:
        newest = state.save()
        (newest / "model_index.json").write_text('{"step": 3}')
        publish(newest, output)

    shutil.copytree(before, output)
    moments: list[str] = []
    with before_file_operations(lambda _, what: moments.append(what)):
        save_and_publish()
    done = _contents(output)
    seen = []

    def die_at(k: int) -> None:
        with before_file_operations(lambda moment, _: os._exit(9) if moment == k else None):
            save_and_publish()

    for k in range(len(moments)):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        child = fork(lambda k=k: die_at(k))
        assert exit_code(child) == 9, moments[k]
        for left in output.glob(".*"):  # another process may have the number of the dead one
            left.rename(left.with_name(left.name.replace(f".{child}-", f".{os.getppid()}-")))
        recover(output, alone=True)
        found = find_checkpoint("latest", output)
        assert found, moments[k]
        assert not list(output.glob(".*")), (k, moments[k])
        for checkpoint in checkpoints(output):
            verify(checkpoint)
        reader.load(found)
        assert digest(reader) == digests[found.name], moments[k]
        seen.append(found.name)
        # The published model is the old one or the new one, file by file, and can be made whole.
        published, old = _contents(output, "checkpoint-*"), _contents(before, "checkpoint-*")
        for file in old:
            assert published[file] in (old[file], done[file]), (k, moments[k], file)
        if found.name == "checkpoint-3":
            (found / "model_index.json").write_text('{"step": 3}')
            publish(found, output)
            assert _contents(output, "checkpoint-*") == {k: done[k] for k in old}
    # The old one until the rename, the new one ever after.
    first = seen.index("checkpoint-3")
    assert moments[first - 1] == "rename" and first > 50
    assert set(seen[:first]) == {"checkpoint-2"} and set(seen[first:]) == {"checkpoint-3"}
    return moments


def _contents(folder: Path, but: str = "nothing") -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.relative_to(folder).parts[0].startswith(but.rstrip("*"))
    }


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_killed_at_random_moments(killed, stage):
    """Again and again, until the run ends with the bits of the undisturbed one."""
    kills = killed[stage]
    print(len(kills), "kills,", sum(kills), "inside of a save")
    assert len(kills) >= KILLS and sum(kills) >= IN_A_SAVE


@pytest.fixture(scope="module")
def killed(pictures, tiny_model_folder, tmp_path_factory) -> dict[str, list[bool]]:
    """Of each stage's kills, whether they were inside of a save."""
    folder = tmp_path_factory.mktemp("killed")
    unet = {"pretrained_model_name_or_path": str(tiny_model_folder), "unet": None}
    plans = {"vae": GAN, "unet": {k: v for k, v in GAN.items() if k != "disc_start"} | unet}
    with ThreadPoolExecutor(2) as threads:
        kills = {
            stage: threads.submit(
                in_new_process, _kill_at_random_moments, stage,
                options | {"train_data_dir": str(pictures)}, folder / stage,
            )
            for stage, options in plans.items()
        }  # fmt: skip
        return {stage: future.result() for stage, future in kills.items()}


def _kill_at_random_moments(stage: str, options: dict[str, Any], folder: Path) -> list[bool]:
    if stage == "unet":
        import open_clip  # noqa: F401  once, before the forks
        import transformers  # noqa: F401
    rng = random.Random(stage)
    saving = mmap.mmap(-1, 1)  # shared with the children: whether one is saving
    save = TrainingState.save
    folder.mkdir()

    def marked_save(self: TrainingState) -> Path:
        saving[0] = 1
        try:
            return save(self)
        finally:
            saving[0] = 0

    TrainingState.save = marked_save  # type: ignore[method-assign]

    def start(output: Path) -> int:
        config = make_config(
            stage, **options, output_dir=str(output), resume_from_checkpoint="latest",
            dataloader_num_workers=rng.choice([0, 2]),
        )  # fmt: skip
        return fork(lambda: loop.train(stage, config), folder / "errors")

    def ended(child: int) -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    child, began, saved = start(folder / "whole"), time.monotonic(), 0.0
    while not ended(child):
        before = time.monotonic()
        time.sleep(0.001)
        saved += saving[0] * (time.monotonic() - before)
    duration = time.monotonic() - began
    assert exit_code(child) == 0, (folder / "errors").read_text()
    a_save = saved / (options["max_train_steps"] / options["checkpointing_steps"])

    kills: list[bool] = []
    runs, whole = 0, False
    while len(kills) < KILLS or sum(kills) < IN_A_SAVE or not whole:
        child = start(output := folder / f"killed-{runs}")
        if len(kills) < KILLS or sum(kills) < IN_A_SAVE:
            if len(kills) % 2:
                time.sleep(rng.uniform(0, duration))
            else:
                while not (saving[0] or ended(child)):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.6 * a_save))
            os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        if whole := code == 0:
            assert_same_run(output, folder / "whole", options["max_train_steps"])
            assert not list(output.glob(".checkpoint*"))
            runs += 1
        else:
            assert code == -signal.SIGKILL, (folder / "errors").read_text()
            kills.append(bool(saving[0]))
            saving[0] = 0
    return kills
