"""Tiny runs of every stage, and a program that runs some of them in processes it can kill.

python train_helpers.py '[["unet", {"output_dir": ...}, {"kill_at": 23}], ...]'
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

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
    from accelerate.state import AcceleratorState

    from ldm.training.loop import train

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return train(stage, make_config(stage, **options))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def prepared(stage: str, **options: Any) -> tuple[Any, Any, Any]:
    """A stage that is ready for its first step, with its training and validation data."""
    from ldm.training.loop import make_stage, open_data

    config = make_stage_config(stage, options)
    data, validation = open_data(config)
    maker = make_stage(stage, config)
    maker.setup(data, validation, torch.device("cpu"))
    return maker, data, validation


def make_stage_config(stage: str, options: dict[str, Any]) -> Any:
    return make_config(stage, **{"output_dir": "unused"} | options)


def first_batch(stage: Any, data: Any, *, step: int = 0) -> dict[str, Any]:
    """The global batch of an optimizer step, as the loop collates it."""
    from ldm.data.order import positions

    config = stage.config
    visits = positions(config.seed, step, config.train_batch_size, len(data))
    items = stage.dataset(data, validation=False)
    return default_collate([items[visit] for visit in visits])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def metrics(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Bit for bit: weights, averages, moments, log and sample grids."""
    a, b = (weights(output / f"checkpoint-{step}") for output in (one, other))
    assert sorted(a) == sorted(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metrics(one) == metrics(other)
    for grid in sorted((one / "samples").iterdir()):
        assert Image.open(grid).tobytes() == Image.open(other / "samples" / grid.name).tobytes()


def run_all(plan: list[tuple[str, dict[str, Any], dict[str, int]]]) -> None:
    """Train every entry of a plan in a process of its own, all forked from one new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, __file__, json.dumps(plan, default=str)], env=environment, check=True
    )


def _fork(stage: str, options: dict[str, Any], kill_at: int | None, place: dict[str, str]) -> int:
    """A child process that trains; it kills itself as soon as it has logged step `kill_at`."""
    from ldm.training import loop

    if child := os.fork():
        return child
    os.environ.update(place)
    log_step = loop._Log.step

    def step(self: Any, number: int, *rest: Any) -> None:
        log_step(self, number, *rest)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._Log.step = step  # type: ignore[method-assign]
    try:
        loop.train(stage, make_config(stage, **options))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _main(plan: list[tuple[str, dict[str, Any], dict[str, int]]]) -> None:
    import open_clip  # noqa: F401  imported once, before the forks
    import transformers  # noqa: F401

    for stage, options, how in plan:
        world, kill_at = how.get("world", 1), how.get("kill_at")
        places: list[dict[str, str]] = [{}]
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
            shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(world)}
            places = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        children = [_fork(stage, options, kill_at, place) for place in places]
        for child in children:
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed if kill_at else status == 0, (stage, options, how, status)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
