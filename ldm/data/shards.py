"""Tar shards, as WebDataset and img2dataset write them.

A member's name is the sample's key up to the first dot after the last slash, and behind it says
what the member is. Only pictures, `.txt` and `.json` are looked at; links are never followed, and
nothing is unpacked, so that a name may be what it likes.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from PIL.ContainerIO import ContainerIO

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
    readable,
)
from ldm.errors import DataError

Span = tuple[int, int]
"""Offset and size in bytes of a member's content."""


class Entry(NamedTuple):
    """A sample of a shard.

    Attributes:
        key: its name in the shard.
        picture: where the picture lies.
        text: where its .txt lies.
        json: where its .json lies.
        problem: why it cannot be used, or "".
    """

    key: str
    picture: Span
    text: Span | None
    json: Span | None
    problem: str


class Shards(Stored):
    """Samples in tars; a subclass knows in which, and where these are."""

    @abstractmethod
    def _find(self, index: int) -> tuple[IO[bytes], Entry]:
        """The sample's shard, open, and its place there."""

    def _open(self, index: int) -> IO[bytes]:
        file, entry = self._find(index)
        return _member(file, entry.picture)

    def caption(self, index: int) -> str:
        file, entry = self._find(index)
        where = self._where(index)
        if entry.text:
            with _member(file, entry.text) as text:
                return clean_caption(text.read(), where)
        row = self._json(file, entry, where)
        # img2dataset's column is accepted where the asked-for one is not there.
        column = self.reading.caption_column
        instead = column not in row and "caption" in row
        return column_caption(row, "caption" if instead else column, where)

    def _class(self, index: int, column: str) -> int:
        file, entry = self._find(index)
        where = self._where(index)
        return column_class(self._json(file, entry, where), column, where)

    def _json(self, file: IO[bytes], entry: Entry, where: str) -> dict[str, Any]:
        with _member(file, entry.json or (0, 0)) as text:
            return json_object(text.read() if entry.json else b"{}", where)


class TarShards(Shards):
    """WebDataset shards: uncompressed tars of `key.jpg` (png, webp, ...) with `key.txt`.

    The caption is `key.txt`, or else a column of `key.json`. The headers are read once, to know
    where each member lies; after that any sample is one seek away. Members without a picture are
    passed over: img2dataset leaves the `key.json` of a failed download.

    Args:
        path: a .tar, a folder of them, a glob, or a brace pattern such as `{00000..00006}.tar`.
        reading: all but the columns of tables matter here.

    Raises:
        DataError: no shard found, one that is no plain tar or damaged, or pictures without
            captions.
    """

    def __init__(self, path: str | os.PathLike[str], reading: Reading = DEFAULT):
        self.reading = reading
        self.shards = file_paths(os.fspath(path), ".tar")
        self._stems = shard_stems(self.shards)
        found: list[tuple[int, Entry]] = []
        for number, shard in enumerate(self.shards):
            with readable(shard), open(shard, "rb") as file:
                entries, damage = index_tar(file)
            if damage:
                found.append((number, Entry("the rest", (0, 0), None, None, damage)))
            found += [(number, entry) for entry in entries]
        self._samples = self._gather(path, found, self._entry)
        if not self._samples:
            raise DataError(f"{path}: no pictures in {len(self.shards)} tar files")
        keys = [self.key(index) for index in range(len(self))]
        spans = [span for _, e in self._samples for span in (e.picture, e.text or e.json)]
        if not all(entry.text for _, entry in self._samples):
            keys.append(reading.caption_column)
        self.fingerprint = hashed(keys, [span[1] for span in spans if span])
        if reading.on_bad_sample == "stop":
            self.caption(0)  # a caption column that is not there shows at once

    def _entry(self, sample: tuple[int, Entry]) -> tuple[int, Entry]:
        number, entry = sample
        if entry.problem:
            raise DataError(f"{entry.key} in {self.shards[number]}: {entry.problem}")
        return sample

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        shard, entry = self._samples[index]
        return f"{self._stems[shard]}/{entry.key}"

    def _folder(self, index: int) -> str:
        return str(PurePosixPath(self._samples[index][1].key).parent)

    def _find(self, index: int) -> tuple[IO[bytes], Entry]:
        shard, entry = self._samples[index]
        with readable(self.shards[shard]):
            # Anew each time: an open file's position would be shared by forked workers.
            return open(self.shards[shard], "rb"), entry


