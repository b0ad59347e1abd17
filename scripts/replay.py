"""Look into a training step whose loss or gradient was not finite.

    python scripts/replay.py OUTPUT_DIR/capsules/step-0000123.json

Trains again from the checkpoint before the step, does the step itself in float32, and names the
first module and the samples that are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run


def main(arguments: Sequence[str]) -> None:
    parser = Parser("replay.py", description="Look into a training step that was not finite.")
    parser.add_argument("capsule", type=Path, help="a file of OUTPUT_DIR/capsules")
    capsule = parser.parse_args(arguments).capsule

    from ldm.training.replay import replay

    for line in replay(capsule):
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
