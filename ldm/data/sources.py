"""Pictures with captions, from any of the usual layouts, behind one indexed `DataSource`.

    photos/x.jpg + photos/x.txt            CaptionFolder (kohya, OneTrainer, img2dataset `files`)
    photos/tulips/x.jpg, no captions       CaptionFolder: the folder's name is the caption
    photos/metadata.jsonl + x.jpg          MetadataFolder (Hugging Face imagefolder)
    00000.tar, {00000..00006}.tar, *.tar   TarShards (WebDataset, img2dataset)
    https://host/{00000..00006}.tar        StreamedShards
    00000.parquet, *.parquet               Table (the hub's layout, img2dataset)
    flowers                                the procedural flowers, drawn as they are asked for

A source is an immutable list with random access: sample order is arithmetic elsewhere
(`ldm.data.order`), which is what makes resuming exact. Every source can be pickled to the worker
processes of a DataLoader. Nothing that a data set holds is ever executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ldm.data.flowers import Flowers
from ldm.data.folders import CaptionFolder, MetadataFolder, files_below, has_pictures, shown
from ldm.data.sample import DataSource, Sample
from ldm.data.shards import TarShards, file_paths
from ldm.data.stored import DEFAULT, Reading, hashed
from ldm.data.streams import StreamedShards
from ldm.data.tables import open_parquet
from ldm.errors import ConfigError, DataError, suggest

logger = logging.getLogger(__name__)


class Subset:
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: DataSource, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.fingerprint = hashed([source.fingerprint], self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def caption(self, index: int) -> str:
        return self.source.caption(self.indices[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(self.indices[index])


def split_source(
    source: DataSource, validation_split: float, seed: int = 0
) -> tuple[DataSource, DataSource]:
    """Split a source into training and validation samples by a hash of each sample's key.

    A sample falls on the same side whatever its position and whatever else the data set holds, so
    that data added later never moves a validation picture into training. Of streamed shards whole
    ones fall on either side, by their names.

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
    streamed = isinstance(source, StreamedShards)
    keys = [s.name for s in source.shards] if streamed else map(source.key, range(len(source)))

    def draw(key: str) -> float:
        name = f"{seed}/{key}".encode(errors="surrogateescape")  # file names may be any bytes
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64

    draws = [draw(key) for key in keys]
    if len(draws) < 2:
        raise DataError(
            f"{len(draws)} {'shards' if streamed else 'samples'} cannot be split; add some, or set"
            " validation_split 0"
        )
    limit = min(max(validation_split, min(draws)), sorted(draws)[-2])
    train = [number for number, drawn in enumerate(draws) if drawn > limit]
    held = [number for number, drawn in enumerate(draws) if drawn <= limit]
    if streamed:
        return source.part(train), source.part(held)
    return Subset(source, train), Subset(source, held)


def first(source: DataSource, samples: int) -> DataSource:
    """The first so many samples of a source, or all."""
    if isinstance(source, StreamedShards):
        return source.part(range(len(source.shards)), samples)
    return Subset(source, range(min(samples, len(source))))


def open_source(
    path: str | os.PathLike[str], reading: Reading = DEFAULT, *, split: str = "train"
) -> DataSource:
    """Open a data set by what is there; see the top of this file for the layouts.

    Args:
        path: a folder, a .tar or .parquet file, a glob or brace pattern of these, an address of
            tars, or `flowers`.
        reading: names of columns and the like.
        split: which of the procedural flowers: `train`, `validation` or `held_out`; of a folder
            with subfolders of such names, the one to read.

    Raises:
        ConfigError: an address that cannot be streamed from.
        DataError: nothing usable is there.
    """
    root, name = Path(path), os.fspath(path)
    if name == "flowers":
        if root.is_dir():
            logger.warning("flowers is the built-in set; write ./flowers for the folder")
        return Flowers(split=split)
    if re.match(r"[a-z0-9+]{2,}:", name) and not root.exists():
        return StreamedShards(name, reading)
    if any(sign in name for sign in "*?[{") and not root.exists():
        if root.suffix == ".parquet":
            return open_parquet(file_paths(name, ".parquet"), reading)
        return TarShards(path, reading)
    if not root.exists():
        raise DataError(f"{path}: no such file or folder (or write `flowers` for the built-in set)")
    if root.is_file():
        if root.suffix == ".parquet":
            return open_parquet([name], reading)
        if root.suffix != ".tar":
            raise DataError(
                f"{path}: is a file but no .tar or .parquet; give the folder of the pictures"
            )
        return TarShards(root, reading)
    folders = {child.name for child in root.iterdir() if child.is_dir() and shown(child.name)}
    # A class of pictures may be called `train`, too: then it has neighbours that are no splits.
    if split in folders and folders <= {"train", "validation", "val", "test", "held_out"}:
        root = root / split
    elif split != "train":
        raise DataError(f"{root}: has no split {split!r}; {suggest(split, folders)}")
    if any(root.glob("*.tar")):
        return TarShards(root, reading)
    if files_below(root, "metadata.jsonl"):
        return MetadataFolder(root, reading)
    # img2dataset leaves tables beside its pictures, too.
    if not has_pictures(root) and (tables := files_below(root, "*.parquet")):
        return open_parquet([str(table) for table in tables], reading)
    return CaptionFolder(root, reading)
