"""The `unet` stage: the diffusion objective in latent space, with frozen VAE and text encoder.

Source: Ho et al. 2020, algorithm 1; Rombach et al. 2022, eq. 3; caption dropout as in Ho and
Salimans 2022, algorithm 1.

Legend: b batch, l h w latents, n d tokens and width of the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoint.folder import load_schedule, load_text_encoder, load_unet, load_vae
from ldm.checkpoint.locate import locate_model
from ldm.data.latents import ALONE, LatentCache, Team, cache_key, write_cache
from ldm.data.order import Bucketed, Place
from ldm.data.sample import DataSource
from ldm.data.transforms import is_mirrored
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError, DataError
from ldm.images import image_grid
from ldm.metadata import json_sha256
from ldm.model import check_parts
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import Draws
from ldm.training.config import UNetTraining, check_sides
from ldm.training.data import make_order
from ldm.training.samples import Batch, Loader, Samples
from ldm.training.sharding import gathered, is_sharded
from ldm.training.stage import Captioned, Stage, load_sample

PREVIEW_SEED = 0


@dataclass(frozen=True)
class UNetData(Dataset[Batch]):
    """A sample with its caption, class, timestep and noises; from the cache where there is one."""

    source: DataSource
    config: UNetTraining
    latent_channels: int
    downsample_factor: int
    timesteps: int
    classes: int
    validation: bool
    cache: LatentCache | None = None

    def __getitem__(self, place: Place) -> Batch:
        index, visit, seed = place.index, place.visit, self.config.seed
        size = place.size or (self.config.resolution, self.config.resolution)
        shape = self.latent_channels, *(side // self.downsample_factor for side in size)
        augment = not self.validation

        def normal(purpose: str, *shape: int) -> Tensor:
            return torch.from_numpy(Draws(seed, purpose, index, visit).normal(*shape))

        item: Batch = {
            "noise": normal("noise", *shape),
            "posterior_noise": normal("posterior", *shape),
            "t": self._timestep(place),
        }
        if augment and (strength := self.config.noise_offset):
            item["noise"] += strength * normal("noise_offset", shape[0], 1, 1)
        if augment and (strength := self.config.input_perturbation):
            item["seen_noise"] = item["noise"] + strength * normal("input_perturbation", *shape)
        # One draw for both, so that guidance knows what it is to have neither. Nothing is dropped
        # in validation but what always is.
        dropped = float(Draws(seed, "dropout", index, visit).uniform(1)[0]) if augment else 1.0
        empty = dropped <= self.config.proportion_empty_prompts
        if self.classes:
            null = dropped <= self.config.class_dropout_prob
            label = self.classes - 1 if null else known_class(self.source, index, self.classes)
            item["class_label"] = label
        if self.cache is not None:
            draws = Draws(seed, "augment", index, visit)
            flipped = augment and self.config.random_flip and is_mirrored(draws)
            moments, context = self.cache.read(index, flipped=flipped, empty=empty)
            return item | {"moments": moments, "context": context}
        pixels, caption = load_sample(self.source, place, self.config, augment=augment)
        return item | {"pixels": pixels, "caption": "" if empty else caption}

    def _timestep(self, place: Place) -> int:
        """Uniform; stratified, one in each part of a schedule that has a part for each slot."""
        draws = Draws(self.config.seed, "timestep", place.index, place.visit)
        if self.validation or not self.config.stratified_timesteps:
            return draws.integer(self.timesteps)
        parts = self.config.train_batch_size
        part = Draws(self.config.seed, "strata", place.step).permutation(parts)[place.slot]
        return int(self.timesteps * (part + draws.uniform(1)[0]) / parts)


class UNetStage(Stage):
    """Trains a `UNet`: from scratch, or on from the weights of a model."""

    config: UNetTraining

    def __init__(self, config: UNetTraining):
        super().__init__(config)
        base = config.pretrained_model_name_or_path
        self.schedule = _schedule(config)
        vae = locate_model(config.pretrained_vae_model_name_or_path or base)
        text = locate_model(config.pretrained_text_encoder_name_or_path or base)
        self.vae = load_vae(vae / "vae", dtype=torch.float32).requires_grad_(False)
        self.text_encoder = load_text_encoder(text, dtype=torch.float32)
        self.tokenizer = self.text_encoder.tower.tokenizer
        if config.unet is None:
            self.unet = load_unet(locate_model(base) / "unet", dtype=torch.float32)
        else:
            torch.manual_seed(config.seed)
            self.unet = UNet(config.unet)
        self._check()
        self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.players, self.averaged = {"unet": self.unet}, ("unet",)

    def setup(self, train: DataSource, validation: DataSource, device: torch.device) -> None:
        self.device = device
        self.vae.to(device)
        self.text_encoder.to(device)
        self.prompts = list(self.config.validation_prompts)
        self.labels = list(self.config.validation_class_labels)
        if not self.prompts:
            shown = list(islice(self._captions(validation), 4))
            self.prompts = [caption for caption, _ in shown]
            self.labels = self.labels or [label for _, label in shown if label is not None]
        self.caches = dict[tuple[str, bool], LatentCache]()
        if self.config.cache_latents:
            for source, held_out in ((train, False), (validation, True)):
                self.caches[source.fingerprint, held_out] = self._encode(source, held_out)

    def dataset(self, source: DataSource, *, validation: bool) -> UNetData:
        return UNetData(
            source,
            self.config,
            self.vae.config.latent_channels,
            self.vae.config.downsample_factor,
            self.schedule.config.num_train_timesteps,
            self.unet.config.num_class_embeds or 0,
            validation,
            self.caches.get((source.fingerprint, validation)),
        )

    def frozen(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "text_encoder": self.text_encoder}

    def settings(self) -> dict[str, str]:
        return {
            "schedule": str(self.schedule.config),
            "unet settings": str(self.unet.config),
            "vae settings": str(self.vae.config),
            "text_encoder settings": json_sha256(self.text_encoder.settings())[:12],
        }

    def loss(self, player: str, batch: Batch, step: int) -> dict[str, Tensor]:
        config = self.config
        losses = self._losses(
            self.players["unet"],
            batch,
            min_snr_gamma=config.snr_gamma,
            loss_type=config.loss_type,
            huber_c=config.huber_c,
            vlb_weight=config.vlb_weight,
        )
        return {"loss": losses.mean()}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The simple loss with the same timesteps and noises every time."""
        return {"loss": self._losses(self.unet, batch)}

    def preview(self) -> Image:
        """The validation prompts, a row each, always from the same noise."""
        pipeline = self._pipeline(self.unet)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            self.prompts,
            class_labels=self.labels or None,
            height=self.config.resolution,
            width=self.config.resolution,
            num_images_per_prompt=self.config.num_validation_images,
            seed=PREVIEW_SEED,
        ).images
        return image_grid(images, columns=self.config.num_validation_images)

    def save(self, folder: Path) -> None:
        """Write a whole model: U-Net, VAE, text encoder, tokenizer and schedule."""
        unet = gathered(self.unet) if is_sharded(self.unet) else self.unet
        if unet is not None:  # the main process has it
            self._pipeline(unet).save_pretrained(folder)

    def _losses(self, unet: nn.Module, batch: Batch, **options: Any) -> Tensor:
        x0, context = self._latents(batch), self._context(batch)  # b l h w, b n d
        network = partial(unet, class_labels=batch.get("class_label"))
        noise, seen = batch["noise"], batch.get("seen_noise")
        return diffusion_loss(
            network, self.schedule, x0, noise, batch["t"], context, seen_noise=seen, **options
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

    def _captions(self, source: DataSource) -> Iterator[tuple[str, int | None]]:
        """Caption and class of each sample that has them."""
        classes = self.unet.config.num_class_embeds
        textless = self.config.proportion_empty_prompts == 1
        for i in range(len(source)):
            try:
                label = known_class(source, i, classes) if classes else None
                yield "" if textless else source.caption(i), label
            except DataError:
                if self.config.on_bad_sample == "stop":
                    raise

    def _encode(self, source: DataSource, validation: bool) -> LatentCache:
        """The cache of a source, written by all processes together."""
        config, sizes = self.config, [None] * len(source)
        flips = config.random_flip and not validation
        how = f"{config.resolution} pixels, {config.image_interpolation_mode}"
        how += ", and mirrored" if flips else ""
        if config.enable_bucket and not validation:
            order = cast(Bucketed, make_order(source, config))
            sizes = [order.sizes[bucket] for bucket in order.bucket_of]
            how += f", in buckets {json_sha256(sizes)[:12]}"

        pictures = Captioned(source, config, validation=True)  # unmirrored, from the middle
        samples = Samples(pictures, len(source), config.on_bad_sample == "skip")

        def load(places: list[Place]) -> Loader:
            batches = [[place] for place in places]
            return Loader(samples, batches, workers=config.dataloader_num_workers)

        def encode(pixels: Tensor) -> Tensor:
            posterior = self.vae.encode(pixels.to(self.device))
            return torch.cat([posterior.mean, posterior.logvar], dim=1)  # b 2l h w

        team = ALONE
        if dist.is_initialized():
            # Some may have to wait for others for longer than NCCL would.
            group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            team = Team(dist.get_rank(), dist.get_world_size(), lambda: dist.barrier(group))
        folder = config.latent_cache_dir or config.output_dir / "latents"
        return write_cache(
            folder / ("validation" if validation else "train"),
            cache_key(self.vae, self.text_encoder, source, how),
            [Place(index, size=size) for index, size in enumerate(sizes)],
            load,
            encode,
            self.text_encoder.encode,
            flips=flips,
            team=team,
        )

    def _pipeline(self, unet: UNet) -> LatentDiffusionPipeline:
        defaults = {
            "guidance_scale": self.config.guidance_scale,
            "num_inference_steps": self.config.num_inference_steps,
        }
        return LatentDiffusionPipeline(
            unet, self.vae, self.text_encoder, self.schedule, defaults=defaults, engine="plain"
        )

    def _check(self) -> None:
        """The parts must fit each other, and the pictures the parts."""
        check_parts(self.unet, self.vae, self.text_encoder, self.schedule)
        if (classes := self.unet.config.num_class_embeds) and not self.config.class_column:
            raise ConfigError(f"the U-Net has num_class_embeds {classes}; set class_column, too")
        if self.config.class_column and not classes:
            raise ConfigError("class_column is set, but the U-Net has no num_class_embeds")
        labels, most = self.config.validation_class_labels, (classes or 1) - 2
        if not all(0 <= label <= most for label in labels) or (
            len(labels) not in (0, 1, len(self.config.validation_prompts))
        ):
            raise ConfigError(
                f"validation_class_labels are {list(labels)}; give classes from 0 to {most}, one"
                " for all validation_prompts or one a prompt"
            )
        if (channels := self.unet.config.in_channels) != self.vae.config.latent_channels:
            raise ConfigError(
                f"unet.in_channels is {channels}: an inpainting model draws here, but this stage"
                " trains only what sees nothing beside the noisy latents"
            )
        check_sides(self.config, self.vae.config.downsample_factor)
        side = self.config.resolution // self.vae.config.downsample_factor
        if self.config.unet is not None and self.config.unet.sample_size != side:
            raise ConfigError(
                f"unet.sample_size is {self.config.unet.sample_size} but the latents of"
                f" {self.config.resolution} pixels have side {side}; make them equal"
            )


def known_class(source: DataSource, index: int, classes: int) -> int:
    """A sample's class, of a U-Net with so many rows of classes; the last one is no class.

    Raises:
        DataError: it has none, or the U-Net has no row for it.
    """
    label = source.label(index)
    if label is None or not 0 <= label < classes - 1:
        raise DataError(
            f"{source.key(index)}: its class is {label}, but with num_class_embeds {classes} there"
            f" are 0 to {classes - 2}, and one row for none"
        )
    return label


def _schedule(config: UNetTraining) -> NoiseSchedule:
    """The noise schedule that the options say.

    Raises:
        ConfigError: it ends at pure noise, of which the U-Net is to predict epsilon.
    """
    schedule = config.schedule
    if config.unet is None:
        base = locate_model(config.pretrained_model_name_or_path)
        schedule = load_schedule(base / "scheduler").config
    if config.prediction_type is not None:
        schedule = replace(schedule, prediction_type=config.prediction_type)
    if config.rescale_betas_zero_snr:  # drawn from its very end: Lin et al. 2024, section 3.3
        schedule = replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    made = NoiseSchedule(schedule)
    if made.betas[-1] == 1 and schedule.prediction_type == "epsilon":
        raise ConfigError(
            "prediction_type epsilon does not go with zero terminal SNR, where the noise is all"
            " there is to see; set prediction_type to v_prediction or sample"
        )
    return made
