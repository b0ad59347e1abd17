"""Tar shards that lie elsewhere, for data that no disk holds.

A shard is fetched whole when one of its samples is first asked for, and read like any other tar.
How many samples it has must be known before the first step: from `index.json` beside the shards,
which `scripts/prepare_data.py FOLDER` writes, or from img2dataset's `00000_stats.json`.
"""

from __future__ import annotations

import atexit
import copy
import os
import re
import shutil
import socket
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate, pairwise
from math import ceil
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ldm.data.shards import Entry, Shards, expand_braces, index_tar, shard_stems
from ldm.data.stored import DEFAULT, Reading, hashed, json_object, readable
from ldm.errors import ConfigError, DataError

PROTOCOLS = ("http", "https", "s3", "gs", "hf")
"""Where shards may lie. fsspec knows more, some of which chain others or read this machine."""

BACKOFF = (1.0, 4.0, 16.0)
"""Seconds before each further attempt to fetch something."""

LISTINGS = 256
"""Shards of which a process remembers the members."""

IN_USE = "in use"
"""A file that whoever uses a cache holds locked."""

ANEW = "write that anew with scripts/prepare_data.py"

Result = TypeVar("Result")


class Shard(NamedTuple):
    """A tar that lies elsewhere.

    Attributes:
        number: among all shards of the data set.
        address: where from.
        name: short.
        samples: in it.
        size: bytes; 0 when not known.
    """

    number: int
    address: str
    name: str
    samples: int
    size: int


