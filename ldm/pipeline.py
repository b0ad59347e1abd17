"""From a prompt to a picture: the one pipeline.

    prompts --text encoder--> context      seed --rng--> noise
    guided(denoiser), sigma grid, sampler: noise -> scaled latents --VAE--> pictures

A picture is a function of (model, prompt, seed, settings), never of the batch it is drawn in, its
place there, or the device's noise generator.

Legend: b pictures, l channels of the latents, h w their height and width, n d tokens and width of
the context, H W the pictures' height and width.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.folder import (
    load_defaults,
    load_schedule,
    load_text_encoder,
    load_unet,
    load_vae,
    save_index,
    save_schedule,
    save_unet,
    save_vae,
)
from ldm.checkpoint.io import atomic_folder
from ldm.checkpoint.locate import locate_model
from ldm.config import SamplerName, Spacing, check_size
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.prediction import from_vp, to_vp
from ldm.diffusion.samplers import SamplerSpec, StopSampling, get_sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError
from ldm.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet
from ldm.rng import image_generator, image_noise

logger = logging.getLogger(__name__)

StepCallback = Callable[
    ["LatentDiffusionPipeline", int, float, dict[str, Tensor]], Mapping[str, Any]
]
"""(pipeline, step, timestep, {"latents": b l h w}) -> the same, perhaps with other latents."""


class PipelineOutput(NamedTuple):
    """What a call returns; `result[0]` and `result.images` are the same.

    Attributes:
        images: PIL pictures; or as `output_type` says, an array b H W 3 or a tensor b 3 H W in
            [0, 1], or scaled latents b l h w.
        seeds: the seed of each picture; empty when the caller brought generators.
        settings: what else made them: steps, sampler, guidance, size.
    """

    images: Any
    seeds: list[int]
    settings: dict[str, Any]


class LatentDiffusionPipeline:
    """A text-to-image model, ready to draw.

    Args:
        unet: predicts what the schedule's `prediction_type` says.
        vae: latents to pictures.
        text_encoder: prompts to context.
        schedule: the noise schedule that the U-Net was trained with.
        defaults: `num_inference_steps` and `guidance_scale` that suit this model.

    Raises:
        ConfigError: the parts do not fit each other.
    """

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        schedule: NoiseSchedule,
        *,
        defaults: Mapping[str, Any] | None = None,
    ):
        check_parts(unet, vae, text_encoder)
        self.unet, self.vae, self.text_encoder, self.schedule = unet, vae, text_encoder, schedule
        self.defaults = {"num_inference_steps": 50, "guidance_scale": 7.5} | dict(defaults or {})
        self._progress: dict[str, Any] = {}
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> LatentDiffusionPipeline:
        """Open a model: a folder in the diffusers layout, `flowers`, or an `owner/name` of the hub.

        Args:
            pretrained_model_name_or_path: which model.
            torch_dtype: what the model computes in.
            variant: `fp16` reads the `.fp16.safetensors` files of a folder.
            revision: branch, tag or commit on the hub.
            local_files_only: never ask the network.

        Raises:
            ConfigError: there is no such model, or its parts do not fit each other.
            CheckpointError: the model is incomplete, damaged, or of a kind that ldm has not.
        """
        folder = locate_model(
            pretrained_model_name_or_path,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
        )
        defaults = load_defaults(folder)
        schedule = load_schedule(folder / "scheduler")
        unet = load_unet(folder / "unet", dtype=torch_dtype, variant=variant)
        vae = load_vae(folder / "vae", dtype=torch_dtype, variant=variant)
        text_encoder = load_text_encoder(folder, dtype=torch_dtype, variant=variant)
        return cls(unet, vae, text_encoder, schedule, defaults=defaults)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a model folder that ldm and diffusers open, in the dtype that the weights have.

        Each component's folder is written whole or not at all, and the index last.
        """
        folder = Path(save_directory)
        with atomic_folder(folder / "unet") as part:
            save_unet(self.unet, part)
        with atomic_folder(folder / "vae") as part:
            save_vae(self.vae, part)
        with atomic_folder(folder / "scheduler") as part:
            save_schedule(self.schedule, part)
        with (
            atomic_folder(folder / "text_encoder") as part,
            atomic_folder(folder / "tokenizer") as words,
        ):
            self.text_encoder.save(part, words)
        save_index(folder, self.defaults)

    def to(self, *args: Any, **options: Any) -> LatentDiffusionPipeline:
        """Move the models to a device, a dtype or both, as `torch.nn.Module.to`; returns itself.

        Raises:
            ConfigError: this machine has no such device.
        """
        try:
            torch.empty(0).to(*args, **options)
        except (RuntimeError, AssertionError) as error:
            said = str(error).split("\n")[0]
            raise ConfigError(f"cannot move the model there: {said}") from None
        for model in (self.unet, self.vae, self.text_encoder):
            model.to(*args, **options)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def components(self) -> dict[str, Any]:
        """The parts, by the names of `__init__`: `LatentDiffusionPipeline(**pipe.components)`."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "schedule": self.schedule,
            "defaults": self.defaults,
        }

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as `disable=True`."""
        self._progress = options

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        sampler: SamplerName = "ddim",
        timestep_spacing: Spacing | None = None,
        eta: float = 0.0,
        variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
        clip_skip: int | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw pictures.

        Args:
            prompt: one prompt, or a list.
            negative_prompt: what guidance leads away from; one for all, or one a prompt.
            height: of the pictures, in pixels, a multiple of the VAE's factor; the model's size
                when not given.
            width: likewise.
            num_inference_steps: network calls a picture (for `heun` twice as many less one).
            guidance_scale: w of classifier-free guidance; 1 or less is without.
            guidance_rescale: of Lin et al. 2024, in [0, 1].
            num_images_per_prompt: pictures a prompt.
            seed: picture i of the call draws its noise from seed + i, or from entry i of a list;
                a random one when not given, which the output tells.
            generator: instead of a seed, as in diffusers: one a picture, or one for all, which
                then makes a picture depend on those before it.
            latents: the starting noise itself, standard normal, b l h w.
            prompt_embeds: context instead of prompts, b n d.
            negative_prompt_embeds: likewise, b n d.
            sampler: see `ldm.diffusion.samplers`.
            timestep_spacing: which noise levels are visited; the model's own when not given.
            eta: of DDIM, in [0, 1].
            variance: of DDPM's steps: beta tilde (`fixed_small`) or beta (`fixed_large`).
            clip_skip: layers of the text encoder left out at its end.
            batch_size: pictures at a time; all at once when not given. It changes no picture,
                unless one generator serves them all.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called after each step; it may return other latents, and it may
                set `pipeline._interrupt = True` to stop after this step.

        Raises:
            ConfigError: an argument that cannot be used; the line says which and why.
        """
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        chosen = self.defaults | {k: v for k, v in given.items() if v is not None}
        steps, scale = chosen["num_inference_steps"], chosen["guidance_scale"]
        factor, side = self.vae.config.downsample_factor, self.unet.config.sample_size
        height = side * factor if height is None else height
        width = side * factor if width is None else width
        check_size(height, width, factor)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type is '{output_type}'; choose pil, np, pt or latent")
        for name, number in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("batch_size", batch_size),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; it must be 1 or more")
        spec = get_sampler(sampler)
        spacing = timestep_spacing or self.schedule.config.timestep_spacing
        sigmas = spec.grid(self.schedule, steps, spacing)

        context, negative = self._contexts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, scale, clip_skip
        )
        context = context.repeat_interleave(num_images_per_prompt, 0)  # b n d
        if negative is not None:
            negative = negative.repeat_interleave(num_images_per_prompt, 0)  # b n d
        count = len(context)
        shape = (self.vae.config.latent_channels, height // factor, width // factor)
        generators, seeds = _generators(seed, generator, count)
        if latents is None:
            latents = torch.stack([image_noise(g, shape) for g in generators])  # b l h w
        else:
            _check_shape("latents", latents, (count, *shape))

        self._interrupt = False
        options = {"eta": eta, "variance": variance}
        options = {name: value for name, value in options.items() if name in spec.options}
        chunks = []
        for start in range(0, count, batch_size or count):
            part = slice(start, start + (batch_size or count))
            chunks.append(
                self._denoise(
                    latents[part], sigmas, spec, spacing, context[part],
                    None if negative is None else negative[part], scale, guidance_rescale,
                    generators[part], options, callback_on_step_end,
                )
            )  # fmt: skip
            if self._interrupt:
                break
        images = _output([self._decode(chunk, output_type) for chunk in chunks], output_type)
        settings = {
            "num_inference_steps": steps,
            "sampler": sampler,
            "timestep_spacing": spacing,
            "guidance_scale": scale,
            "width": width,
            "height": height,
        }
        # What is off by default is said where it is on.
        extras = {"guidance_rescale": guidance_rescale, "clip_skip": clip_skip, **options}
        settings |= {k: v for k, v in extras.items() if v and v != "fixed_small"}
        return PipelineOutput(images, seeds[: len(images)], settings)

    def _contexts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_embeds: Tensor | None,
        scale: float,
        clip_skip: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts of the prompts and of the negative prompts (None without guidance), b n d."""
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("give prompt or prompt_embeds, one of the two")
        width = self.unet.config.cross_attention_dim
        context = prompt_embeds
        if context is None:
            context = self._encode(_listed(prompt), clip_skip)
        elif context.ndim != 3 or context.shape[-1] != width:
            raise ConfigError(
                f"prompt_embeds have shape {tuple(context.shape)}; this model needs (b, n, {width})"
            )
        context = context.to(self.device, self.dtype)
        if scale <= 1:
            return context, None
        if negative_embeds is None:
            words = _listed(negative_prompt)
            if len(words) not in (1, len(context)):
                raise ConfigError(
                    f"{len(words)} negative prompts for {len(context)} prompts; one or one each"
                )
            negative_embeds = self._encode(words, clip_skip)
        if len(negative_embeds) != 1 or negative_embeds.shape[1:] != context.shape[1:]:
            _check_shape("negative_prompt_embeds", negative_embeds, tuple(context.shape))
        negative = negative_embeds.to(self.device, self.dtype)
        return context, negative.expand(len(context), -1, -1)

    def _encode(self, prompts: list[str], clip_skip: int | None) -> Tensor:
        for text in prompts:
            if dropped := self.text_encoder.dropped(text):
                limit = self.text_encoder.max_tokens
                logger.warning("beyond the %d tokens of a prompt, not seen: %s", limit, dropped)
        unique = list(dict.fromkeys(prompts))
        encoded = self.text_encoder.encode(unique, clip_skip)  # m n d
        return encoded[[unique.index(text) for text in prompts]]  # b n d

    def _denoise(
        self,
        noise: Tensor,
        sigmas: Tensor,
        spec: SamplerSpec,
        spacing: Spacing,
        context: Tensor,
        negative: Tensor | None,
        scale: float,
        rescale: float,
        generators: Sequence[torch.Generator],
        options: dict[str, Any],
        on_step_end: StepCallback | None,
    ) -> Tensor:
        """Noise to scaled latents, b l h w; they are float32 whatever the network computes in."""
        denoiser = Denoiser(self.unet, self.schedule, dtype=self.dtype)
        denoise = guided(denoiser, context, negative, scale, rescale=rescale)
        x = spec.initial_latents(noise.float(), sigmas[0].item(), spacing).to(self.device)

        def fresh_noise() -> Tensor:
            draws = [image_noise(g, tuple(noise.shape[1:])) for g in generators]
            return torch.stack(draws).to(self.device)  # b l h w

        bar = tqdm(total=len(sigmas) - 1, **self._progress)
        reached = sigmas[-1].item()

        def callback(step: int, sigma: float, x: Tensor, x0: Tensor) -> Tensor | None:
            nonlocal reached
            bar.update()
            if on_step_end is None:
                return None
            timestep = float(self.schedule.sigma_to_t(sigmas[step]))
            given = to_vp(x, sigma)
            returned = on_step_end(self, step, timestep, {"latents": given})
            latents = (returned or {}).get("latents", given)
            x = x if latents is given else from_vp(latents, sigma)
            if self._interrupt:
                reached = sigma
                raise StopSampling(x)
            return x

        with bar:
            x = spec.sample(denoise, x, sigmas, noise=fresh_noise, callback=callback, **options)
        return to_vp(x, reached)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        vae_dtype = next(self.vae.parameters()).dtype
        images = self.vae.decode(self.vae.unscale(latents).to(vae_dtype)).float()  # b 3 H W
        if output_type == "pil":
            return to_pil(images)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def check_parts(unet: UNet, vae: AutoencoderKL, text_encoder: TextEncoder) -> None:
    """Refuse a U-Net that fits neither the VAE's latents nor the text encoder's width.

    Raises:
        ConfigError: they differ; the line says in what.
    """
    for name in ("in_channels", "out_channels"):
        if getattr(unet.config, name) != vae.config.latent_channels:
            raise ConfigError(
                f"unet.{name} is {getattr(unet.config, name)} but the VAE's latents have"
                f" {vae.config.latent_channels} channels; ldm draws only with equal ones"
            )
    if unet.config.cross_attention_dim != text_encoder.dim:
        raise ConfigError(
            f"unet.cross_attention_dim is {unet.config.cross_attention_dim} but the text encoder's"
            f" width is {text_encoder.dim}; make them equal"
        )


