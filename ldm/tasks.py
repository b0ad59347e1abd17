"""What can be done with a pipeline beyond one picture: outpainting, interpolation, strips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import ConfigError
from ldm.images import image_grid, to_rgb
from ldm.pipeline import LatentDiffusionPipeline
from ldm.prompts import LongPrompts
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
    loop: bool = False,
    clip_skip: int | None = None,
    prompt_weights: bool = True,
    long_prompts: LongPrompts = "truncate",
    **options: Any,
) -> list[Image.Image]:
    """Pictures on the way from one (prompt, seed) to the next.

    The starting noise turns on the great circle between those of two seeds, the context moves on
    the straight line between those of two prompts. A picture at a key is the one that the pipeline
    draws for that prompt and seed.

    Args:
        pipeline: the model.
        prompts: of the keys, in order; one for all, or one a key.
        seeds: of the keys, likewise.
        frames: pictures in all, the first and the last key's included.
        loop: go back to the first key, whose picture does not come twice.
        clip_skip: of the pipeline's call, like the next two and `options`.
        prompt_weights: see there.
        long_prompts: see there.
        options: anything else of the call, `negative_prompt` for instance.

    Raises:
        ConfigError: fewer than two keys or frames, or as many prompts as seeds are not given.
    """
    keys = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, keys} or keys < 2 or frames < 2:
        raise ConfigError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {frames} frames; give two keys or more"
            " (one prompt or one seed may serve them all) and two frames or more"
        )
    encoder = pipeline.text_encoder
    contexts = encoder.contexts(
        list(prompts),
        clip_skip=clip_skip,
        prompt_weights=prompt_weights,
        long_prompts=long_prompts,
    )
    n = max(map(len, contexts))
    contexts = [encoder.pad(context, n, clip_skip) for context in contexts]
    shape = pipeline.latent_shape(options.get("height"), options.get("width"))
    noises = [image_noise(image_generator(seed), shape) for seed in seeds]
    contexts, noises = contexts * (keys // len(contexts)), noises * (keys // len(noises))
    if loop:
        contexts, noises = [*contexts, contexts[0]], [*noises, noises[0]]
    ends = len(noises) - 1
    latents, embeds = list[Tensor](), list[Tensor]()
    for place in np.linspace(0, ends, frames, endpoint=not loop).tolist():
        key = min(int(place), ends - 1)
        latents.append(slerp(noises[key][None], noises[key + 1][None], place - key)[0])
        embeds.append(torch.lerp(contexts[key], contexts[key + 1], place - key))
    return pipeline(
        prompt_embeds=torch.stack(embeds),
        latents=torch.stack(latents),
        seed=[seeds[0]] * frames,  # what a stochastic sampler adds is the same in every frame
        clip_skip=clip_skip,
        prompt_weights=prompt_weights,  # of the negative prompt
        long_prompts=long_prompts,
        **options,
    ).images


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
