"""Pictures as tensors, as grids, and as files that say how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from torch import Tensor


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


def parameters_text(prompt: str, negative_prompt: str, seed: int, settings: dict[str, Any]) -> str:
    """How a picture was made, in the words of AUTOMATIC1111's web UI.

    Args:
        prompt: what was drawn.
        negative_prompt: what was not.
        seed: the picture's own.
        settings: of `PipelineOutput`.
    """
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    extras = ("eta", "variance", "guidance_rescale", "clip_skip")
    shown = {name.capitalize().replace("_", " "): settings.get(name) for name in extras}
    return (
        f"{prompt}\n{negative}Steps: {settings['num_inference_steps']},"
        f" Sampler: {settings['sampler']}, Schedule type: {settings['timestep_spacing']},"
        f" CFG scale: {settings['guidance_scale']}, Seed: {seed},"
        f" Size: {settings['width']}x{settings['height']}"
        + "".join(f", {name}: {value}" for name, value in shown.items() if value)
    )


def save_png(image: Image.Image, file: Path, parameters: str | None = None) -> None:
    """Write a PNG, with the text chunk `parameters` in which AUTOMATIC1111's web UI keeps settings.

    The chunk is iTXt, UTF-8, so prompts in any script survive.
    """
    info = PngInfo()
    if parameters:
        info.add_itxt("parameters", parameters)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, pnginfo=info)


def read_parameters(file: Path) -> str | None:
    """The `parameters` chunk of a PNG; None where it has none."""
    with Image.open(file) as image:
        text = image.info.get("parameters")
    return str(text) if text is not None else None
