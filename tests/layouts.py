"""Small data sets in every layout, for the tests that read them back."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.sample import DataSource
from ldm.errors import DataError


def pixels(number: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, side)).save(buffer, "png")
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def member(name: str, size: int = 0, **header) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in header.items():
        setattr(info, key, value)
    return info


def tar(
    path: Path, members: list[tuple[str | tarfile.TarInfo, bytes | str]], mode: str = "w"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = name if isinstance(name, tarfile.TarInfo) else member(name, len(data))
            file.addfile(info, io.BytesIO(data))
    return path


def parquet(path: Path, columns: dict[str, list], **types) -> Path:
    """A parquet file; `types` are Arrow's, of columns that do not speak for themselves."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(cells, types.get(name)) for name, cells in columns.items()})
    write_table(table, path)
    return path


def metadata(root: Path, *rows: dict | str | bytes) -> None:
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    write(root / "metadata.jsonl", b"\n".join(data) + b"\n")


def error(call, *parts: str) -> str:
    """What `call` raises is one line with all of these in it."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def check(source: DataSource, expected: list[tuple[str, str, int]]) -> None:
    """Keys, captions and the number of the pixels, read backwards to show random access."""
    assert len(source) == len(expected)
    for index in reversed(range(len(expected))):
        key, caption, number = expected[index]
        sample = source[index]
        assert (sample.key, source.key(index), sample.caption) == (key, key, caption)
        assert source.caption(index) == caption and source.size(index) == (8, 8)
        np.testing.assert_array_equal(np.asarray(sample.image), pixels(number))