def index_tar(file: IO[bytes]) -> tuple[list[Entry], str]:
    """All samples of a tar, in its order, and what is wrong behind the last of them, or ""."""
    samples: dict[str, dict[str, Span]] = {}
    problems: dict[str, str] = {}
    damage = ""
    try:
        for key, ending, member in _members(file):
            spans = samples.setdefault(key, {})
            if ending.count(".") > 1:  # beside a picture it is some mask or the like
                spans[ending] = (0, 0)
                continue
            if not member.isreg() or member.issparse():
                problems[key] = f"its {ending} is no plain file but a link or the like"
            elif ending in spans:
                problems[key] = f"its {ending} stands there twice"
            spans[ending] = (member.offset_data, member.size)
    # A header may ask for any size, any text, and another header behind it.
    except (tarfile.TarError, OSError, ValueError, MemoryError, RecursionError) as error:
        damage = f"damaged, cut short or no uncompressed tar ({error}); copy or download it again"
    end = file.seek(0, os.SEEK_END)
    entries = [_entry_of(key, spans, problems.get(key, ""), end) for key, spans in samples.items()]
    return [entry for entry in entries if entry], damage


def _members(file: IO[bytes]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key and ending of whatever may belong to a sample, up to the mark of the tar's end."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0:  # tarfile would go round in circles
                raise tarfile.ReadError("a size below zero")
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            ending = dot + ending.lower()
            if stem and not member.isdir() and ending.endswith((*EXTENSIONS, ".txt", ".json")):
                yield folder + slash + stem, ending, member
        file.seek(tar.offset)  # tarfile takes any junk for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no mark of its end")


def _entry_of(key: str, spans: dict[str, Span], problem: str, end: int) -> Entry | None:
    """A sample of the members that were found in a tar of so many bytes; None without a picture."""
    pictures = [ending for ending in EXTENSIONS if ending in spans]
    if not pictures:
        odd = next((ending for ending in spans if ending.endswith(EXTENSIONS)), "")
        problem = f"its ending is {odd}; a key may hold no dot"
        return Entry(key, (0, 0), None, None, problem) if odd else None
    if any(sum(span) > end for span in spans.values()):
        problem = "cut short"
    elif not problem and len(pictures) > 1:
        problem = f"has {len(pictures)} pictures, {' and '.join(pictures)}"
    elif not problem and not spans.keys() & {".txt", ".json"}:
        problem = "neither a .txt nor a .json member"
    return Entry(key, spans[pictures[0]], spans.get(".txt"), spans.get(".json"), problem)


def _member(file: IO[bytes], span: Span) -> IO[bytes]:
    """A member's content, to be closed in place of its tar."""
    if os.fstat(file.fileno()).st_size < sum(span):
        file.close()
        raise DataError(f"{file.name}: ends too soon; copy or download it again")
    return ContainerIO(file, *span)


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> a08.tar, a09.tar, a10.tar; any number of braces."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for number in numbers for path in expand_braces(before + number + after)]


def shard_stems(paths: list[str]) -> list[str]:
    """Short names of shards; where those of two folders are alike, with as much of the folders."""
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).with_suffix("").as_posix() for path in paths]


def file_paths(path: str, ending: str) -> list[str]:
    """Files by a name, a folder, a glob or a brace pattern, sorted.

    Raises:
        DataError: one of them is not there.
    """
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), f"*{ending}")))
    elif any(sign in path for sign in "*?["):
        files = sorted(glob.glob(path))
    else:
        files = expand_braces(path)
    absent = [file for file in files if not os.path.isfile(file)]
    if absent or not files:
        raise DataError(f"{absent[0] if absent else path}: no such {ending[1:]} file")
    return files
