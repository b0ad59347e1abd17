"""What can be done with a pipeline beyond one picture: outpainting, interpolation, strips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import inputs
from ldm.config import LongPrompts
from ldm.errors import ConfigError
from ldm.images import image_grid, to_rgb
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import image_generator, image_noise, slerp


def outpainting(
    image: Image.Image,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    factor: int = 8,
) -> tuple[Image.Image, Image.Image]:
    """A larger picture with the given one in it, and the mask that paints what is around it.

    Args:
        image: what to paint around; it keeps its size.
        left: pixels to add there, as for the other three sides.
        right: a few more are added where the sum is no multiple of `factor`.
        top: see `left`.
        bottom: see `right`.
        factor: picture pixels to a latent pixel, of the VAE.

    Returns:
        The picture, its border pixels continued outwards, and the mask, white around the picture:
        `image` and `mask_image` of a call.

    Raises:
        ConfigError: nothing is added, or less than nothing.
    """
    if min(left, right, top, bottom) < 0 or not any((left, right, top, bottom)):
        raise ConfigError(
            f"outpainting by {left}, {right}, {top} and {bottom} pixels (left, right, top, bottom);"
            " add a positive number on one side at least"
        )
    pixels = np.asarray(to_rgb(image))  # H W 3
    right += -(left + pixels.shape[1] + right) % factor
    bottom += -(top + pixels.shape[0] + bottom) % factor
    sides = ((top, bottom), (left, right))
    kept = np.zeros(pixels.shape[:2], dtype=np.uint8)
    return (
        Image.fromarray(np.pad(pixels, (*sides, (0, 0)), mode="edge")),
        Image.fromarray(np.pad(kept, sides, constant_values=255)),
    )


def interpolate(
    pipeline: LatentDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    *,
    negative_prompts: Sequence[str] = ("",),
    loop: bool = False,
    batch_size: int = 8,
    clip_skip: int | None = None,
    prompt_weights: bool = True,
    long_prompts: LongPrompts = "truncate",
    **options: Any,
) -> Iterator[Image.Image]:
    """Pictures on the way from one (prompt, seed) to the next, as they are drawn.

    The starting noise turns on the great circle between those of two seeds, the contexts move on
    the straight line between those of two prompts. A picture at a key is the one that the pipeline
    draws for that prompt and seed; of a stochastic sampler, only that at the first key, for the
    noise that it adds is the first key's in every frame, lest the pictures flicker.

    Args:
        pipeline: the model.
        prompts: of the keys, in order; one for all, or one a key.
        seeds: of the keys, likewise.
        frames: pictures in all, the first and the last key's included.
        negative_prompts: of the keys, likewise.
        loop: go back to the first key, whose picture does not come twice.
        batch_size: pictures drawn at a time.
        clip_skip: of the pipeline's call, like the next two and `options`.
        prompt_weights: see there.
        long_prompts: see there; all frames have as many chunks as the longest prompt.
        options: anything else of the call.

    Raises:
        ConfigError: fewer than two keys or frames, or the numbers of prompts and seeds do not fit.
    """
    keys = max(map(len, (prompts, seeds, negative_prompts)))
    numbers = {len(prompts), len(seeds), len(negative_prompts)}
    if numbers - {1, keys} or keys < 2 or frames < 2:
        raise ConfigError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {frames} frames; give two keys or more"
            " (one prompt or one seed may serve them all) and two frames or more"
        )
    contexts = pipeline.encode_prompts(
        [*prompts, *negative_prompts],
        clip_skip=clip_skip,
        prompt_weights=prompt_weights,
        long_prompts=long_prompts,
    )
    contexts = pipeline.equal_length(contexts, clip_skip)
    shape = pipeline.latent_shape(options.get("height"), options.get("width"))
    start = inputs.start((len(seeds), *shape), seed=list(seeds))
    tracks = (
        start.noise,
        torch.stack(contexts[: len(prompts)]),
        torch.stack(contexts[len(prompts) :]),
    )
    noise, context, negative = (
        torch.cat([track, track[:1]]) if loop else track
        for track in (track.expand(keys, *track.shape[1:]) for track in tracks)
    )
    places = np.linspace(0, len(noise) - 1, frames, endpoint=not loop).tolist()
    ways = [(min(int(place), len(noise) - 2), place) for place in places]

    def draw() -> Iterator[Image.Image]:
        for first in range(0, frames, batch_size):
            part = [(key, place - key) for key, place in ways[first : first + batch_size]]
            yield from pipeline(
                prompt_embeds=torch.stack([context[k].lerp(context[k + 1], t) for k, t in part]),
                negative_prompt_embeds=torch.stack(
                    [negative[k].lerp(negative[k + 1], t) for k, t in part]
                ),
                latents=torch.cat([slerp(noise[k][None], noise[k + 1][None], t) for k, t in part]),
                generator=[_after_the_start(seeds[0], shape) for _ in part],
                clip_skip=clip_skip,
                **options,
            ).images

    return draw()


def _after_the_start(seed: int, shape: tuple[int, ...]) -> torch.Generator:
    """A seed's generator when the starting noise has been drawn from it."""
    generator = image_generator(seed)
    image_noise(generator, shape)
    return generator


def step_strip(
    pipeline: LatentDiffusionPipeline,
    prompt: str,
    steps: Sequence[int],
    *,
    seed: int,
    **options: Any,
) -> Image.Image:
    """One picture after each of these numbers of steps, side by side, from the same noise."""
    return image_grid(
        [
            pipeline(prompt, seed=seed, num_inference_steps=number, **options).images[0]
            for number in steps
        ],
        columns=len(steps),
    )


def denoising_strip(
    pipeline: LatentDiffusionPipeline, prompt: str, columns: int, *, seed: int, **options: Any
) -> Image.Image:
    """How a picture comes about: what a step was given above, the x0 it predicted below.

    Args:
        pipeline: the model.
        prompt: what to draw.
        columns: steps to show, the first and the last among them.
        seed: of the picture.
        options: anything else of the pipeline's call.

    Raises:
        ConfigError: more columns than there are steps, or none.
    """
    noisy = [
        image_noise(
            image_generator(seed),
            pipeline.latent_shape(options.get("height"), options.get("width")),
        )[None]
    ]
    predicted = list[Tensor]()

    def watch(pipeline: Any, step: int, timestep: float, state: dict[str, Tensor]) -> dict:
        noisy.append(state["latents"])
        predicted.append(state["pred_original_sample"])
        return {}

    pipeline(prompt, seed=seed, output_type="latent", callback_on_step_end=watch, **options)
    steps = len(predicted)
    if not 1 <= columns <= steps:
        raise ConfigError(f"{columns} columns of {steps} steps; show between 1 and {steps}")
    shown = np.linspace(0, steps - 1, columns).round().astype(int)
    rows = [torch.cat([row[i].cpu() for i in shown]) for row in (noisy, predicted)]
    return image_grid([image for row in rows for image in pipeline.decode(row)], columns=columns)
