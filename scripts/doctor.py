"""Look at a training run before it begins: does everything work, how long will it take?

    [accelerate launch] scripts/doctor.py [vae|clip|unet] [--config FILE] [--key value ...]

Takes the options of scripts/train.py, does everything once and small, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import _ours  # noqa: F401
from train import read_options

from ldm.cli import run
from ldm.training.data import open_data


def main(arguments: Sequence[str]) -> None:
    stage, config = read_options(arguments, "doctor.py")
    sources = open_data(config)

    from ldm.training.doctor import examine
    from ldm.training.state import is_main_process

    report = examine(stage, config, sources)
    if is_main_process():
        print("\n".join(report.lines))
        print("\n".join(f"advice: {line}" for line in report.advice) or "nothing to change")


if __name__ == "__main__":
    run(main)
