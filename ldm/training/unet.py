"""The `unet` stage: the epsilon objective in latent space, with frozen VAE and text encoder.

Source: Ho et al. 2020, algorithm 1; Rombach et al. 2022, eq. 3; caption dropout as in Ho and
Salimans 2022, algorithm 1.

Legend: b batch, l h w latents, n d tokens and width of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoint.folder import load_schedule, load_text_encoder, load_unet, load_vae
from ldm.checkpoint.locate import locate_model
from ldm.data.latents import LatentCache, encode_source
from ldm.data.sample import DataSource
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError
from ldm.images import image_grid
from ldm.model import check_parts
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import Draws
from ldm.training.config import UNetTraining, check_resolution
from ldm.training.stage import Batch, Stage, load_sample

PREVIEW_SEED = 0


@dataclass(frozen=True)
class UNetData(Dataset[Batch]):
    """A sample with its caption, timestep and noises; from the cache where there is one."""

    source: DataSource
    config: UNetTraining
    latent_shape: tuple[int, int, int]
    timesteps: int
    validation: bool
    cache: LatentCache | None = None

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        index, visit = place
        seed = self.config.seed
        noise = Draws(seed, "noise", index, visit).normal(*self.latent_shape)
        posterior = Draws(seed, "posterior", index, visit).normal(*self.latent_shape)
        dropped = float(Draws(seed, "dropout", index, visit).uniform(1)[0])
        empty = dropped < self.config.proportion_empty_prompts and not self.validation
        item = {
            "noise": torch.from_numpy(noise),
            "posterior_noise": torch.from_numpy(posterior),
            "t": Draws(seed, "timestep", index, visit).integer(self.timesteps),
        }
        if self.cache is not None:
            row = 0 if empty else self.cache.caption[index]
            return item | {
                "moments": self.cache.moments[index],
                "context": self.cache.contexts[row],
            }
        augment = not self.validation
        pixels, caption = load_sample(self.source, index, visit, self.config, augment=augment)
        return item | {"pixels": pixels, "caption": "" if empty else caption}


class UNetStage(Stage):
    """Trains a `UNet`: from scratch, or on from the weights of a model."""

    config: UNetTraining

    def __init__(self, config: UNetTraining):
        super().__init__(config)
        base = config.pretrained_model_name_or_path
        vae = locate_model(config.pretrained_vae_model_name_or_path or base)
        text = locate_model(config.pretrained_text_encoder_name_or_path or base)
        self.vae = load_vae(vae / "vae", dtype=torch.float32).requires_grad_(False)
        self.text_encoder = load_text_encoder(text, dtype=torch.float32)
        if config.unet is None:
            self.unet = load_unet(locate_model(base) / "unet", dtype=torch.float32)
            self.schedule = load_schedule(locate_model(base) / "scheduler")
        else:
            torch.manual_seed(config.seed)
            self.unet = UNet(config.unet)
            self.schedule = NoiseSchedule(config.schedule)
        self._check()
        self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.players, self.averaged = {"unet": self.unet}, ("unet",)

    def setup(self, train: DataSource, validation: DataSource, device: torch.device) -> None:
        self.device = device
        self.vae.to(device)
        self.text_encoder.to(device)
        self.prompts = list(self.config.validation_prompts) or [
            validation[i].caption for i in range(min(4, len(validation)))
        ]
        self.caches = dict[str, LatentCache]()
        if self.config.cache_latents:
            for source in (train, validation):
                self.caches[source.fingerprint] = self._encode(source)

    def dataset(self, source: DataSource, *, validation: bool) -> UNetData:
        side = self.config.resolution // self.vae.config.downsample_factor
        return UNetData(
            source,
            self.config,
            (self.vae.config.latent_channels, side, side),
            self.schedule.config.num_train_timesteps,
            validation,
            self.caches.get(source.fingerprint),
        )

    def loss(self, player: str, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self._losses(self.players["unet"], batch, self.config.snr_gamma).mean()}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The simple loss with the same timesteps and noises every time."""
        return {"loss": self._losses(self.unet, batch, None)}

    def preview(self) -> Image:
        """The validation prompts, a row each, always from the same noise."""
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            self.prompts,
            height=self.config.resolution,
            width=self.config.resolution,
            num_images_per_prompt=self.config.num_validation_images,
            seed=PREVIEW_SEED,
        ).images
        return image_grid(images, columns=self.config.num_validation_images)

    def save(self, folder: Path) -> None:
        """Write a whole model: U-Net, VAE, text encoder, tokenizer and schedule."""
        self._pipeline().save_pretrained(folder)

    def _losses(self, unet: nn.Module, batch: Batch, snr_gamma: float | None) -> Tensor:
        x0, context = self._latents(batch), self._context(batch)  # b l h w, b n d
        return diffusion_loss(
            unet, self.schedule, x0, batch["noise"], batch["t"], context, min_snr_gamma=snr_gamma
        )  # b

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        if "moments" in batch:
            posterior = DiagonalGaussian.from_moments(batch["moments"])
        else:
            with torch.autocast(self.device.type, enabled=False):  # frozen models are float32
                posterior = self.vae.encode(batch["pixels"])
        return self.vae.scale(posterior.sample(batch["posterior_noise"]))  # b l h w

    @torch.no_grad()
    def _context(self, batch: Batch) -> Tensor:
        if "context" in batch:
            return batch["context"]  # b n d
        with torch.autocast(self.device.type, enabled=False):
            return self.text_encoder.encode(batch["caption"])  # b n d

    def _encode(self, source: DataSource) -> LatentCache:
        def load(index: int) -> tuple[Tensor, str]:
            return load_sample(source, index, 0, self.config, augment=False)

        return encode_source(load, len(source), self.vae, self.text_encoder, self.device)

    def _pipeline(self) -> LatentDiffusionPipeline:
        defaults = {
            "guidance_scale": self.config.guidance_scale,
            "num_inference_steps": self.config.num_inference_steps,
        }
        return LatentDiffusionPipeline(
            self.unet, self.vae, self.text_encoder, self.schedule, defaults=defaults
        )

    def _check(self) -> None:
        """The parts must fit each other, and the pictures the parts."""
        check_parts(self.unet, self.vae, self.text_encoder)
        if (channels := self.unet.config.in_channels) != self.unet.config.out_channels:
            raise ConfigError(
                f"unet.in_channels is {channels}: an inpainting model draws here, but this stage"
                " trains only what sees nothing beside the noisy latents"
            )
        check_resolution(self.config.resolution, self.vae.config.downsample_factor)
        side = self.config.resolution // self.vae.config.downsample_factor
        if self.config.unet is not None and self.config.unet.sample_size != side:
            raise ConfigError(
                f"unet.sample_size is {self.config.unet.sample_size} but the latents of"
                f" {self.config.resolution} pixels have side {side}; make them equal"
            )
