"""Train a stage.

    accelerate launch scripts/train.py [vae|clip|unet] [--config FILE] [--key value ...]

With nothing said it trains the U-Net of configs/flowers/unet.yaml, with the bundled VAE and CLIP.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import parse_config, run
from ldm.errors import ConfigError, suggest
from ldm.training.config import STAGES, TrainingConfig
from ldm.training.data import open_data

RECIPES = Path(__file__).parents[1] / "configs" / "flowers"


def read_options(arguments: Sequence[str], script: str) -> tuple[str, TrainingConfig]:
    """The stage and its options; `script` is the command, for the help."""
    stage, rest = "unet", list(arguments)
    if rest and not rest[0].startswith("-"):
        stage = rest.pop(0)
    if stage not in STAGES:
        raise ConfigError(f"no stage '{stage}'; {suggest(stage, STAGES)}")
    prog = f"{script} {stage}"
    return stage, parse_config(STAGES[stage], rest, prog, RECIPES / f"{stage}.yaml")


def main(arguments: Sequence[str]) -> None:
    faulthandler.enable()  # a crash in native code, hours from now, tells where it was
    stage, config = read_options(arguments, "train.py")
    sources = open_data(config)

    from ldm.training.loop import train

    train(stage, config, sources)


if __name__ == "__main__":
    run(main)
