"""From a stored picture to the network's input: one function, the same in training and measuring.

Letters: b batch, c channels, h height, w width; pictures are h w c as arrays, c h w as tensors.
"""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from PIL import Image, ImageOps

from ldm.errors import ConfigError, DataError, suggest
from ldm.images import from_pil, to_rgb
from ldm.rng import Draws

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def prepare(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    center_crop: bool = True,
    random_flip: bool = False,
    draws: Draws | None = None,
    interpolation: Interpolation = "lanczos",
    key: str = "",
) -> torch.Tensor:
    """Scale until the size is just covered, crop what stands out, perhaps mirror it.

    Args:
        image: any picture; a smaller one is enlarged.
        size: height and width, or the side of a square, in pixels.
        center_crop: cut out the middle; otherwise a place that `draws` chooses.
        random_flip: mirror left and right, half of the times, by `draws`.
        draws: the sample's own random numbers. Always three are taken, whatever is asked for.
        interpolation: the filter; all of them are antialiased but `nearest`.
        key: the sample's name, for error messages.

    Returns:
        float32 in [-1, 1], of shape (3, height, width).

    Raises:
        ConfigError: the filter does not exist, or something random is asked for without draws.
        DataError: the pixels cannot be read, or the picture is too long and thin to be scaled.
    """
    name = interpolation.upper()
    if name not in Image.Resampling.__members__:
        raise ConfigError(
            f"interpolation: {interpolation!r} is no filter;"
            f" {suggest(interpolation, map(str.lower, Image.Resampling.__members__))}"
        )
    if draws is None and (random_flip or not center_crop):
        raise ConfigError("random_flip and a random crop need draws")
    where = f"{key}: " if key else ""
    try:
        image = to_rgb(image)
    except DataError as error:
        raise DataError(f"{where}{error}") from error
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(width / image.width, height / image.height)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if scaled[0] * scaled[1] > (Image.MAX_IMAGE_PIXELS or inf):
        raise DataError(
            f"{where}{image.width} x {image.height} pixels are too long and thin to fill"
            f" {width} x {height}"
        )
    across, down, mirror = (0.5, 0.5, 1.0) if draws is None else draws.uniform(3).tolist()
    if center_crop:
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    else:
        left, top = int(across * (scaled[0] - width + 1)), int(down * (scaled[1] - height + 1))
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling[name])
    image = image.crop((left, top, left + width, top + height))
    if random_flip and mirror < 0.5:
        image = ImageOps.mirror(image)
    return from_pil(image)


def is_mirrored(draws: Draws) -> bool:
    """Whether `prepare`, given the same draws, would mirror the picture."""
    return bool(draws.uniform(3)[2] < 0.5)
