"""The two sides of drawing: the same numbers go into ldm and into diffusers, and pictures come out.

Legend: b pictures, l h w latents, n d tokens and width of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ldm.benchmark.cases import ENGINES, Job, Point
from ldm.benchmark.models import SHAPES, TOKENS, latent_shape
from ldm.benchmark.pace import Pace

PROMPT, NEGATIVE, GUIDANCE = "a red flower", "", 7.5
TIMESTEPS = (501.0, 981.0, 741.0, 261.0, 21.0)

Work = Callable[[Point], Iterable[Any]]


def ours(job: Job, variant: str) -> Callable[[Pace], None]:
    """Open the model in ldm, with the engine of this variant."""
    from ldm.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(
        job.folder, torch_dtype=job.torch_dtype(variant), engine=ENGINES[variant]
    ).to(job.device)
    pipe.set_progress_bar_config(disable=True)
    inputs, timesteps = Inputs(job, variant), cycle(TIMESTEPS)

    def txt2img(point: Point) -> Any:
        return pipe(
            [PROMPT] * point.batch,
            negative_prompt=NEGATIVE,
            num_inference_steps=point.steps,
            guidance_scale=GUIDANCE,
            latents=inputs.latents(point),
            output_type="np" if point.check else "pil",
        ).images

    def unet(point: Point) -> Tensor:
        t = torch.full((point.batch,), next(timesteps), device=job.device)
        return pipe._engines["unet"](inputs.latents(point), t, inputs.context(point))

    def vae_decode(point: Point) -> Tensor:
        return pipe.decode(inputs.latents(point), "pt")

    def text(_: Point) -> list[Tensor]:
        return pipe.encode_prompts([PROMPT, NEGATIVE])

    return _turns([txt2img, unet, vae_decode, text], job)


def theirs(job: Job, variant: str) -> Callable[[Pace], None]:
    """Open the model in diffusers: as it loads in this dtype, or as its manual says for speed."""
    from diffusers import StableDiffusionPipeline

    # as installed it loads in fp32: nobody says so
    dtype = {} if variant == "diffusers fp32" else {"torch_dtype": job.torch_dtype(variant)}
    pipe: Any = StableDiffusionPipeline.from_pretrained(job.folder, **dtype).to(job.device)
    pipe.set_progress_bar_config(disable=True)
    if variant in ("diffusers channels-last", "diffusers compiled"):
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if variant == "diffusers compiled":
        # with CUDA graphs; max-autotune was not built after seven minutes, beside other builds
        options: Any = {"mode": "reduce-overhead", "fullgraph": True}
        pipe.unet = torch.compile(pipe.unet, **options)
        pipe.vae.decode = torch.compile(pipe.vae.decode, **options)
    inputs, timesteps = Inputs(job, variant), cycle(TIMESTEPS)

    def txt2img(point: Point) -> Any:
        return pipe(
            [PROMPT] * point.batch,
            negative_prompt=[NEGATIVE] * point.batch,
            height=point.height,
            width=point.width,
            num_inference_steps=point.steps,
            guidance_scale=GUIDANCE,
            latents=inputs.latents(point),
            output_type="np" if point.check else "pil",
        ).images

    def unet(point: Point) -> Tensor:
        x = torch.cat([inputs.latents(point)] * 2)  # 2b l h w
        context = inputs.context(point)
        return pipe.unet(x, next(timesteps), encoder_hidden_states=context, return_dict=False)[0]

    def vae_decode(point: Point) -> Tensor:
        latents = inputs.latents(point) / pipe.vae.config.scaling_factor
        images = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.image_processor.postprocess(images, output_type="pt")

    def text(_: Point) -> list[Tensor]:
        options = {"do_classifier_free_guidance": True, "negative_prompt": NEGATIVE}
        pair = pipe.encode_prompt(PROMPT, job.device, 1, **options)
        return [embedding[0] for embedding in pair]

    return _turns([txt2img, unet, vae_decode, text], job)


class Inputs:
    """The same numbers for everyone: drawn in float32 on the CPU, then cast and moved, once."""

    def __init__(self, job: Job, variant: str):
        place: Any = {"device": job.device, "dtype": job.torch_dtype(variant)}
        width = SHAPES[job.size][0].unet.cross_attention_dim

        @cache
        def normal(seed: int, *shape: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**place)

        # noise, b l h w; and contexts of as many negative prompts and prompts, 2b n d
        self.latents = lambda point: normal(1, *latent_shape(job, point))
        self.context = lambda point: normal(2, 2 * point.batch, TOKENS, width)


def _turns(works: list[Work], job: Job) -> Callable[[Pace], None]:
    """The work of the job's case at every point that comes."""
    work = {work.__name__: work for work in works}[job.work]

    @torch.no_grad()
    def turns(pace: Pace) -> None:
        for point in pace:
            pace.output = work(point)

    return turns
