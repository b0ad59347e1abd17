"""Pictures with captions, from any of the usual layouts, behind one indexed `DataSource`.

    photos/x.jpg + photos/x.txt            CaptionFolder (kohya, OneTrainer, img2dataset `files`)
    photos/tulips/x.jpg, no captions       CaptionFolder: the folder's name is the caption
    photos/metadata.jsonl + x.jpg          MetadataFolder (Hugging Face imagefolder)
    00000.tar, {00000..00006}.tar, *.tar   TarShards (WebDataset, img2dataset)
    flowers                                the procedural flowers, drawn as they are asked for

A source is an immutable list with random access: sample order is arithmetic elsewhere
(`ldm.data.order`), which is what makes resuming exact. Every source can be pickled to the worker
processes of a DataLoader. Nothing that a data set holds is ever executed.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ldm.data.flowers import Flowers
from ldm.data.sample import DataSource, Sample
from ldm.errors import ConfigError, DataError, suggest

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Pictures have one of these endings, in small or capital letters."""


class CaptionFolder:
    """Pictures with a caption file beside each: `x.jpg` and `x.txt`, in all subfolders.

    Where no caption file exists at all, the name of a picture's folder is its caption (`_` and `-`
    read as spaces), as in class folders.

    Args:
        root: the folder.
        caption_extension: ending of the caption files.

    Raises:
        DataError: no pictures, or some pictures without a caption.
    """

    def __init__(self, root: str | os.PathLike[str], *, caption_extension: str = ".txt"):
        self.root = Path(root)
        self.caption_extension = "." + caption_extension.lstrip(".")
        self._names = _picture_names(self.root)
        with_caption = [name for name in self._names if self._caption_file(name).is_file()]
        self._by_class = not with_caption
        if self._by_class and not all("/" in name for name in self._names):
            missing = self._names
        else:
            missing = [] if self._by_class else sorted(set(self._names) - set(with_caption))
        if missing:
            raise DataError(
                f"{self.root}: {len(missing)} of {len(self._names)} pictures have no"
                f" {self.caption_extension} file with a caption; the first is {missing[0]}"
            )
        files = [self.root / name for name in self._names]
        if not self._by_class:
            files += [self._caption_file(name) for name in self._names]
        self.fingerprint = _fingerprint(self._names, [file.stat().st_size for file in files])

    def _caption_file(self, name: str) -> Path:
        return (self.root / name).with_suffix(self.caption_extension)

    def _read_caption(self, name: str) -> str:
        if self._by_class:
            return re.sub("[_-]+", " ", Path(name).parent.name)
        path = self._caption_file(name)
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the caption as UTF-8 text ({error})") from error

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        return Sample(_decode(_read(self.root / name), name), self._read_caption(name), name)


class MetadataFolder:
    """A Hugging Face imagefolder: `metadata.jsonl` beside the pictures, or one in each subfolder.

    Every line is a JSON object with `file_name`, relative to its file, and the caption.

    Args:
        root: the folder.
        caption_column: the key of the caption.

    Raises:
        DataError: a line that is no such object, names a missing file or lacks the column.
    """

    def __init__(self, root: str | os.PathLike[str], *, caption_column: str = "text"):
        self.root = Path(root)
        self._samples: list[tuple[str, str]] = []
        for path in sorted(self.root.rglob("metadata.jsonl")):
            self._samples += self._read(path, caption_column)
        if not self._samples:
            raise DataError(f"{self.root}: its metadata.jsonl names no pictures")
        names = [name for name, _ in self._samples]
        sizes = [(self.root / name).stat().st_size for name in names]
        self.fingerprint = _fingerprint([text for pair in self._samples for text in pair], sizes)

    def _read(self, path: Path, column: str) -> Iterable[tuple[str, str]]:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _json_object(line, where)
            if not isinstance(row.get("file_name"), str):
                raise DataError(f"{where}: no file_name; the columns are {_listed(row)}")
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"{where}: no text in the caption column {column!r}; the columns are"
                    f" {_listed(row)}: choose one with caption_column"
                )
            file = path.parent / row["file_name"]
            if not file.is_file():
                raise DataError(f"{where}: there is no file {row['file_name']} beside it")
            name = Path(os.path.relpath(file, self.root)).as_posix()
            if name.startswith(".."):
                raise DataError(f"{where}: {row['file_name']} lies outside of {self.root}")
            yield name, row[column].strip()

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index][0]

    def __getitem__(self, index: int) -> Sample:
        name, caption = self._samples[index]
        return Sample(_decode(_read(self.root / name), name), caption, name)


