"""Count what a data set holds: `python scripts/prepare_data.py index FOLDER`.

Writes FOLDER/index.json, which says how many samples each tar below FOLDER has. Shards that are
streamed need it beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.errors import DataError


def main(arguments: Sequence[str]) -> None:
    parser = Parser("prepare_data.py", description=__doc__)
    parser.add_argument("command", choices=["index"], help="the only one there is")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the tars lie")
    folder = parser.parse_args(arguments).folder
    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise DataError(f"{folder}: no tars there; give the folder of the shards")

    from ldm.checkpoint.io import atomic_file, write_json
    from ldm.data.shards import index_tar

    shards = {}
    for tar in tars:
        with tar.open("rb") as file:
            entries, damage = index_tar(file)
        if damage:
            raise DataError(f"{tar}: {damage}")
        bad = [entry for entry in entries if entry.problem]
        if bad:
            print(f"{tar}: {len(bad)} bad samples; the first is {bad[0].key}: {bad[0].problem}")
        name = tar.relative_to(folder).as_posix()
        shards[name] = {"samples": len(entries), "size": tar.stat().st_size}
    with atomic_file(folder / "index.json") as file:
        write_json(file, {"shards": shards})
    print(f"{folder / 'index.json'}  {sum(row['samples'] for row in shards.values())} samples")


if __name__ == "__main__":
    run(main)
