"""Latents and text embeddings of a whole data set, computed once before training.

What is kept of a picture is the distribution of its latents, not a sample: training still draws
from the posterior anew at every visit.

Legend: s samples of the data set, l channels of the latents, h w their height and width, m
different captions, n d tokens and width of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_encoder import TextEncoder

BATCH = 64


@dataclass(frozen=True)
class LatentCache:
    """A data set as the U-Net sees it, in memory.

    Attributes:
        moments: means and log-variances of the raw latents, float32, s 2l h w.
        contexts: embeddings of the different captions, float32, m n d; the first is that of "".
        caption: for each sample its row of `contexts`, s.
    """

    moments: Tensor
    contexts: Tensor
    caption: tuple[int, ...]


@torch.no_grad()
def encode_source(
    load: Callable[[int], tuple[Tensor, str]],
    count: int,
    vae: AutoencoderKL,
    text_encoder: TextEncoder,
    device: torch.device,
) -> LatentCache:
    """Encode every picture and every caption of a source.

    Args:
        load: from an index to the prepared picture, 3 h w in [-1, 1], and its caption.
        count: samples in the source.
        vae: on `device`.
        text_encoder: on `device`.
        device: where to compute; the cache itself is on the CPU, in memory: a float32 context
            for each different caption (at SD's 77 x 768, 0.24 MB) and the moments of each picture.

    Raises:
        DataError: a picture cannot be read.
    """
    moments, rows, caption = [], {"": 0}, []
    for start in tqdm(range(0, count, BATCH), desc="caching latents", mininterval=1.0):
        samples = [load(i) for i in range(start, min(start + BATCH, count))]
        posterior = vae.encode(torch.stack([pixels for pixels, _ in samples]).to(device))
        moments.append(
            torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()
        )  # b 2l h w
        caption += [rows.setdefault(words, len(rows)) for _, words in samples]
    captions = list(rows)
    contexts = [
        text_encoder.encode(captions[start : start + BATCH]).float().cpu()
        for start in range(0, len(captions), BATCH)
    ]
    return LatentCache(torch.cat(moments), torch.cat(contexts), tuple(caption))
