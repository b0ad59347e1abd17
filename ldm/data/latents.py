"""Latents and text embeddings of a whole data set, written to disk once, before training.

    FOLDER/latents-00000.safetensors    of 512 samples each
               <index>.moments              means and log-variances of the raw latents, 2l h w
               <index>.flipped              the same of the mirrored picture, where a run mirrors
               contexts                     of the shard's different captions, m n d; first of ""
               captions                     each sample's row of contexts; -1 where it is bad
           index.json                   written last: what all was made of, the sums of the shards

What is kept of a picture is the distribution of its latents, not a sample: training still draws
from the posterior anew at every visit. A shard is written whole or not at all, with the sum of its
numbers and what it was made of: a killed run goes on where it was, and a damaged shard is written
again, but what something else has made is refused.

Legend: b batch, l channels of the latents, h w their height and width, m different captions, n d
tokens and width of the context.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.folder import transformers_tower
from ldm.checkpoint.io import atomic_file, read_tensors, tensors_sha256, write_json, write_tensors
from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.errors import CheckpointError, DataError
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
    tower = transformers_tower(text_encoder)
    tokenizer = json.loads(tower.tokenizer.backend_tokenizer.to_str())
    names = ("model", "normalizer", "pre_tokenizer")
    tower_config = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    parts = {
        "VAE": [tensors_sha256(vae.state_dict()), asdict(vae.config)],
        "text encoder": [
            tensors_sha256(text_encoder.state_dict()),
            [getattr(tower.model.config, name) for name in tower_config],
            [text_encoder.skip, tower.max_tokens, tower.start, tower.end, tower.padding],
            [tokenizer[name] for name in names],
        ],
    }
    return {
        "format": FORMAT,
        **{name: short_hash(part) for name, part in parts.items()},
        "data set": f"{len(source)} samples, {source.fingerprint[:12]}",
        "preprocessing": preprocessing,
    }


def short_hash(content: Any) -> str:
    """The beginning of the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def write_cache(
    folder: Path,
    key: dict[str, str],
    places: Sequence[Place],
    load: Callable[[list[Place]], Iterable[Any]],
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    *,
    flips: bool,
    skip: bool,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> LatentCache:
    """Write what is missing of a cache, on every process its share of the shards.

    Args:
        folder: where to.
        key: of `cache_key`.
        places: every sample of the data set, in order, with the size it is cropped to.
        load: from places to their items, one after the other: a dict with `pixels`, 3 H W in
            [-1, 1], and `caption`; or the `DataError` of a bad sample.
        encode: from pixels b 3 H W to moments b 2l h w.
        embed: from captions to contexts b n d.
        flips: keep the mirrored pictures, too.
        skip: a bad sample is kept as its error, which is raised when it is asked for.
        rank: which of the processes this one is.
        world: how many there are.
        barrier: waits until all have come here.

    Raises:
        CheckpointError: the folder holds the cache of something else, or the disk is full.
        DataError: a sample is bad, without `skip`.
    """
    shards = [places[start : start + SHARD] for start in range(0, len(places), SHARD)]
    files = [_file(folder, number) for number in range(len(shards))]
    for file in files:
        _check_key(file, key)
    missing = [number for number in range(rank, len(shards), world) if not _is_whole(files[number])]
    wanted = [place for number in missing for place in shards[number]]
    progress = tqdm(
        load(wanted),
        "caching latents",
        len(wanted),
        mininterval=1.0,
        disable=not wanted or rank > 0,
    )
    items = iter(progress)
    for number in missing:
        tensors, bad = _encode(shards[number], items, encode, embed, flips=flips, skip=skip)
        metadata = {"key": json.dumps(key), "bad": json.dumps(bad)}
        with atomic_file(files[number]) as temporary:
            write_tensors(temporary, tensors, metadata | {"sha256": tensors_sha256(tensors)})
    progress.close()
    barrier()
    _open.cache_clear()
    if rank == 0:
        sums = {file.name: _metadata(file)["sha256"] for file in files}
        with atomic_file(folder / "index.json") as temporary:
            write_json(temporary, {"made_of": key, "samples": len(places), "shards": sums})
    return LatentCache(folder)


@torch.no_grad()
def _encode(
    places: Sequence[Place],
    items: Iterable[Any],
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    *,
    flips: bool,
    skip: bool,
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """A shard's tensors, and the errors of its bad samples."""
    tensors, bad = dict[str, Tensor](), dict[int, str]()
    rows, captions = {"": 0}, torch.full((len(places),), -1)
    waiting = dict[torch.Size, dict[int, Tensor]]()  # pictures of one size

    def flush(pictures: dict[int, Tensor]) -> None:
        pixels = torch.stack(list(pictures.values()))  # b 3 H W
        views = {"moments": pixels, "flipped": pixels.flip(-1)} if flips else {"moments": pixels}
        for name, view in views.items():
            for index, moments in zip(pictures, encode(view).float().cpu(), strict=True):
                tensors[f"{index}.{name}"] = moments  # 2l h w

    for number, (place, item) in enumerate(zip(places, items, strict=False)):
        if isinstance(item, DataError):
            if not skip:
                raise item
            bad[place.index] = str(item)
            continue
        captions[number] = rows.setdefault(item["caption"], len(rows))
        pixels = item["pixels"]
        pictures = waiting.setdefault(pixels.shape, {})
        pictures[place.index] = pixels
        if (len(pictures) + 1) * pixels[0].numel() > PIXELS:
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
    """What a shard says of itself; nothing where it is damaged or not there."""
    try:
        with safe_open(file, "pt") as shard:
            return shard.metadata()
    except (SafetensorError, OSError):
        return {}


def _check_key(file: Path, key: dict[str, str]) -> None:
    """Refuse a shard that something else has made."""
    then = json.loads(_metadata(file).get("key", "null")) or key
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
        if tensors_sha256(read_tensors(file)) == _metadata(file).get("sha256"):
            return True
    except CheckpointError:
        pass
    logger.warning("%s is damaged; it is written again", file)
    return False
