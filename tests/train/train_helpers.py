"""Tiny runs of every stage, and a program that runs some of them in processes it can kill.

python train_helpers.py '[["unet", {"output_dir": ...}, {"kill_at": 23}], ...]'
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from ldm.checkpoint.io import tensors_sha256
from ldm.config import AutoencoderConfig, ClipConfig, TowerConfig, UNetConfig
from ldm.training.config import STAGES

ROOT = Path(__file__).parents[2]
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention=(False, True),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
VAE = AutoencoderConfig(
    block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=32
)
CLIP = ClipConfig(
    text=TowerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    vision=TowerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    vocab_size=1000,
    projection_dim=32,
    image_size=32,
)
COMMON = {
    "resolution": 32,
    "train_batch_size": 4,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 5,
    "validation_split": 0.3,
    "validation_samples": 6,
    "validation_steps": 1000,
    "checkpointing_steps": 1000,
    "logging_steps": 1,
    "report_to": None,
}
OWN = {
    "unet": {
        "unet": UNET,
        "validation_prompts": ("a red rose",),
        "num_validation_images": 1,
        "num_inference_steps": 2,
    },
    "vae": {"vae": VAE},
    "clip": {"clip": CLIP},
}


def make_config(stage: str, **options: Any) -> Any:
    """A run of a few steps; paths may be strings."""
    options = COMMON | OWN[stage] | options
    return STAGES[stage](**options | {"output_dir": Path(options["output_dir"])})


def run(stage: str, **options: Any) -> Path:
    """Train in this process; its output folder."""
    from ldm.training.loop import train

    with own_processes():
        return train(stage, make_config(stage, **options))


@contextmanager
def own_processes() -> Iterator[None]:
    """Accelerate starts anew inside, and leaves nothing behind."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def prepared_run(stage: str, **options: Any) -> Any:
    """A run that is ready for its first step; inside `own_processes`."""
    from ldm.training.data import open_data
    from ldm.training.loop import Run

    config = make_stage_config(stage, options)
    made = Run(stage, config, *open_data(config))
    made.prepare()
    return made


def prepared(stage: str, **options: Any) -> tuple[Any, Any, Any]:
    """A stage that is ready for its first step, with its training and validation data."""
    from ldm.training.data import open_data
    from ldm.training.loop import make_stage

    config = make_stage_config(stage, options)
    data, validation = open_data(config)
    maker = make_stage(stage, config)
    maker.setup(data, validation, torch.device("cpu"))
    return maker, data, validation


def make_stage_config(stage: str, options: dict[str, Any]) -> Any:
    return make_config(stage, **{"output_dir": "unused"} | options)


def first_batch(stage: Any, data: Any, *, step: int = 0) -> dict[str, Any]:
    """The global batch of an optimizer step, as the loop collates it."""
    from ldm.training.data import make_order

    items = stage.dataset(data, validation=False)
    return default_collate([items[place] for place in make_order(data, stage.config).batch(step)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


CLOCK = {"images_per_second", "data_wait"}


def metrics(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Bit for bit: weights, averages, moments, log and sample grids."""
    a, b = (weights(output / f"checkpoint-{step}") for output in (one, other))
    assert sorted(a) == sorted(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metrics(one) == metrics(other)
    for grid in sorted((one / "samples").iterdir()):
        assert Image.open(grid).tobytes() == Image.open(other / "samples" / grid.name).tobytes()


def run_all(plan: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    """Train every entry of a plan in a process of its own, all forked from one new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, json.dumps(plan, default=str)]
    assert subprocess.run(command, env=environment).returncode == 0


def _fork(stage: str, options: dict[str, Any], how: dict[str, Any], place: dict[str, str]) -> int:
    """A child process that trains.

    Args:
        how: `kill_at`, after whose logging it kills itself; `double`, to compute in float64;
            `record`, a file that gets a line for every sample read and every step done;
            `infinite_at`, the step at which the last rank's loss, not its gradient, is infinite.
        place: environment of its rank.
    """
    from ldm.training import log, loop

    if child := os.fork():
        return child
    os.environ.update(place)
    log_step = log.Log.step

    def step(self: Any, number: int, *rest: Any) -> None:
        log_step(self, number, *rest)
        self.flush()
        if number == how.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    log.Log.step = step  # type: ignore[method-assign]
    if how.get("double"):
        _compute_in_double()
    if file := how.get("record"):
        _record(Path(file))
    if "infinite_at" in how and int(place.get("RANK", 0)) == how["world"] - 1:
        _spoil_loss(how["infinite_at"])
    try:
        loop.train(stage, make_config(stage, **options))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _compute_in_double() -> None:
    from ldm.training import loop, samples

    make_stage, read = loop.make_stage, samples.Samples.read

    def make_double(name: str, config: Any) -> Any:
        stage = make_stage(name, config)
        for module in (stage.players | stage.frozen()).values():
            module.double()
        return stage

    def read_double(self: Any, place: Any) -> dict[str, Any]:
        item = read(self, place)
        floating = {k: v for k, v in item.items() if getattr(v, "dtype", None) == torch.float32}
        return item | {k: v.double() for k, v in floating.items()}

    loop.make_stage, samples.Samples.read = make_double, read_double  # type: ignore


def _spoil_loss(step: int) -> None:
    from ldm.training.vae import VaeStage

    loss = VaeStage.loss

    def spoilt(self: Any, player: str, batch: Any, now: int) -> dict[str, torch.Tensor]:
        figures = loss(self, player, batch, now)
        return figures | ({"loss": figures["loss"] + float("inf")} if now == step else {})

    VaeStage.loss = spoilt  # type: ignore[method-assign]


def _record(file: Path) -> None:
    """Every sample by step and slot with a digest of all that its item holds; every step's rate."""
    from ldm.training import loop, samples

    read, update = samples.Samples.read, loop.Run.update

    def write(**row: Any) -> None:
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def read_and_tell(self: Any, place: Any) -> Any:
        item = read(self, place)
        if not self.items.validation:
            digests = {
                key: value if isinstance(value, (int, str)) else tensors_sha256({key: value})
                for key, value in item.items()
            }
            where = {"step": place.step, "slot": place.slot}
            write(**where, index=place.index, visit=place.visit, **digests)
        return item

    def update_and_tell(self: Any, batches: Any) -> Any:
        step, figures = self.state.step, update(self, batches)
        rates = [g["lr"] for o in self.state.optimizers.values() for g in o.param_groups]
        write(step=step, slot=-1, rates=rates, world=self.accelerator.num_processes)
        return figures

    samples.Samples.read, loop.Run.update = read_and_tell, update_and_tell  # type: ignore


def _main(plan: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    faulthandler.enable()
    import open_clip  # noqa: F401  imported once, before the forks
    import transformers  # noqa: F401

    for stage, options, how in plan:
        world = how.get("world", 1)
        places: list[dict[str, str]] = [{}]
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
            shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(world)}
            places = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        children = [_fork(stage, options, how, place) for place in places]
        for child in children:
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed if "kill_at" in how else status == 0, (stage, options, how, status)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
