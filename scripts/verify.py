"""Make a picture again and say whether it is the same: `python scripts/verify.py 00000.png`.

Prints one line: identical, within tolerance, or what differs. Exit code 0 for the first two, 1
for the last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.verify import verify


def main(arguments: Sequence[str]) -> None:
    parser = Parser("verify.py", description=__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="PICTURE", help="a PNG that ldm has written")
    for name in ("model", "config", "image", "mask_image"):
        add(f"--{name}", metavar="PATH", help="where it is now, if it was moved")
    for name in ("lora", "textual_inversion"):
        add(f"--{name}", action="append", metavar="FILE", help="likewise; all of them, in order")
    add("--device", help="the one of then, if there is one")
    options = vars(parser.parse_args(arguments))
    same, line = verify(options.pop("file"), options)
    print(line)
    sys.exit(not same)


if __name__ == "__main__":
    run(main)
