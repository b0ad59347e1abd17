"""From a prompt to a picture: the one pipeline.

    prompts --text encoder--> context      seed --rng--> noise      image --VAE--> known latents
    guided(denoiser), sigma grid, sampler: noise -> scaled latents --VAE--> pictures

Image to image changes only where the sampler starts, inpainting only wraps the denoiser. A picture
is a function of (model, prompt, seed, settings, image), never of the batch it is drawn in, its
place there, or the device's noise generator.

Legend: b pictures, l channels of the latents, h w their height and width, n d tokens and width of
the context, H W the pictures' height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.config import LongPrompts, SamplerName, Spacing, Variance, check_size
from ldm.diffusion.denoiser import Denoiser, LearnedVariance, Network
from ldm.diffusion.guidance import guided, masked, thresholded
from ldm.diffusion.prediction import from_vp, to_vp
from ldm.diffusion.samplers import StopSampling, get_sampler
from ldm.errors import ConfigError
from ldm.inputs import (
    ImageInput,
    Settings,
    as_list,
    is_latents,
    per_picture,
    size_of,
    start,
    to_mask,
    to_pixels,
)
from ldm.memory import free_blocks
from ldm.model import Model
from ldm.rng import image_noise

logger = logging.getLogger(__name__)

StepCallback = Callable[
    ["LatentDiffusionPipeline", int, float, dict[str, Tensor]], Mapping[str, Any]
]
"""(pipeline, step, timestep, {"latents", "pred_original_sample": b l h w}) -> the same mapping,
perhaps with other latents; the second is the x0 that the step has predicted."""


class PipelineOutput(NamedTuple):
    """What a call returns; `result[0]` and `result.images` are the same.

    Attributes:
        images: PIL pictures; or as `output_type` says, an array b H W 3 or a tensor b 3 H W in
            [0, 1], or scaled latents b l h w.
        seeds: the seed of each picture; empty when the caller brought generators.
        settings: what else made them, as keyword arguments of the call.
        batches: the place of each picture in the batch that it was drawn in, and that batch's size.
    """

    images: Any
    seeds: list[int]
    settings: dict[str, Any]
    batches: list[tuple[int, int]]

    def settings_of(self, index: int) -> dict[str, Any]:
        """Keyword arguments that draw the picture at `index` again, its seed among them."""
        own = {"seed": self.seeds[index]} if self.seeds else {}
        each = {name: self.settings.get(name) for name in ("variation_seed", "class_labels")}
        return self.settings | own | {name: all_[index] for name, all_ in each.items() if all_}


@dataclass(frozen=True)
class _Run:
    """What all pictures of a call share."""

    settings: Settings
    sigmas: Tensor
    callback: StepCallback | None


@dataclass(frozen=True)
class _Batch:
    """Pictures that are drawn together: noise, context, and what is known of them.

    `negative` is None without guidance, `labels` without classes, the last three where no image
    and no mask is given: `known` are the image's latents, `mask` says which of them are painted
    anew, `extra` is what an inpainting model sees beside the noisy latents.
    """

    noise: Tensor  # b l h w
    generators: Sequence[torch.Generator]
    context: Tensor  # b n d
    negative: Tensor | None  # b n d
    labels: Tensor | None  # b
    known: Tensor | None  # b l h w
    mask: Tensor | None  # b 1 h w
    extra: Tensor | None  # b 1+l h w


class LatentDiffusionPipeline(Model):
    """A text-to-image model, ready to draw. Arguments and errors of making one as `Model`."""

    _progress: Mapping[str, Any] = {}
    _interrupt = False

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as `disable=True`."""
        self._progress = options

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        sampler: SamplerName = "ddim",
        timestep_spacing: Spacing | None = None,
        eta: float = 0.0,
        variance: Variance | None = None,
        clip_skip: int | None = None,
        long_prompts: LongPrompts = "truncate",
        prompt_weights: bool = True,
        batch_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw pictures: from noise, from an image, or only where a mask is white.

        Args:
            prompt: one prompt, or a list.
            negative_prompt: what guidance leads away from; one for all, or one a prompt.
            class_labels: of a model that has classes, one for all, or one a prompt; guidance leads
                away from no class, which is also what is drawn when not given.
            image: what to start from: one for all, one a prompt or one a picture, in any of the
                forms of `ldm.inputs.ImageInput`.
            mask_image: where `image` is painted anew: white is painted, black is kept.
            strength: how much of the image is given up, in [0, 1]: 0 returns the VAE's
                reconstruction, 1 starts from noise alone. 0.8 when not given, 1 with a mask.
            height: of the pictures, in pixels, a multiple of the VAE's factor; the image's or the
                model's when not given.
            width: likewise.
            num_inference_steps: steps of the sampler, each one network call, or two.
            timesteps: the timesteps to visit, descending, instead of a spacing.
            sigmas: the noise levels to visit, descending, instead of a spacing.
            guidance_scale: w of classifier-free guidance; 1 or less is without.
            guidance_rescale: of Lin et al. 2024, in [0, 1].
            guidance_interval: sigmas (low, high] that are guided, as Kynkäänniemi et al. 2024.
            dynamic_threshold: (percentile, limit): where the percentile in (0, 1] of |x0| exceeds
                the limit, x0 is clipped to it and scaled down to the limit, as Saharia et al. 2022.
                Scaled latents have unit variance: a limit of 3 or 4 suits them, 1 suits pixels.
            num_images_per_prompt: pictures a prompt.
            seed: picture i of the call draws its noise from seed + i, or from entry i of a list;
                a random one when not given, which the output tells.
            variation_seed: with `variation_strength`, every picture has the one `seed`, and its
                noise is turned towards that of variation_seed + i.
            variation_strength: how far, in [0, 1].
            generator: instead of a seed, as in diffusers: one a picture, or one for all, which
                then makes a picture depend on those before it.
            latents: the starting noise itself, standard normal, b l h w.
            prompt_embeds: context instead of prompts, b n d.
            negative_prompt_embeds: likewise, b n d.
            sampler: see `ldm.diffusion.samplers`.
            timestep_spacing: which noise levels are visited; the model's own when not given.
            eta: of DDIM, in [0, 1].
            variance: of DDPM's steps: beta tilde (`fixed_small`), beta (`fixed_large`), or what the
                model predicts (`learned_range`); the model's own when not given.
            clip_skip: layers of the text encoder left out at its end.
            long_prompts: `truncate` drops what lies beyond the text encoder's limit, and logs it;
                `chunk` encodes a long prompt in pieces.
            prompt_weights: read `(word:1.3)`, `(word)` and `[word]` as weights; see `ldm.prompts`.
            batch_size: pictures at a time; all at once when not given. It changes no picture but
                by rounding, unless one generator serves them all.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called after each step; it may return other latents, and it may
                set `pipeline._interrupt = True` to stop after this step.

        Raises:
            ConfigError: an argument that cannot be used; the line says which and why.
        """
        # What the arguments alone can tell is refused before anything is computed.
        for name, number in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("batch_size", batch_size),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; it must be 1 or more")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type is '{output_type}'; choose pil, np, pt or latent")
        own = self.schedule.config.variance_type
        if variance == "learned_range" and variance != own:
            raise ConfigError(f"variance is {variance}, which this model lacks; leave it out")
        height, width, strength = self._size(image, mask_image, height, width, strength)
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        settings = Settings(
            **self.defaults | {k: v for k, v in given.items() if v is not None},
            sampler=sampler,
            timestep_spacing=timestep_spacing or self.schedule.config.timestep_spacing,
            width=width,
            height=height,
            strength=strength,
            timesteps=None if timesteps is None else tuple(map(float, timesteps)),
            sigmas=None if sigmas is None else tuple(map(float, sigmas)),
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
            eta=eta,
            variance=variance or own,
            clip_skip=clip_skip,
            long_prompts=long_prompts,
            prompt_weights=prompt_weights,
        )
        run = _Run(settings, settings.grid(self.schedule), callback_on_step_end)
        embeds = (prompt_embeds, negative_prompt_embeds)
        contexts = self._contexts(prompt, negative_prompt, *embeds, settings)
        contexts = [pair for pair in contexts for _ in range(num_images_per_prompt)]
        begun = start(
            (len(contexts), *self.latent_shape(height, width)),
            seed=seed,
            generator=generator,
            latents=latents,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
        )
        labels = self._labels(class_labels, len(contexts))
        known, mask, extra = self._known(image, mask_image, settings, len(contexts))

        self._interrupt = False
        chunks, batches = [], []
        for part in _batches([len(context) for context, _ in contexts], batch_size):
            negatives = [negative for _, negative in contexts[part] if negative is not None]
            batch = _Batch(
                begun.noise[part],
                begun.generators[part],
                self._stack([context for context, _ in contexts[part]]),
                self._stack(negatives) if negatives else None,
                *(None if x is None else x[part] for x in (labels, known, mask, extra)),
            )
            latents = self._denoise(batch, run)
            if self.device.type == "cpu" and output_type != "latent":
                free_blocks()  # the U-Net's, before the largest moment of a picture
            chunks.append(self.decode(latents, output_type))
            size = part.stop - part.start
            batches += [(place, size) for place in range(size)]
            if self._interrupt:
                break
        images = _output(chunks, output_type)
        made = settings.arguments()
        if variation_strength:
            made["variation_strength"] = variation_strength
            made["variation_seed"] = begun.variation_seeds[: len(images)]
        if labels is not None:
            made["class_labels"] = labels[: len(images)].tolist()
        return PipelineOutput(images, begun.seeds[: len(images)], made, batches)

    def _size(
        self,
        image: ImageInput | None,
        mask_image: ImageInput | None,
        height: int | None,
        width: int | None,
        strength: float | None,
    ) -> tuple[int, int, float | None]:
        """Height and width in pixels, and the strength, None without an image."""
        inpainting = self.unet_config.in_channels > self.vae_config.latent_channels
        if inpainting and (image is None or mask_image is None):
            raise ConfigError("this is an inpainting model: give image and mask_image")
        if image is None and (mask_image is not None or strength is not None):
            given = "strength" if mask_image is None else "mask_image"
            raise ConfigError(f"{given} is given but no image; give image, too")
        factor = self.vae_config.downsample_factor
        own = (self.unet_config.sample_size * factor,) * 2
        if image is not None:
            own = size_of(image, factor, self.vae_config.latent_channels)
            usual = 0.8 if mask_image is None else 1.0
            strength = usual if strength is None else strength
        height = own[0] if height is None else height
        width = own[1] if width is None else width
        check_size(height, width, factor)
        return height, width, strength

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        clip_skip: int | None = None,
        prompt_weights: bool = True,
        long_prompts: LongPrompts = "truncate",
    ) -> list[Tensor]:
        """Contexts of prompts, n d each; arguments and errors as of a call."""
        if long_prompts == "truncate":
            for text in prompts:
                if dropped := self.text_encoder.dropped(text, prompt_weights=prompt_weights):
                    limit = self.text_encoder.max_tokens
                    logger.warning("beyond the %d tokens of a prompt, not seen: %s", limit, dropped)
        options: Any = {"prompt_weights": prompt_weights, "long_prompts": long_prompts}
        with self._at_work("text_encoder") as text_encoder:
            return text_encoder.contexts(list(prompts), clip_skip=clip_skip, **options)

    @torch.no_grad()
    def equal_length(
        self, contexts: Sequence[Tensor], clip_skip: int | None = None
    ) -> list[Tensor]:
        """Contexts n d, lengthened by chunks without words to the longest of them.

        Raises:
            ConfigError: the difference is no whole number of chunks.
        """
        n, chunk = max(map(len, contexts)), self.text_encoder.max_tokens
        if all(len(context) == n for context in contexts):
            return list(contexts)
        if any((n - len(context)) % chunk for context in contexts):
            raise ConfigError(
                f"contexts have {sorted({len(context) for context in contexts})} tokens; make them"
                f" equal, or multiples of {chunk}"
            )
        with self._at_work("text_encoder") as text_encoder:
            return [text_encoder.pad(context, n, clip_skip) for context in contexts]

    def _contexts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_embeds: Tensor | None,
        settings: Settings,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Context n d of each prompt and of its negative prompt (None without guidance)."""
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("give prompt or prompt_embeds, one of the two")

        def contexts(name: str, words: str | Sequence[str] | None, embeds: Any) -> list[Tensor]:
            if embeds is not None:
                return self._embeds(name, embeds)
            return self.encode_prompts(
                as_list(words),
                clip_skip=settings.clip_skip,
                prompt_weights=settings.prompt_weights,
                long_prompts=settings.long_prompts,
            )

        positives = contexts("prompt_embeds", prompt, prompt_embeds)
        if settings.guidance_scale <= 1:
            return [(context, None) for context in positives]
        negatives = contexts("negative_prompt_embeds", negative_prompt, negative_embeds)
        if len(negatives) not in (1, len(positives)):
            raise ConfigError(
                f"{len(negatives)} negative prompts for {len(positives)} prompts; one or one each"
            )
        negatives = negatives * (len(positives) // len(negatives))
        pairs = zip(positives, negatives, strict=True)
        equal = [self.equal_length(pair, settings.clip_skip) for pair in pairs]
        return [(context, negative) for context, negative in equal]

    def _stack(self, contexts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(contexts)).to(self.device, self.dtype)  # b n d

    def _embeds(self, name: str, embeds: Tensor) -> list[Tensor]:
        width = self.unet_config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[-1] != width or not len(embeds):
            raise ConfigError(
                f"{name} have shape {tuple(embeds.shape)}; this model needs (b, n, {width})"
            )
        return list(embeds)

    def _labels(self, given: int | Sequence[int] | None, count: int) -> Tensor | None:
        """The class of each picture: b."""
        if given is None:
            return None
        classes = (self.unet_config.num_class_embeds or 1) - 1  # the last row is none
        try:
            labels = torch.as_tensor(given).flatten()
            torch.iinfo(labels.dtype)  # only integers have one
            labels = labels.long()
        except (TypeError, ValueError, RuntimeError):
            labels = torch.tensor([-1])
        if not ((labels >= 0) & (labels < classes)).all():
            has = f"classes 0 to {classes - 1}" if classes else "no classes"
            said = " ".join(str(given).split())  # arrays take several lines
            raise ConfigError(f"class_labels is {said}; this model has {has}")
        return per_picture("class_label", labels, count)

    def _known(
        self,
        image: ImageInput | None,
        mask_image: ImageInput | None,
        settings: Settings,
        count: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The image's latents, their mask, and what an inpainting model sees beside the noise.

        Returns:
            b l h w; b 1 h w, 1 where it is painted anew; b 1+l h w: the mask and the latents of
            the image without what it hides. None for each that the call does not need.
        """
        if image is None:
            return None, None, None
        channels, factor = self.vae_config.latent_channels, self.vae_config.downsample_factor
        height, width = settings.height, settings.width
        if is_latents(image, channels):
            known, pixels = torch.as_tensor(image).float().cpu(), None
            if known.shape[1:] != (shape := self.latent_shape(height, width)):
                raise ConfigError(
                    f"image has latents of shape {tuple(known.shape)}; this call needs"
                    f" {(len(known), *shape)}"
                )
        else:
            pixels = to_pixels(image, height, width)  # b 3 H W
            known = self.encode(pixels)
        known = per_picture("image", known, count)
        if mask_image is None:
            return known, None, None
        mask = to_mask(mask_image, image, height, width)  # b 1 H W
        # A latent pixel is kept only where all of its pixels are.
        small = per_picture("mask_image", F.max_pool2d(mask, factor), count)  # b 1 h w
        if self.unet_config.in_channels == channels:
            return known, small, None
        if pixels is None:
            raise ConfigError("an inpainting model needs the image's pixels, not its latents")
        shown = per_picture("image", pixels, count) * (per_picture("mask_image", mask, count) < 0.5)
        return known, None, torch.cat([small, self.encode(shown)], 1)

    def _denoise(self, batch: _Batch, run: _Run) -> Tensor:
        """Noise to scaled latents, b l h w; they are float32 whatever the network computes in."""
        settings, sigmas = run.settings, run.sigmas
        spec, high, reached = get_sampler(settings.sampler), sigmas[0].item(), sigmas[-1].item()
        known, mask = (None if x is None else x.to(self.device) for x in (batch.known, batch.mask))
        network, options = self._network(batch), settings.sampler_options
        if self.schedule.config.variance_type == "learned_range":
            network = LearnedVariance(network)
            if "predicted_variance" in spec.options:
                options["predicted_variance"] = network.predicted_variance
        denoise = guided(
            Denoiser(network, self.schedule, dtype=self.dtype),
            batch.context,
            batch.negative,
            settings.guidance_scale,
            rescale=settings.guidance_rescale,
            interval=settings.guidance_interval,
        )
        if settings.dynamic_threshold is not None:
            denoise = thresholded(denoise, *settings.dynamic_threshold)
        if known is not None and mask is not None:
            denoise = masked(denoise, mask, known)
        noise = batch.noise.float().to(self.device)
        x = spec.initial_latents(noise, high, settings.timestep_spacing)
        if known is not None and not settings.from_noise:
            x = known + high * noise
        elif known is not None and mask is not None:
            x = torch.where(mask > 0, x, known + high * noise)

        def fresh_noise() -> Tensor:
            draws = torch.stack([image_noise(g, tuple(x.shape[1:])) for g in batch.generators])
            draws = draws.pin_memory() if self.device.type == "cuda" else draws
            return draws.to(self.device, non_blocking=True)  # b l h w

        bar = tqdm(total=len(sigmas) - 1, **self._progress)

        def callback(step: int, sigma: float, x: Tensor, x0: Tensor) -> Tensor | None:
            nonlocal reached
            bar.update()
            if run.callback is not None:
                timestep = float(self.schedule.sigma_to_t(sigmas[step]))
                given = to_vp(x, sigma)
                state, before = {"latents": given, "pred_original_sample": x0}, given._version
                latents = (run.callback(self, step, timestep, state) or {}).get("latents", given)
                if latents is not given or given._version != before:  # another, or changed in place
                    x = from_vp(latents, sigma)
            if self._interrupt:
                reached = sigma
                raise StopSampling(x)
            return x

        with bar, self._at_work("unet"):
            x = spec.sample(denoise, x, sigmas, noise=fresh_noise, callback=callback, **options)
        x = to_vp(x, reached)
        if known is not None and mask is not None and not self._interrupt:
            x = torch.where(mask > 0, x, known)  # a last sigma above 0 leaves some noise there
        return x

    def _network(self, batch: _Batch) -> Network:
        """The U-Net, told the classes and, for inpainting, shown the mask and what it leaves.

        Of guidance's two contexts a picture, the first, the negative one, has no class.
        """
        unet: Network = self._unet if self._offload else self._engines["unet"]
        if batch.labels is None and batch.extra is None:
            return unet
        labels, shown, classes = None, None, self.unet_config.num_class_embeds
        if batch.labels is not None and classes is not None:
            null = torch.full_like(batch.labels, classes - 1)
            labels = torch.cat([null, batch.labels]).to(self.device)  # 2b
        if batch.extra is not None:
            shown = batch.extra.to(self.device, self.dtype)  # b 1+l h w

        def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            x_t = x_t if shown is None else torch.cat([x_t, shown], 1)
            return unet(x_t, t, context, None if labels is None else labels[-len(context) :])

        return network


def _batches(lengths: Sequence[int], size: int | None) -> Iterator[slice]:
    """Runs of pictures whose contexts have the same length, `size` at most."""
    begin = 0
    for _, run in groupby(lengths):
        end = begin + len(list(run))
        for first in range(begin, end, size or end - begin):
            yield slice(first, min(first + (size or end), end))
        begin = end


def _output(chunks: list[Any], output_type: str) -> Any:
    if output_type == "pil":
        return [image for chunk in chunks for image in chunk]
    if output_type == "np":
        import numpy as np

        return np.concatenate(chunks)
    return torch.cat(chunks)
