"""What a call of the pipeline is given, checked and made into tensors.

Legend: b pictures, l channels of the latents, h w their height and width, H W the pictures' own.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.config import LongPrompts, SamplerName, Spacing, Variance
from ldm.diffusion.samplers import SamplerSpec, get_sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError, suggest
from ldm.images import from_pil, to_rgb
from ldm.rng import image_generator, image_noise, slerp

ImageInput = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor
"""One picture or several: PIL; an array b H W 3 or H W 3, or a tensor b 3 H W or 3 H W, in [0, 1];
or scaled latents b l h w. Whatever a call returns as `.images` can be given to another."""


@dataclass(frozen=True)
class Settings:
    """How a call draws: its arguments, less what is drawn and from which noise.

    Attributes are those of `LatentDiffusionPipeline.__call__`, none of them open any more;
    `strength` is None where there is no image.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    num_inference_steps: int
    sampler: SamplerName
    timestep_spacing: Spacing
    guidance_scale: float
    width: int
    height: int
    variance: Variance
    strength: float | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    dynamic_threshold: tuple[float, float] | None = None
    eta: float = 0.0
    clip_skip: int | None = None
    long_prompts: LongPrompts = "truncate"
    prompt_weights: bool = True

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; it must be in [0, 1]")
        if not isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale is {self.guidance_scale}; give a number")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        low, high = self.guidance_interval or (0, 1)
        if not 0 <= low < high:
            raise ConfigError(
                f"guidance_interval is {low} to {high}; it must run from 0 or more up"
            )
        percentile, limit = self.dynamic_threshold or (1, 1)
        if not (0 < percentile <= 1 and 0 < limit < inf):
            raise ConfigError(
                f"dynamic_threshold is {percentile} and {limit}; the percentile must be in (0, 1],"
                " the limit above 0"
            )
        for name, choices in (("variance", Variance), ("long_prompts", LongPrompts)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ConfigError(
                    f"there is no {name} '{value}'; {suggest(value, get_args(choices))}"
                )
        get_sampler(self.sampler)

    @property
    def from_noise(self) -> bool:
        """Whether the sampler starts from noise alone."""
        return self.strength is None or self.strength == 1

    @property
    def sampler_options(self) -> dict[str, Any]:
        """The settings that only some samplers have, as far as this one has them."""
        options = {"eta": self.eta, "variance": self.variance}
        return {k: v for k, v in options.items() if k in get_sampler(self.sampler).options}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the call: those without a default, and those not at theirs."""
        unused = {"eta", "variance"} - self.sampler_options.keys()
        return {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default and f.name not in unused
        }

    def grid(self, schedule: NoiseSchedule) -> Tensor:
        """The noise levels to visit, descending, float64; a single 0 at strength 0.

        Raises:
            ConfigError: there is no such grid.
        """
        spec, strength = get_sampler(self.sampler), 1.0 if self.strength is None else self.strength
        if strength == 0:
            return torch.zeros(1, dtype=torch.float64)
        if self.timesteps is None and self.sigmas is None:
            return spec.grid(
                schedule, self.num_inference_steps, self.timestep_spacing, strength=strength
            )
        grid = self._own_grid(schedule, spec)
        kept = int((len(grid) - 1) * strength)
        if kept < 1:
            raise ConfigError(f"strength {strength} of {len(grid) - 1} steps leaves none; raise it")
        return grid[-kept - 1 :]

    def _own_grid(self, schedule: NoiseSchedule, spec: SamplerSpec) -> Tensor:
        """The grid that the caller spells out; after timesteps the last step is the sampler's."""
        if self.timesteps is not None and self.sigmas is not None:
            raise ConfigError("give timesteps or sigmas, one of the two")
        name = "timesteps" if self.sigmas is None else "sigmas"
        values = [float(value) for value in getattr(self, name)]
        grid = torch.tensor(values, dtype=torch.float64)
        falls = bool((grid[1:] < grid[:-1]).all() and grid.isfinite().all())
        if not values or not falls or values[-1] < 0 or values == [0.0] * (name == "sigmas"):
            raise ConfigError(f"{name} must descend and not be below 0, not {values}")
        if name == "sigmas":
            return grid if grid[-1] == 0 else torch.cat([grid, grid.new_zeros(1)])
        last = schedule.config.num_train_timesteps - 1
        if values[0] > last:
            raise ConfigError(f"timesteps begin at {values[0]:g}; the schedule ends at {last}")
        final = spec.grid(schedule, 1, self.timestep_spacing)[-1:]
        return torch.cat([schedule.t_to_sigma(grid), final])


def as_list(text: str | Sequence[str] | None) -> list[str]:
    """One prompt or several as a list; none is the empty prompt.

    Raises:
        ConfigError: an empty list.
    """
    if text is None:
        return [""]
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ConfigError("the list of prompts is empty")
    return texts


class Start(NamedTuple):
    """The noise of a call's pictures, b l h w, and what it came from."""

    noise: Tensor
    generators: list[torch.Generator]
    seeds: list[int]
    variation_seeds: list[int]


def start(
    shape: tuple[int, ...],
    *,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float = 0.0,
) -> Start:
    """Draw each picture's noise from a generator of its own, or take the caller's.

    Args:
        shape: b l h w.
        seed: as in `LatentDiffusionPipeline.__call__`, like everything else.
        generator: instead.
        latents: the noise itself; later noise still comes from the generators.
        variation_seed: of the noise towards which each picture's own is turned.
        variation_strength: how far, in [0, 1].

    Raises:
        ConfigError: an argument that does not fit the number of pictures.
    """
    count = shape[0]
    if seed is not None and generator is not None:
        raise ConfigError("give seed or generator, one of the two")
    if not 0 <= variation_strength <= 1:
        raise ConfigError(f"variation_strength is {variation_strength}; it must be in [0, 1]")
    if bool(variation_strength) != (variation_seed is not None) or (
        variation_strength and latents is not None
    ):
        raise ConfigError(
            "give both variation_seed and variation_strength, or neither; and no latents with them"
        )
    if variation_strength and (seed is None or isinstance(seed, int | np.integer)):
        seed = _seeds("seed", seed, 1) * count
    seeds = _seeds("seed", seed, count) if generator is None else []
    if generator is None:
        generators = [image_generator(s) for s in seeds]
    else:
        one = isinstance(generator, torch.Generator)
        generators = [generator] * count if one else list(generator)
    if len(generators) != count:
        raise ConfigError(
            f"{len(generators)} generators for {count} pictures; give one, or one each"
        )
    for other in {g.device.type for g in generators} - {"cpu"}:
        raise ConfigError(f"generator is on {other}; noise is drawn on the CPU, make it there")
    if latents is None:
        latents = torch.stack([image_noise(g, shape[1:]) for g in generators])  # b l h w
    if tuple(latents.shape) != shape:
        raise ConfigError(f"latents have shape {tuple(latents.shape)}; this call needs {shape}")
    if not variation_strength:
        return Start(latents, generators, seeds, [])
    variations = _seeds("variation_seed", variation_seed, count)
    others = torch.stack([image_noise(image_generator(s), shape[1:]) for s in variations])
    turned = slerp(latents.cpu().float(), others, variation_strength)  # b l h w
    return Start(turned, generators, seeds, variations)


def size_of(image: ImageInput, factor: int, latent_channels: int) -> tuple[int, int]:
    """Height and width of the pictures in pixels, rounded down to multiples of the VAE's factor."""
    if isinstance(image, Tensor) and is_latents(image, latent_channels):
        return image.shape[-2] * factor, image.shape[-1] * factor
    pictures = _pictures(image)
    if pictures is not None:
        width, height = to_rgb(pictures[0]).size
    else:
        height, width = _tensor("image", image, channels=3).shape[-2:]
    return max(height // factor, 1) * factor, max(width // factor, 1) * factor


def is_latents(image: ImageInput, latent_channels: int) -> bool:
    """Whether these are scaled latents and not pictures; three channels are always a picture."""
    return (
        isinstance(image, Tensor)
        and image.ndim == 4
        and image.shape[1] == latent_channels
        and latent_channels != 3
    )


def to_pixels(image: ImageInput, height: int, width: int) -> Tensor:
    """Pictures as the VAE takes them, of this size.

    PIL pictures of another size are resized (Lanczos); transparency is laid on white.

    Returns:
        b 3 H W in [-1, 1], float32 on the CPU.

    Raises:
        ConfigError: an array or tensor of another shape or size, or outside [0, 1].
        DataError: a picture that cannot be read.
    """
    pictures = _pictures(image)
    if pictures is not None:
        return torch.stack([from_pil(_resized(to_rgb(p), height, width)) for p in pictures])
    pixels = _tensor("image", image, channels=3)  # b 3 H W
    if tuple(pixels.shape[-2:]) != (height, width):
        raise ConfigError(
            f"image is {pixels.shape[-1]}x{pixels.shape[-2]} and the picture {width}x{height};"
            " make them equal, or give a PIL image, which is resized"
        )
    return pixels * 2 - 1


def to_mask(mask: ImageInput, image: ImageInput, height: int, width: int) -> Tensor:
    """A mask in pixels: 1 where the picture is painted anew (white), 0 where it is kept (black).

    Returns:
        b 1 H W of zeros and ones, float32 on the CPU; grey counts as white from 128 on.

    Raises:
        ConfigError: a mask of another size than the image.
    """
    pictures = _pictures(mask)
    if pictures is None:
        tensor = _tensor("mask_image", mask, channels=1)  # b 1 H W
        if tuple(tensor.shape[-2:]) != (height, width):
            tensor = F.interpolate(tensor, (height, width))
        return (tensor >= 0.5).float()
    grey = [to_rgb(one).convert("L") for one in pictures]
    sizes = [to_rgb(of).size for of in _pictures(image) or []]
    for i in range(max(len(grey), len(sizes)) if sizes else 0):  # one may serve all the others
        (w, h), of = grey[i % len(grey)].size, sizes[i % len(sizes)]
        if (w, h) != of:
            raise ConfigError(f"mask_image is {w}x{h} and image {of[0]}x{of[1]}; make them equal")
    grey = [one.resize((width, height), Image.Resampling.NEAREST) for one in grey]
    levels = torch.stack([torch.from_numpy(np.array(one))[None] for one in grey])  # b 1 H W
    return (levels >= 128).float()


def per_picture(name: str, tensor: Tensor, count: int) -> Tensor:
    """One entry a picture; from one for all, or from one for as many pictures in a row.

    Raises:
        ConfigError: their numbers do not fit.
    """
    if not len(tensor) or count % len(tensor):
        raise ConfigError(f"{len(tensor)} {name}s for {count} pictures; give one, or one each")
    return tensor.repeat_interleave(count // len(tensor), 0)


def _seeds(name: str, seed: int | Sequence[int] | None, count: int) -> list[int]:
    """seed + i, or the list itself; from a random one for None."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    try:
        first = int(seed) if isinstance(seed, int | np.integer) else None
        seeds = [int(s) for s in seed] if first is None else [first + i for i in range(count)]  # type: ignore
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {seed!r}; give a whole number, or one a picture") from None
    if len(seeds) != count:
        raise ConfigError(
            f"{len(seeds)} {name}s for {count} pictures; give one number, or one each"
        )
    for wrong in (s for s in seeds if not 0 <= s < 2**63):
        raise ConfigError(f"{name} is {wrong}; it must lie between 0 and 2**63 - 1")
    return seeds


def _pictures(image: ImageInput) -> list[Image.Image] | None:
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, Tensor | np.ndarray):
        return None
    listed = isinstance(image, Sequence) and len(image) > 0
    if not listed or not all(isinstance(one, Image.Image) for one in image):
        raise ConfigError("image must be a PIL image, a list of them, an array or a tensor")
    return list(image)


def _tensor(name: str, image: Any, channels: int) -> Tensor:
    """b c H W in [0, 1] from a tensor (b) c H W, or from an array (b) H W c or H W."""
    if isinstance(image, np.ndarray):
        image = np.ascontiguousarray(image)
    tensor = torch.as_tensor(image).detach().float().cpu()
    if isinstance(image, np.ndarray):
        tensor = tensor[..., None] if tensor.ndim == 2 else tensor
        tensor = tensor.movedim(-1, -3)
    while tensor.ndim in (2, 3):
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.numel():
        raise ConfigError(
            f"{name} has shape {tuple(image.shape)}; a tensor must be b {channels} H W, an array"
            f" b H W {channels}"
        )
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= 0 and high <= 1):
        raise ConfigError(f"{name} has values from {low:g} to {high:g}; they must be in [0, 1]")
    return tensor


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)