class StreamedShards(Shards):
    """Tars behind addresses, of which this machine's disk holds `shard_cache_gb` at a time.

    They are kept in a folder of the process that opened the data set, which its loader workers
    share and which goes with it. A sample's key is its number in its shard.

    Args:
        address: `https://host/{00000..00099}.tar`, or with another of `PROTOCOLS`.
        reading: the column and class options matter here, and `shard_cache_gb`.

    Attributes:
        shard_lengths: samples of each shard; the indices of samples run through the shards.

    Raises:
        ConfigError: an address of another kind, or class_column `folder`.
        DataError: nothing says how many samples there are, or what reads the address is missing.
    """

    def __init__(self, address: str, reading: Reading = DEFAULT):
        if address.partition("://")[0] not in PROTOCOLS or not address.endswith(".tar"):
            raise ConfigError(
                f"{address}: shards are streamed from addresses that end in .tar and begin with"
                f" one of {', '.join(PROTOCOLS)}; of this machine, give the path"
            )
        if reading.class_column == "folder":
            raise ConfigError(f"{address}: class_column folder needs shards on this machine")
        self.reading, self.missing = reading, []
        self._cache = _Cache(reading.shard_cache_gb)
        self._listings: dict[int, list[Entry]] = {}
        self._broken: dict[int, str] = {}  # what is wrong with shards that are not tried again
        self._use([shard for shard in _count(expand_braces(address)) if shard.samples])
        if not self.shards:
            raise DataError(f"{address}: no samples in any shard")

    def _use(self, shards: list[Shard], samples: int | None = None) -> None:
        ends = list(accumulate(shard.samples for shard in shards))
        ends = ends if samples is None else [min(end, samples) for end in ends]
        lengths = [end - start for start, end in pairwise([0, *ends])]
        self.shard_lengths = [length for length in lengths if length]
        self.shards = shards[: len(self.shard_lengths)]
        self._ends = ends[: len(self.shards)]
        numbers = [n for s in self.shards for n in (s.samples, s.size)] + self._ends[-1:]
        names = [shard.name for shard in self.shards]
        self.fingerprint = hashed([*names, self.reading.caption_column], numbers)

    def part(self, shards: Sequence[int], samples: int | None = None) -> StreamedShards:
        """Some of the shards, and of these only the first `samples`."""
        part = copy.copy(self)
        part._use([self.shards[number] for number in shards], samples)
        return part

    def check_cache(self, open_at_once: int) -> None:
        """Refuse a cache that the shards of one batch do not fit into, as far as sizes are known.

        Args:
            open_at_once: shards that a process reads from in turns.

        Raises:
            ConfigError: `shard_cache_gb` is too small; each shard would be fetched many times.
        """
        open_at_once = min(open_at_once, len(self.shards))
        needed = open_at_once * max(shard.size for shard in self.shards)
        if needed > self._cache.limit:
            raise ConfigError(
                f"shard_cache_gb {self.reading.shard_cache_gb:g} cannot hold the {open_at_once}"
                f" shards that are read at once; set it to {ceil(needed / 1e7) / 100:g} or more"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, and the sample's number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.shards[number], index - (self._ends[number - 1] if number else 0)

    def key(self, index: int) -> str:
        shard, place = self._place(index)
        return f"{shard.name}/{place:06d}"

    def _where(self, index: int) -> str:
        shard, place = self._place(index)
        return f"{shard.address}, {self._listings[shard.number][place].key}"

    def _find(self, index: int) -> tuple[IO[bytes], Entry]:
        shard, place = self._place(index)
        if shard.number in self._broken:
            raise DataError(self._broken[shard.number])
        try:
            file = self._cache.open(shard)
            if shard.number not in self._listings:
                if len(self._listings) >= LISTINGS:
                    del self._listings[next(iter(self._listings))]
                self._listings[shard.number] = _list(shard, file)
        except DataError as error:
            self._broken[shard.number] = str(error)
            raise
        entry = self._listings[shard.number][place]
        if entry.problem:
            file.close()
            raise DataError(f"{self._where(index)}: {entry.problem}")
        return file, entry


def _list(shard: Shard, file: IO[bytes]) -> list[Entry]:
    entries, damage = index_tar(file)
    if damage:
        raise DataError(f"{shard.address}: {damage}")
    if len(entries) != shard.samples:
        raise DataError(
            f"{shard.address}: holds {len(entries)} pictures, but {shard.samples} by its index;"
            f" {ANEW}"
        )
    return entries


class _Cache:
    """A folder of shards, the least recently used of which make way for others."""

    def __init__(self, gigabytes: float):
        from filelock import FileLock
        from psutil import pid_exists

        self.limit = int(gigabytes * 1e9)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "shards"
        home.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        for left in home.iterdir():  # by processes of this machine that were killed
            ours = re.fullmatch(re.escape(host) + r"-(\d{1,9})-[^-]+", left.name)
            if ours and not pid_exists(int(ours[1])):
                # Two machines, or containers, of one name may share the folder.
                with suppress(OSError), FileLock(left / IN_USE, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{host}-{os.getpid()}-", dir=home))
        lock = FileLock(self.folder / IN_USE)
        lock.acquire()
        atexit.register(_remove, self.folder, os.getpid(), lock)

    def open(self, shard: Shard) -> IO[bytes]:
        path = self.folder / f"{shard.number:05d}.tar"
        while True:  # another worker may clear it away between the two
            try:
                now = time.time_ns()  # the kernel's own clock is coarse
                os.utime(path, ns=(now, now))
                return path.open("rb")
            except FileNotFoundError:
                self._fetch(shard, path)

    def _fetch(self, shard: Shard, path: Path) -> None:
        from filelock import FileLock

        address, part = shard.address, path.with_suffix(".part")
        with FileLock(f"{path}.lock"):  # the workers of a process often want the same shard
            if path.exists():
                return
            files = _file_system(address)
            try:
                size = shard.size or _patiently(address, lambda: files.size(address)) or 0
                if size > self.limit:
                    raise DataError(f"{address}: its {size} bytes are over shard_cache_gb")
                self._make_room(size)
                _patiently(address, lambda: files.get_file(address, str(part)))
            except FileNotFoundError as error:
                raise DataError(f"{address}: there is no such shard") from error
            if shard.size not in (0, part.stat().st_size):
                raise DataError(
                    f"{address}: {part.stat().st_size} bytes, {shard.size} by index.json; {ANEW}"
                )
            part.rename(path)

    def _make_room(self, size: int) -> None:
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = size + sum(size for _, size, _ in files)
        for _, freed, path in sorted(file for file in files if file[2].suffix == ".tar"):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= freed


def _remove(folder: Path, owner: int, lock: Any) -> None:
    if os.getpid() == owner:  # and not a forked worker
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def write_index(folder: Path) -> tuple[int, list[str]]:
    """Write `folder/index.json`, which says how many samples each tar below the folder has.

    Returns:
        How many samples there are, and a line for each tar with bad ones, which count, too.

    Raises:
        DataError: there are no tars, or one is damaged.
    """
    from ldm.checkpoint.io import atomic_file, write_json

    shards, bad = dict[str, dict[str, int]](), list[str]()
    for tar in sorted(folder.rglob("*.tar")):
        with readable(tar), tar.open("rb") as file:
            entries, damage = index_tar(file)
        if damage:
            raise DataError(f"{tar}: {damage}")
        if odd := [entry for entry in entries if entry.problem]:
            first = odd[0]
            bad.append(f"{tar}: {len(odd)} bad samples; the first is {first.key}: {first.problem}")
        name = tar.relative_to(folder).as_posix()
        shards[name] = {"samples": len(entries), "size": tar.stat().st_size}
    if not shards:
        raise DataError(f"{folder}: no tars there; give the folder of the shards")
    with atomic_file(folder / "index.json") as file:
        write_json(file, {"shards": shards})
    return sum(row["samples"] for row in shards.values()), bad


def _count(addresses: list[str]) -> list[Shard]:
    """The shards behind addresses, with what is known of each."""
    folder = os.path.commonprefix(addresses).rpartition("/")[0]
    files = _file_system(folder)

    def fetch(address: str) -> dict[str, Any]:
        return json_object(_patiently(address, lambda: files.cat_file(address)), address)

    def stats(address: str) -> dict[str, Any]:
        return {"samples": fetch(f"{address.removesuffix('.tar')}_stats.json")["successes"]}

    try:
        index = fetch(f"{folder}/index.json")["shards"]
        known = [index[address.removeprefix(f"{folder}/")] for address in addresses]
    except FileNotFoundError:
        try:
            with ThreadPoolExecutor(16) as pool:
                known = list(pool.map(stats, addresses))
        except (FileNotFoundError, KeyError) as error:
            raise DataError(
                f"{folder}: no index.json and no statistics of img2dataset say how many samples its"
                " shards have; where they lie, run: python scripts/prepare_data.py FOLDER"
            ) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}/index.json: says nothing of {error}; {ANEW}") from error
    try:
        return [
            Shard(number, address, name, int(row["samples"]), int(row.get("size", 0)))
            for number, (address, name, row) in enumerate(
                zip(addresses, shard_stems(addresses), known, strict=True)
            )
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}/index.json: is damaged ({error}); {ANEW}") from error


def _file_system(address: str) -> Any:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: cannot be read ({error})") from error


def _patiently(address: str, call: Callable[[], Result]) -> Result:
    """Try a few times, but not for something that is not there.

    Raises:
        DataError: it never worked.
        FileNotFoundError: there is no such thing.
    """
    for wait in (*BACKOFF, None):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own
            if wait is None:
                said = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"{address}: cannot be fetched ({said})") from error
            time.sleep(wait)
    raise AssertionError
