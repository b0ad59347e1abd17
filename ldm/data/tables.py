"""Tables with a column of pictures: parquet files, and data sets of the Hugging Face hub.

`datasets` lays them out once as Arrow files in its cache, where any row is a seek away. Pictures
stay bytes there; our own decoder reads them. No code of a data set is ever run.
"""

from __future__ import annotations

import bisect
import io
import os
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ldm.data.shards import shard_stems
from ldm.data.stored import Reading, Stored, clean_caption, column_class, hashed, listed
from ldm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Stored):
    """Rows with a picture: bytes, or the hub's struct of bytes and path. Others are passed over.

    Args:
        dataset: what `datasets` loaded; nothing of it is decoded.
        parts: names of the files it was made of, and how many rows each has.
        reading: `image_column`, `caption_column`, `class_column` and `on_bad_sample` matter here.
        roots: rows may name pictures below these folders, in place of bytes.

    Raises:
        DataError: a column is missing or holds something else, or rows without captions.
    """

    def __init__(
        self,
        dataset: Dataset,
        parts: Sequence[tuple[str, int]],
        reading: Reading,
        roots: Sequence[str] = (),
    ):
        self.reading, self._table = reading, dataset.data
        self._roots = [Path(root).resolve() for root in roots]
        self._parts = [name for name, _ in parts]
        self._starts = list(accumulate((rows for _, rows in parts), initial=0))
        where, names, wanted = self._parts[0], dataset.column_names, reading.class_column
        # img2dataset's columns are accepted where the asked-for ones are not there.
        self._image = _choose("image", reading.image_column, names, where, "jpg", "png", "webp")
        self._words = _choose("caption", reading.caption_column, names, where, "caption")
        if wanted == "folder":
            raise DataError(f"{where}: has no folders; name a class_column of {listed(names)}")
        if wanted:
            _choose("class", wanted, names, where)
        sizes, paths, lengths = self._measure(where)

        def entry(row: int) -> tuple[int, list[int]]:
            """The row, with the sizes of its picture and its caption in bytes."""
            size, length = sizes[row], lengths[row]
            if length is None:
                raise DataError(f"{self._name(row)}: no text in the caption column {self._words!r}")
            if size is None:
                size = self._file(paths[row], row).stat().st_size
            return row, [size, length]

        rows = [row for row, size in enumerate(sizes) if size is not None or paths[row]]
        entries = self._gather(where, rows, entry)
        if not entries:
            raise DataError(f"{where}: no pictures in the column {self._image!r}")
        self._rows = [row for row, _ in entries]
        numbers = [size for _, pair in entries for size in pair]
        self.fingerprint = hashed([self._image, self._words], numbers)

    def _measure(self, where: str) -> tuple[list[Any], list[Any], list[Any]]:
        """Bytes of every row's picture, the file that it may name instead, and its caption's bytes.

        Raises:
            DataError: a column holds something else.
        """
        from pyarrow import compute, types

        pictures, words = self._table.column(self._image), self._table.column(self._words)
        fields = {"bytes": pictures}
        if types.is_struct(pictures.type):
            fields = dict(zip(pictures.type.names, pictures.flatten(), strict=True))
        data = fields.get("bytes")
        for name, column, kinds, what in (
            (self._image, data, ("binary", "large_binary"), "pictures"),
            (self._words, words, ("string", "large_string"), "text"),
        ):
            if column is None or str(column.type) not in kinds:
                kind = self._table.column(name).type
                raise DataError(f"{where}: the column {name!r} holds no {what} but {kind}")
        sizes, lengths = (
            compute.call_function("binary_length", [column]).to_pylist() for column in (data, words)
        )
        named = self._roots and "path" in fields
        return sizes, fields["path"].to_pylist() if named else [None] * len(sizes), lengths

    def _file(self, path: str | None, row: int) -> Path:
        """A picture that a row names, of the data set's own files."""
        file = Path(path or "")
        if not os.path.isfile(file) or not any(map(file.resolve().is_relative_to, self._roots)):
            raise DataError(f"{self._name(row)}: {path} is no file of the data set")
        return file

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._name(self._rows[index])

    def _name(self, row: int) -> str:
        part = bisect.bisect_right(self._starts, row) - 1
        return f"{self._parts[part]}/{row - self._starts[part]:06d}"

    def _cell(self, index: int, column: str) -> Any:
        return self._table.column(column)[self._rows[index]].as_py()

    def caption(self, index: int) -> str:
        try:
            return clean_caption(self._cell(index, self._words), self.key(index))
        except UnicodeDecodeError as error:  # parquet only says that it is UTF-8
            raise DataError(f"{self.key(index)}: the caption is not UTF-8 ({error})") from error

    def _class(self, index: int, column: str) -> int:
        return column_class({column: self._cell(index, column)}, column, self.key(index))

    def _open(self, index: int) -> IO[bytes]:
        cell = self._cell(index, self._image)
        data, path = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
        return self._file(path, self._rows[index]).open("rb") if data is None else io.BytesIO(data)


def open_parquet(files: Sequence[str], reading: Reading) -> Table:
    """The rows of parquet files, one file after the other.

    Args:
        files: sorted. Where some have the hub's names, such as `test-00000-of-00002.parquet`, only
            those of the training split are read.
        reading: see `Table`.

    Raises:
        DataError: `datasets` is missing, a file is damaged, or as for `Table`.
    """
    splits = {file: re.match(r"train|validation|test", Path(file).name) for file in files}
    if any(splits.values()):
        files = [file for file, split in splits.items() if split and split[0] == "train"]
    if not files:
        raise DataError(f"{next(iter(splits))}: there is no parquet file of the split train")
    load = _load_dataset()
    from pyarrow import ArrowException, parquet

    parts = []
    for file, name in zip(files, shard_stems(list(files)), strict=True):
        try:
            parts.append((name, parquet.read_metadata(file).num_rows))
        except (ArrowException, OSError) as error:
            raise DataError(f"{file}: is damaged, or no parquet file ({_line(error)})") from error
    dataset = load("parquet", data_files=list(files), split="train")
    return Table(dataset, parts, reading)


def open_hub(name: str, configuration: str | None, reading: Reading) -> Table:
    """The training split of a data set of the hub, or of a folder that is laid out like one.

    Raises:
        DataError: `datasets` is missing, there is no such data set, or as for `Table`.
    """
    load = _load_dataset()
    from datasets import config
    from huggingface_hub import constants

    dataset = load(name, configuration, split="train")
    caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    roots = (name,) if Path(name).is_dir() else tuple(map(str, caches))
    return Table(dataset, [(name, len(dataset))], reading, roots)


def _load_dataset() -> Callable[..., Dataset]:
    """`datasets.load_dataset`, whose many errors are one line here."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f'parquet and the hub need datasets ({error}); run: pip install "ldm-kit[train]"'
        ) from error

    def load(name: str, *arguments: Any, **options: Any) -> Dataset:
        try:
            return load_dataset(name, *arguments, **options)  # type: ignore[return-value]
        except Exception as error:  # of the hub, the network, the disk, every file format
            where = options.get("data_files", [name])[0]
            cause = error.__cause__ or error
            raise DataError(f"{where}: cannot be loaded as a data set ({_line(cause)})") from error

    return load


def _choose(what: str, name: str | None, names: list[str], where: str, *others: str) -> str:
    for choice in (name, *others):
        if choice in names:
            return choice
    raise DataError(
        f"{where}: no {what} column {name!r}; the columns are {listed(names)}:"
        f" choose one with {what}_column"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
