"""Count what a data set holds: `python scripts/prepare_data.py FOLDER`.

Writes FOLDER/index.json, which says how many samples each tar below FOLDER has. Shards that are
streamed need it beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run


def main(arguments: Sequence[str]) -> None:
    parser = Parser("prepare_data.py", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the tars lie")
    folder = parser.parse_args(arguments).folder

    from ldm.data.streams import write_index

    samples, bad = write_index(folder)
    print(*bad, f"{folder / 'index.json'}  {samples} samples", sep="\n")


if __name__ == "__main__":
    run(main)
