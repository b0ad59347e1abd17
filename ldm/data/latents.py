"""Latents and text embeddings of a whole data set, written to disk once, before training.

    FOLDER/latents-00000.safetensors    of 512 samples each
               <index>.moments              means and log-variances of the raw latents, 2l h w
               <index>.flipped              the same of the mirrored picture, where a run mirrors
               contexts                     of the shard's different captions, m n d; first of ""
               captions                     each sample's row of contexts; -1 where it is bad

What is kept of a picture is the distribution of its latents, not a sample: training still draws
from the posterior anew at every visit. A shard is written whole or not at all, with the sum of its
numbers and what it was made of: a killed run goes on where it was, and a damaged shard is written
again, as is one with bad samples that can be read now, but what something else has made is refused.

Legend: b batch, l channels of the latents, h w their height and width, m different captions, n d
tokens and width of the context.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.io import atomic_file, read_tensors, tensors_sha256, write_tensors
from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.data.streams import StreamedShards
from ldm.errors import CheckpointError, DataError
from ldm.metadata import json_sha256
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

FORMAT = "1"
SHARD = 512  # samples
PIXELS = 2**20  # encoded at a time, at most
CAPTIONS = 64  # likewise


@dataclass(frozen=True)
class LatentCache:
    """A data set as the U-Net sees it, on disk: files are mapped anew in every process.

    Attributes:
        folder: what `write_cache` has filled.
    """

    folder: Path

    def read(
        self, index: int, *, flipped: bool = False, empty: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One sample's moments, 2l h w, and its context, n d; float32.

        Args:
            index: which sample.
            flipped: of the mirrored picture.
            empty: the context of "" instead of the caption's.

        Raises:
            DataError: the sample could not be read when the cache was written.
        """
        shard = _open(_file(self.folder, index // SHARD))
        row = int(shard.get_slice("captions")[index % SHARD])
        if row < 0:
            raise DataError(json.loads(shard.metadata()["bad"])[str(index)])
        moments = shard.get_tensor(f"{index}.{'flipped' if flipped else 'moments'}")  # 2l h w
        return moments, shard.get_slice("contexts")[0 if empty else row]


def cache_key(
    vae: AutoencoderKL, text_encoder: TextEncoder, source: DataSource, preprocessing: str
) -> dict[str, str]:
    """What a cache is made of, as hashes: where one differs, so do latents or embeddings.

    Args:
        vae: encodes the pictures.
        text_encoder: encodes the captions.
        source: gives both.
        preprocessing: what becomes of a picture before it is encoded, in words.
    """
    parts = {
        "VAE": [tensors_sha256(vae.state_dict()), asdict(vae.config)],
        "text encoder": [tensors_sha256(text_encoder.state_dict()), text_encoder.settings()],
    }
    return {
        "format": FORMAT,
        **{name: json_sha256(part)[:12] for name, part in parts.items()},
        "data set": f"{len(source)} samples, {source.fingerprint[:12]}",
        "set of captions": _captions_sha256(source)[:12],
        "preprocessing": preprocessing,
    }


def _captions_sha256(source: DataSource) -> str:
    """Of the words, which may change and keep their length; for streams the column must do."""
    words = sha256()
    for index in range(0 if isinstance(source, StreamedShards) else len(source)):
        try:
            words.update(source.caption(index).encode())
        except DataError as error:
            words.update(str(error).encode(errors="surrogateescape"))
        words.update(b"\0")  # no caption holds one
    return words.hexdigest()


class Team(NamedTuple):
    """The processes that write a cache together.

    Attributes:
        rank: which of them this one is.
        world: how many there are.
        barrier: waits until all have come here.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None


ALONE = Team()


def write_cache(
    folder: Path,
    key: dict[str, str],
    places: Sequence[Place],
    load: Callable[[list[Place]], AbstractContextManager[Iterable[Any]]],
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    *,
    flips: bool,
    team: Team = ALONE,
) -> LatentCache:
    """Write what is missing of a cache, on every process its share of the shards.

    Args:
        folder: where to.
        key: of `cache_key`.
        places: every sample of the data set, in order, with the size it is cropped to.
        load: from places to a batch of one for each of them: a dict with `pixels`, 1 3 H W in
            [-1, 1], `caption` and `bad`, why the sample cannot be read and another stands in; such
            a sample is kept as this error, which is raised when it is asked for.
        encode: from pixels b 3 H W to moments b 2l h w.
        embed: from captions to contexts b n d.
        flips: keep the mirrored pictures, too.
        team: whose share of the shards this process writes.

    Raises:
        CheckpointError: the folder holds the cache of something else, or the disk is full.
        DataError: of `load`.
    """
    shards = [places[start : start + SHARD] for start in range(0, len(places), SHARD)]
    files = [_file(folder, number) for number in range(len(shards))]
    for file in files:
        _check_key(file, key)
    mine = range(team.rank, len(shards), team.world)
    whole = {n: json.loads(_metadata(files[n])["bad"]) for n in mine if _is_whole(files[n])}
    # What could not be read when they were written may be there now.
    if bad := [place for n in whole for place in shards[n] if str(place.index) in whole[n]]:
        with load(bad) as items:
            for place, item in zip(bad, items, strict=True):
                if not item["bad"][0]:
                    whole.pop(place.index // SHARD, None)
    if missing := [number for number in mine if number not in whole]:
        wanted = [place for number in missing for place in shards[number]]
        quiet = {"mininterval": 1.0, "disable": team.rank > 0}
        with load(wanted) as items, tqdm(items, "caching latents", len(wanted), **quiet) as bar:
            batches = iter(bar)
            for number in missing:
                tensors, bad = _encode(shards[number], batches, encode, embed, flips=flips)
                metadata = {"key": json.dumps(key), "bad": json.dumps(bad)}
                metadata["sha256"] = tensors_sha256(tensors)
                with atomic_file(files[number]) as temporary:
                    write_tensors(temporary, tensors, metadata)
    team.barrier()
    _open.cache_clear()
    return LatentCache(folder)


@torch.no_grad()
def _encode(
    places: Sequence[Place],
    batches: Iterator[Any],
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    *,
    flips: bool,
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """A shard's tensors, and the errors of its bad samples."""
    tensors, bad = dict[str, Tensor](), dict[int, str]()
    rows, captions = {"": 0}, torch.full((len(places),), -1)
    waiting = dict[torch.Size, dict[int, Tensor]]()  # pictures of one size

    def flush(pictures: dict[int, Tensor]) -> None:
        pixels = torch.cat(list(pictures.values()))  # b 3 H W
        views = {"moments": pixels, "flipped": pixels.flip(-1)} if flips else {"moments": pixels}
        for name, view in views.items():
            for index, moments in zip(pictures, encode(view).float().cpu(), strict=True):
                tensors[f"{index}.{name}"] = moments  # 2l h w

    for number, place in enumerate(places):
        batch = next(batches)
        if batch["bad"][0]:
            bad[place.index] = batch["bad"][0]
            continue
        captions[number] = rows.setdefault(batch["caption"][0], len(rows))
        pixels = batch["pixels"]
        pictures = waiting.setdefault(pixels.shape, {})
        pictures[place.index] = pixels
        if (len(pictures) + 1) * pixels[0, 0].numel() > PIXELS:
            flush(waiting.pop(pixels.shape))
    for pictures in waiting.values():
        flush(pictures)
    words = list(rows)
    parts = [embed(words[i : i + CAPTIONS]).float().cpu() for i in range(0, len(words), CAPTIONS)]
    return tensors | {"contexts": torch.cat(parts), "captions": captions}, bad


def _file(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


@lru_cache(maxsize=256)  # of one process; each keeps the names of its tensors
def _open(file: Path) -> Any:
    return safe_open(file, "pt")


def _metadata(file: Path) -> dict[str, str]:
    """What a shard says of itself."""
    with safe_open(file, "pt") as shard:
        return shard.metadata() or {}


def _check_key(file: Path, key: dict[str, str]) -> None:
    """Refuse a shard that something else has made, and any other file in its place."""
    try:
        metadata = _metadata(file)
    except (SafetensorError, OSError):  # damaged, or not there
        return
    if not {"key", "bad", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"{file} is of no cache of latents; move it or choose another latent_cache_dir"
        )
    then = json.loads(metadata["key"])
    for name, now in key.items():
        if then.get(name) != now:
            raise CheckpointError(
                f"{file.parent} was made with another {name} ({then.get(name)} then, {now} now);"
                " delete it or choose another latent_cache_dir"
            )


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        if tensors_sha256(read_tensors(file)) == _metadata(file)["sha256"]:
            return True
    except CheckpointError:
        pass
    logger.warning("%s is damaged; it is written again", file)
    return False