class TarShards:
    """WebDataset shards: uncompressed tars of `key.jpg` (png, webp, ...) with `key.txt`.

    The caption is `key.txt`, or else a column of `key.json`. The headers are read once, to know
    where each member lies; after that any sample is one seek away. Members without a picture are
    passed over: img2dataset leaves the `key.json` of a failed download.

    Args:
        path: a .tar, a folder of them, a glob, or a brace pattern such as `{00000..00006}.tar`.
        caption_column: the key of the caption in `key.json`, where there is no `key.txt`.

    Raises:
        DataError: no shard found, one that is no plain tar, or pictures without captions.
    """

    def __init__(self, path: str | os.PathLike[str], *, caption_column: str = "text"):
        self.shards = _shard_paths(os.fspath(path))
        self.caption_column = caption_column
        # (key, shard, picture's offset and size, caption's offset and size, caption is JSON)
        self._samples: list[tuple[str, int, int, int, int, int, bool]] = []
        missing: list[str] = []
        for number, shard in enumerate(self.shards):
            for key, members in _index_tar(shard).items():
                picture = next((members[end] for end in EXTENSIONS if end in members), None)
                words = members.get(".txt") or members.get(".json")
                if picture is None:
                    continue
                if words is None:
                    missing.append(f"{key} in {shard}")
                    continue
                is_json = ".txt" not in members
                self._samples.append((key, number, *picture, *words, is_json))
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of {len(missing) + len(self._samples)} pictures have"
                f" neither a .txt nor a .json member; the first is {missing[0]}"
            )
        if not self._samples:
            raise DataError(f"{path}: no pictures in {len(self.shards)} tar files")
        keys = [self.key(index) for index in range(len(self))]
        sizes = [size for sample in self._samples for size in (sample[3], sample[5])]
        self.fingerprint = _fingerprint(keys, sizes)
        self[0]  # a caption column that is not there shows at once

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        key, shard, *_ = self._samples[index]
        return f"{Path(self.shards[shard]).stem}/{key}"

    def __getitem__(self, index: int) -> Sample:
        _, shard, *spans, is_json = self._samples[index]
        # Opened anew each time: an open file's position would be shared by forked workers.
        with open(self.shards[shard], "rb") as file:
            picture, words = _span(file, *spans[:2]), _span(file, *spans[2:])
        key = self.key(index)
        try:
            caption = words.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{key}: the caption is not UTF-8 text ({error})") from error
        if is_json:
            row = _json_object(caption, key)
            # img2dataset's column is accepted where the asked-for one is not there.
            caption = row.get(self.caption_column, row.get("caption"))
            if not isinstance(caption, str):
                raise DataError(
                    f"{key}: no text in the caption column {self.caption_column!r} of its .json;"
                    f" the columns are {_listed(row)}: choose one with caption_column"
                )
        return Sample(_decode(picture, key), caption.strip(), key)


class Subset:
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: DataSource, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.fingerprint = _fingerprint([source.fingerprint], self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]


