"""Folders of pictures: with caption files, in class folders, or with metadata.jsonl."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ldm.data.stored import (
    DEFAULT,
    EXTENSIONS,
    Reading,
    Stored,
    clean_caption,
    column_caption,
    column_class,
    hashed,
    json_object,
    listed,
    readable,
)
from ldm.errors import DataError


class _Folder(Stored):
    """Pictures in files below a folder."""

    root: Path
    _names: list[str]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def _open(self, index: int) -> IO[bytes]:
        return _open(self.root / self._names[index])


class CaptionFolder(_Folder):
    """Pictures with a caption file beside each: `x.jpg` and `x.txt`, in all subfolders.

    Where no caption file exists at all, the name of a picture's folder is its caption (`_` and `-`
    read as spaces), as in class folders. A class column is one of `x.json`.

    Args:
        root: the folder.
        reading: `caption_extension`, `class_column` and `on_bad_sample` matter here.

    Raises:
        DataError: no pictures, or some pictures without a caption.
    """

    def __init__(self, root: str | os.PathLike[str], reading: Reading = DEFAULT):
        self.root, self.reading = Path(root), reading
        self._ending = "." + reading.caption_extension.lstrip(".")
        names = sorted(_pictures(self.root))
        if not names:
            raise DataError(f"{self.root}: no pictures found; looked for {', '.join(EXTENSIONS)}")
        in_folders = all("/" in name for name in names)
        self._by_class = in_folders and not any(map(os.path.isfile, map(self._beside, names)))
        entries = self._gather(self.root, names, self._entry)
        self._names = [name for name, _ in entries]
        words = "its folder" if self._by_class else self._ending
        numbers = [size for _, sizes in entries for size in sizes]
        self.fingerprint = hashed([*self._names, words], numbers)

    def _beside(self, name: str, ending: str | None = None) -> Path:
        return (self.root / name).with_suffix(ending or self._ending)

    def _entry(self, name: str) -> tuple[str, list[int]]:
        """The name, with the sizes of the files it stands for."""
        sizes = [_file_size(self.root / name)]
        if not self._by_class:
            if not os.path.isfile(self._beside(name)):
                raise DataError(f"{name}: there is no {self._ending} file with a caption beside it")
            sizes.append(_file_size(self._beside(name)))
        return name, sizes

    def caption(self, index: int) -> str:
        name = self._names[index]
        if self._by_class:
            return re.sub("[_-]+", " ", Path(name).parent.name)
        path = self._beside(name)
        with _open(path) as file:
            return clean_caption(file.read(), str(path))

    def _class(self, index: int, column: str) -> int:
        path = self._beside(self._names[index], ".json")
        with _open(path) as file:
            return column_class(json_object(file.read(), str(path)), column, str(path))


class MetadataFolder(_Folder):
    """A Hugging Face imagefolder: `metadata.jsonl` beside the pictures, or one in each subfolder.

    Every line is a JSON object with `file_name`, relative to its file, and the caption.

    Args:
        root: the folder.
        reading: `caption_column`, `class_column` and `on_bad_sample` matter here.

    Raises:
        DataError: a line that is no such object, names a missing file or lacks the column.
    """

    def __init__(self, root: str | os.PathLike[str], reading: Reading = DEFAULT):
        self.root, self.reading = Path(root), reading
        entries = self._gather(self.root, self._lines(), self._entry)
        if not entries:
            raise DataError(f"{self.root}: its metadata.jsonl names no pictures")
        self._names = [name for name, *_ in entries]
        self._captions = [caption for _, caption, _, _ in entries]
        self._numbers = [number for _, _, number, _ in entries]
        words = [text for pair in zip(self._names, self._captions, strict=True) for text in pair]
        self.fingerprint = hashed(words, [size for *_, size in entries])

    def _lines(self) -> Iterator[tuple[Path, int, bytes]]:
        for path in files_below(self.root, "metadata.jsonl"):
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield path, number, line

    def _entry(self, place: tuple[Path, int, bytes]) -> tuple[str, str, int, int]:
        """Name, caption, class and the picture's size in bytes."""
        path, number, line = place
        where = f"{path}, line {number}"
        row = json_object(line, where)
        if not isinstance(row.get("file_name"), str):
            raise DataError(f"{where}: no file_name; the columns are {listed(row)}")
        caption = column_caption(row, self.reading.caption_column, where)
        file = path.parent / row["file_name"]
        if not os.path.isfile(file):
            raise DataError(f"{where}: there is no file {row['file_name']} beside it")
        name = Path(os.path.relpath(file, self.root)).as_posix()
        if name.startswith(".."):
            raise DataError(f"{where}: {row['file_name']} lies outside of {self.root}")
        column = self.reading.class_column
        number = 0 if column in (None, "folder") else column_class(row, column, where)
        return name, caption, number, _file_size(file)

    def caption(self, index: int) -> str:
        return self._captions[index]

    def _class(self, index: int, column: str) -> int:
        return self._numbers[index]


def shown(name: str) -> bool:
    """Whether a name is the user's: not `.cache`, `.ipynb_checkpoints` or `__MACOSX`."""
    return not name.startswith((".", "__"))


def has_pictures(root: Path) -> bool:
    """Whether there is a picture anywhere below a folder."""
    return next(_pictures(root), None) is not None


def files_below(root: Path, pattern: str) -> list[Path]:
    """Files below a folder that fit a pattern, sorted, but hidden ones and in hidden folders."""
    found = root.rglob(pattern)
    return sorted(path for path in found if all(map(shown, path.relative_to(root).parts)))


def _pictures(root: Path) -> Iterator[str]:
    """Paths below root of all pictures but hidden ones and those in hidden folders."""
    seen = set[tuple[int, int]]()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder that has had its turn
            subfolders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        subfolders[:] = sorted(filter(shown, subfolders))
        for file in files:
            if file.lower().endswith(EXTENSIONS) and shown(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _open(path: Path) -> IO[bytes]:
    with readable(path):
        return path.open("rb")


def _file_size(path: Path) -> int:
    with readable(path):
        return path.stat().st_size