def _generators(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    count: int,
) -> tuple[list[torch.Generator], list[int]]:
    """A generator for each picture, and the seeds, if that is what they came from."""
    if seed is not None and generator is not None:
        raise ConfigError("give seed or generator, one of the two")
    if generator is not None:
        each = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
        if len(each) != count:
            raise ConfigError(f"{len(each)} generators for {count} pictures; give one, or one each")
        for other in {g.device.type for g in each} - {"cpu"}:
            raise ConfigError(f"generator is on {other}; noise is drawn on the CPU, make it there")
        return each, []
    if seed is None:
        seed = secrets.randbelow(2**31)
    seeds = list(seed) if isinstance(seed, Sequence) else [int(seed) + i for i in range(count)]
    if len(seeds) != count:
        raise ConfigError(f"{len(seeds)} seeds for {count} pictures; give one number, or one each")
    for wrong in (s for s in seeds if not 0 <= s < 2**63):
        raise ConfigError(f"seed is {wrong}; it must lie between 0 and 2**63 - 1")
    return [image_generator(s) for s in seeds], seeds


def _listed(prompt: str | Sequence[str] | None) -> list[str]:
    if prompt is None:
        return [""]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ConfigError("the list of prompts is empty")
    return prompts


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} have shape {tuple(tensor.shape)}; this call needs {shape}")


def _output(chunks: list[Any], output_type: str) -> Any:
    if output_type == "pil":
        return [image for chunk in chunks for image in chunk]
    if output_type == "np":
        import numpy as np

        return np.concatenate(chunks)
    return torch.cat(chunks)