def split_source(
    source: DataSource, validation_split: float, seed: int = 0
) -> tuple[DataSource, DataSource]:
    """Split a source into training and validation samples by a hash of each sample's key.

    A sample falls on the same side whatever its position and whatever else the data set holds, so
    that data added later never moves a validation picture into training.

    Args:
        source: what to split.
        validation_split: share to validate on, in (0, 1); the number found is random about it,
            but each side has one sample at least.
        seed: another seed, another split.

    Raises:
        ConfigError: the share is out of range.
        DataError: there are fewer than two samples.
    """
    if not 0 < validation_split < 1:
        raise ConfigError(f"validation_split is {validation_split}; it must lie between 0 and 1")
    if len(source) < 2:
        raise DataError(
            f"{len(source)} samples cannot be split; add some, or set validation_split 0"
        )

    def draw(index: int) -> float:
        digest = hashlib.blake2b(f"{seed}/{source.key(index)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    draws = [draw(index) for index in range(len(source))]
    limit = min(max(validation_split, min(draws)), sorted(draws)[-2])
    train = [index for index, number in enumerate(draws) if number > limit]
    held = [index for index, number in enumerate(draws) if number <= limit]
    return Subset(source, train), Subset(source, held)


def open_source(
    path: str | os.PathLike[str],
    *,
    caption_column: str = "text",
    caption_extension: str = ".txt",
    split: str = "train",
) -> DataSource:
    """Open a data set by what is there; see the top of this file for the layouts.

    Args:
        path: a folder, a .tar, a glob or brace pattern of tars, or `flowers`.
        caption_column: the caption's key, in metadata.jsonl and in the .json of a shard.
        caption_extension: ending of caption files.
        split: which of the procedural flowers: `train`, `validation` or `held_out`; of a folder
            with subfolders of such names, the one to read.

    Raises:
        DataError: nothing usable is there.
    """
    root = Path(path)
    if os.fspath(path) == "flowers":
        if root.is_dir():
            logger.warning("flowers is the built-in set; write ./flowers for the folder")
        return Flowers(split=split)
    if any(sign in os.fspath(path) for sign in "*?[{") and not root.exists():
        return TarShards(path, caption_column=caption_column)
    if not root.exists():
        raise DataError(f"{path}: no such file or folder (or write `flowers` for the built-in set)")
    if root.is_file():
        if root.suffix != ".tar":
            raise DataError(f"{path}: is a file but no .tar; give the folder of the pictures")
        return TarShards(root, caption_column=caption_column)
    folders = {child.name for child in root.iterdir() if child.is_dir() and _shown(child.name)}
    # A class of pictures may be called `train`, too: then it has neighbours that are no splits.
    if split in folders and folders <= {"train", "validation", "val", "test", "held_out"}:
        root = root / split
    elif split != "train":
        raise DataError(f"{root}: has no split {split!r}; {suggest(split, folders)}")
    if any(root.glob("*.tar")):
        return TarShards(root, caption_column=caption_column)
    if next(root.rglob("metadata.jsonl"), None):
        return MetadataFolder(root, caption_column=caption_column)
    return CaptionFolder(root, caption_extension=caption_extension)


def _decode(data: bytes, key: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS
        if limit and image.width * image.height > limit:
            raise DataError(f"{key}: {image.width} x {image.height} pixels are over {limit}")
        image.load()
    # PIL's decoders raise all of these for bytes that are no picture.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{key}: the picture is damaged or cut short ({error})") from error
    return image


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); was it moved?") from error


def _span(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise DataError(f"{file.name}: ends too soon; copy or download it again")
    return data


def _picture_names(root: Path) -> list[str]:
    """Paths below root of all pictures but hidden ones and those in hidden folders, sorted."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = filter(_shown, subfolders)
        names += [
            (Path(folder) / file).relative_to(root).as_posix()
            for file in files
            if file.lower().endswith(EXTENSIONS) and _shown(file)
        ]
    if not names:
        raise DataError(f"{root}: no pictures found; looked for {', '.join(EXTENSIONS)}")
    return sorted(names)


def _shown(name: str) -> bool:
    """Whether a name is the user's: not `.cache`, `.ipynb_checkpoints` or `__MACOSX`."""
    return not name.startswith((".", "__"))


def _shard_paths(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        shards = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    elif any(sign in path for sign in "*?["):
        shards = sorted(glob.glob(path))
    else:
        shards = _expand_braces(path)
    absent = [shard for shard in shards if not os.path.isfile(shard)]
    if absent or not shards:
        raise DataError(f"{absent[0] if absent else path}: no such tar file")
    return shards


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> a08.tar, a09.tar, a10.tar; any number of braces."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for number in numbers for path in _expand_braces(before + number + after)]


def _index_tar(shard: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> ending in small letters -> offset and size of the member's bytes, in the tar's order.

    As in WebDataset, a name is the key up to the first dot after the last slash.
    """
    index: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if member.isreg() and not member.issparse() and stem:
                    members = index.setdefault(folder + slash + stem, {})
                    members[dot + ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard}: cannot be read as an uncompressed tar ({error})") from error
    return index


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds no JSON object with columns")
    return row


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(row) or "none"


def _fingerprint(names: Iterable[str], numbers: Iterable[int]) -> str:
    """The hash that names a data set: of its names and sizes, not of where it lies."""
    text = json.dumps([list(names), list(numbers)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
