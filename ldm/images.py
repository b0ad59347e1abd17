"""Pictures: read, as tensors, as grids."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

from ldm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation. Source: EXIF 2.32, tag 0x0112."""


def read_image(file: str | Path) -> Image.Image:
    """A picture of any kind, as `to_rgb` shows it.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"no file {file}; give a picture") from None
    except (OSError, DataError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: upright, on white, 8 bits a channel, RGB.

    EXIF rotation is applied; whatever is transparent is laid over white; 16-bit grey is scaled by
    1 / 257; 1-bit, palette, grey and CMYK pictures are converted.

    Raises:
        DataError: the pixels cannot be read, or are floating-point numbers.
    """
    if image.mode == "F":
        raise DataError(
            "floating-point pixels have no agreed white; save the picture with 8 or 16 bits"
        )
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        image = image.copy() if turn is None else image.transpose(turn)
        for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(name, None)  # it has been applied; nothing reads it a second time
        if image.mode.startswith("I"):
            return _from_deep_grey(image)
        if image.has_transparency_data:
            # Resampling comes later, so that hidden colours never bleed into the visible ones.
            colors = image.convert("RGBA")
            white = Image.new("RGBA", colors.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, colors).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise whatever it is that trips them
        raise DataError(f"the picture is damaged or cut short ({error})") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as `to_rgb` will make a picture that was opened, of its header alone."""
    width, height = image.size
    swapped = image.format == "TIFF"  # by Pillow, which turns these
    return (height, width) if _orientation(image) >= 5 and not swapped else (width, height)


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF or XMP have it; damage there turns nothing."""
    try:
        # The base class's method: PNG's own decodes the pixels to look for EXIF behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey, in any of PIL's integer modes, to RGB; PIL itself would clip it at 255."""
    import numpy as np

    grey = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def from_pil(image: Image.Image) -> Tensor:
    """An RGB picture as float32 3 h w in [-1, 1], on the CPU."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Tensors b 3 h w in [-1, 1] (values outside are clamped) to 8-bit RGB pictures."""
    import torch

    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level) for level in levels.permute(0, 2, 3, 1).cpu().numpy()]


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, gap: int = 2
) -> Image.Image:
    """Pictures of one size in rows on white.

    Args:
        images: at least one.
        columns: pictures a row; as square as can be when not given.
        gap: pixels between them.
    """
    columns = columns or ceil(len(images) ** 0.5)
    rows = ceil(len(images) / columns)
    width, height = images[0].size
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
