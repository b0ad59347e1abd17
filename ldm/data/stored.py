"""What every stored data set shares: from bytes to a picture and a caption, or to one line.

Whatever is wrong with a sample is a `DataError` that names it: when the data set is opened, as far
as that shows without reading pictures, and else when the sample is asked for. Pictures are told by
their bytes, never by their names, and only those formats are known whose readers are plain.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any, Literal, TypeVar

from PIL import Image, UnidentifiedImageError

from ldm.data.sample import Sample
from ldm.errors import DataError
from ldm.images import upright_size

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Pictures have one of these endings, in small or capital letters."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names for them. It knows others, of which EPS would start a program."""

Name = TypeVar("Name")
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read.

    Attributes:
        image_column: the picture's column in tables.
        caption_column: the caption's, in tables, in metadata.jsonl, and in the .json of a shard.
        caption_extension: ending of the caption files beside pictures.
        class_column: a column of whole numbers from 0, or `folder`: the number of the sample's
            folder among the sorted names of all; None for no classes.
        on_bad_sample: what cannot be used is refused (`stop`), or left out and counted (`skip`).
        shard_cache_gb: gigabytes of streamed shards that a process keeps on the disk.
    """

    image_column: str = "image"
    caption_column: str = "text"
    caption_extension: str = ".txt"
    class_column: str | None = None
    on_bad_sample: Literal["stop", "skip"] = "stop"
    shard_cache_gb: float = 50.0


DEFAULT = Reading()


class Stored(ABC):
    """A data source whose pictures are stored as files are; a subclass knows where.

    Attributes:
        fingerprint: see `DataSource`.
        missing: a line for each sample that was left out when the data set was opened.
    """

    reading: Reading
    fingerprint: str
    missing: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The sample's name."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """What is said of the picture."""

    @abstractmethod
    def _open(self, index: int) -> IO[bytes]:
        """The stored picture."""

    @abstractmethod
    def _class(self, index: int, column: str) -> int:
        """What stands in the class column."""

    def _folder(self, index: int) -> str:
        return str(PurePosixPath(self.key(index)).parent)

    def _where(self, index: int) -> str:
        """What an error calls the sample."""
        return self.key(index)

    def __getitem__(self, index: int) -> Sample:
        with self._open(index) as stream:
            image = decode(stream.read(), self._where(index))
        return Sample(image, self.caption(index), self.key(index))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the upright picture; only its header is read."""
        with self._open(index) as stream:
            return picture_size(stream, self._where(index))

    def label(self, index: int) -> int | None:
        """The sample's class, if there are classes."""
        column = self.reading.class_column
        if column is None:
            return None
        if column == "folder":
            return self.classes[self._folder(index)]
        return self._class(index, column)

    @cached_property
    def classes(self) -> dict[str, int]:
        """The number of each folder that has samples."""
        folders = sorted({self._folder(index) for index in range(len(self))})
        return {folder: number for number, folder in enumerate(folders)}

    def _gather(
        self, where: object, names: Iterable[Name], entry: Callable[[Name], Entry]
    ) -> list[Entry]:
        """The entries of all samples but those that cannot be used, which are counted and named."""
        found: list[Entry] = []
        self.missing = []
        for name in names:
            try:
                found.append(entry(name))
            except DataError as error:
                self.missing.append(str(error))
        if self.missing:
            total = len(found) + len(self.missing)
            line = f"{where}: {len(self.missing)} of {total} samples cannot be used"
            if self.reading.on_bad_sample == "stop" or not found:
                raise DataError(
                    f"{line}; the first is {self.missing[0]} (on_bad_sample skip leaves them out)"
                )
            logger.warning(f"{line} and are left out; the first is {self.missing[0]}")
        return found


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around whatever reads a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); was it moved?") from error


def decode(data: bytes, where: str) -> Image.Image:
    """A stored picture, in the mode it is stored in; of an animation, the first frame.

    Raises:
        DataError: it is no picture, damaged, or has more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    image = _identify(io.BytesIO(data), where)
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise whatever it is that trips them
        raise DataError(f"{where}: the picture is damaged or cut short ({error})") from error
    return image


def picture_size(stream: IO[bytes], where: str) -> tuple[int, int]:
    """Width and height as `ldm.images.to_rgb` will make the picture, of its header alone.

    Raises:
        DataError: as for `decode`, as far as the header shows.
    """
    return upright_size(_identify(stream, where))


def _identify(stream: IO[bytes], where: str) -> Image.Image:
    """The picture before its pixels are read."""
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: is damaged, or no picture of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise DataError(f"{where}: the picture is damaged ({error})") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise DataError(f"{where}: {image.width} x {image.height} pixels are over {limit}")
    return image


def clean_caption(words: object, where: str) -> str:
    """A caption without the space around it; bytes are UTF-8, perhaps with a byte order mark.

    Raises:
        DataError: it is no text.
    """
    try:
        text = words.decode("utf-8-sig") if isinstance(words, bytes) else words
        if not isinstance(text, str):
            raise DataError(f"{where}: the caption is no text but {type(words).__name__}")
        text.encode()  # JSON may hold halves of characters
    except UnicodeError as error:
        raise DataError(f"{where}: the caption is not UTF-8 text ({error})") from error
    if "\0" in text:
        raise DataError(f"{where}: the caption holds NUL bytes; save it as UTF-8 text")
    return text.strip()


def column_caption(row: dict[str, Any], column: str, where: str) -> str:
    """The caption of a row.

    Raises:
        DataError: it is not there, or no text.
    """
    words = row.get(column)
    if not isinstance(words, str):
        raise DataError(
            f"{where}: no text in the caption column {column!r}; the columns are {listed(row)}:"
            " choose one with caption_column"
        )
    return clean_caption(words, where)


def column_class(row: dict[str, Any], column: str, where: str) -> int:
    """The class of a row.

    Raises:
        DataError: it is not there, or no whole number from 0.
    """
    number = row.get(column)
    if type(number) is not int or number < 0:
        raise DataError(
            f"{where}: no whole number from 0 in the class column {column!r}; the columns are"
            f" {listed(row)}: choose one with class_column"
        )
    return number


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is none.
    """
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds no JSON object with columns")
    return row


def listed(names: Iterable[str]) -> str:
    """Names for an error line."""
    return ", ".join(names) or "none"


def hashed(names: Iterable[str], numbers: Iterable[int]) -> str:
    """The hash that names a data set: of its names and sizes, not of where it lies."""
    text = json.dumps([list(names), list(numbers)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
