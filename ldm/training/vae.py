"""The `vae` stage: an autoencoder by L1, KL, perceptual and adversarial loss.

Source: Esser et al. 2021 (VQGAN), section 3.1; Rombach et al. 2022, appendix G.

Legend: b batch, c h w latents, H W pictures, p patches of the discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoint.folder import load_vae, save_vae
from ldm.checkpoint.locate import locate_model
from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.errors import CheckpointError, ConfigError
from ldm.images import image_grid, to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.discriminator import PatchDiscriminator
from ldm.rng import Draws
from ldm.training.config import VaeTraining, check_sides
from ldm.training.samples import Samples
from ldm.training.stage import Batch, Stage, load_sample

SCALE_SAMPLES = 512  # pictures over which the latents' spread is measured


@dataclass(frozen=True)
class VaeData(Dataset[Batch]):
    """Pixels and the noise of the posterior's sample."""

    source: DataSource
    config: VaeTraining
    latent_channels: int
    downsample_factor: int
    validation: bool

    def __getitem__(self, place: Place) -> Batch:
        augment = not self.validation
        pixels, _ = load_sample(self.source, place, self.config, augment=augment)
        draws = Draws(self.config.seed, "posterior", place.index, place.visit)
        height, width = (side // self.downsample_factor for side in pixels.shape[1:])
        noise = draws.normal(self.latent_channels, height, width)
        return {"pixels": pixels, "noise": torch.from_numpy(noise)}


class VaeStage(Stage):
    """Trains an `AutoencoderKL`, and from `disc_start` on a discriminator against it."""

    config: VaeTraining

    def __init__(self, config: VaeTraining):
        super().__init__(config)
        torch.manual_seed(config.seed)
        if config.pretrained_model_name_or_path:
            self.vae = load_vae(locate_model(config.pretrained_model_name_or_path) / "vae")
            self.vae = self.vae.float()
        else:
            self.vae = AutoencoderKL(config.vae)
        check_sides(config, self.vae.config.downsample_factor)
        self.vae.gradient_checkpointing = config.gradient_checkpointing
        if config.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.players, self.averaged = {"vae": self.vae}, ("vae",)
        if config.disc_start is not None:
            self.players["discriminator"] = PatchDiscriminator(self.vae.config.in_channels)
        self.perceptual = _lpips() if config.perceptual_scale else None

    def setup(self, train: DataSource, validation: DataSource, device: torch.device) -> None:
        self.train_data, self.validation_data, self.device = train, validation, device
        if self.perceptual is not None:
            self.perceptual.to(device)

    def dataset(self, source: DataSource, *, validation: bool) -> VaeData:
        shape = self.vae.config
        return VaeData(
            source, self.config, shape.latent_channels, shape.downsample_factor, validation
        )

    def settings(self) -> dict[str, str]:
        # of a pretrained one; the scale is measured anew at every save
        return {"vae settings": str(replace(self.vae.config, scaling_factor=1.0))}

    def active(self, step: int) -> list[str]:
        start = self.config.disc_start
        return ["vae"] if start is None or step < start else ["vae", "discriminator"]

    def parameter_groups(self, player: str) -> list[dict[str, Any]]:
        [group] = super().parameter_groups(player)
        if player == "discriminator" and self.config.disc_learning_rate is not None:
            group["base_lr"] = self.config.disc_learning_rate
        return [group]

    def loss(self, player: str, batch: Batch, step: int) -> dict[str, Tensor]:
        pixels: Tensor = batch["pixels"]  # b 3 H W
        if player == "discriminator":
            return self._discriminator_loss(pixels, batch["reconstruction"])
        images, posterior = self.players["vae"](pixels, batch["noise"])  # b 3 H W
        batch["reconstruction"] = images.detach()
        images = images.to(pixels.dtype)  # losses are not taken in half precision
        difference = images - pixels
        l1 = self.config.rec_loss == "l1"
        reconstruction = difference.abs().mean() if l1 else difference.square().mean()
        kl = posterior.kl().mean() / pixels[0].numel()
        figures = {"reconstruction": reconstruction, "kl": kl}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(images, pixels).mean()
            reconstruction = reconstruction + self.config.perceptual_scale * figures["perceptual"]
        loss = reconstruction + self.config.kl_scale * kl
        if len(self.active(step)) > 1:
            figures["adversarial"] = -self.players["discriminator"](images).to(pixels.dtype).mean()
            weight = self._adaptive_weight(reconstruction, figures["adversarial"])
            loss = loss + self.config.disc_scale * weight * figures["adversarial"]
        return {"loss": loss, **figures}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction from the mode: L1 in [0, 2] and PSNR in dB, on 8-bit pictures' range."""
        pixels = batch["pixels"]
        images = self.vae(pixels)[0].float().clamp(-1, 1)
        error = (images - pixels).flatten(1)
        return {
            "loss": error.abs().mean(1),
            "psnr": 10 * torch.log10(4 / error.square().mean(1).clamp(min=1e-10)),
        }

    @torch.no_grad()
    def preview(self) -> Image:
        """Pictures of the validation data above what becomes of them."""
        data = self.samples(self.validation_data, validation=True)
        count = min(8, len(self.validation_data))
        pixels = torch.stack([data.read(Place(i))["pixels"] for i in range(count)]).to(self.device)
        images = self.vae(pixels)[0].float()
        if not images.isfinite().all():
            raise ConfigError("the VAE puts out NaN or infinity")
        rows = to_pil(torch.cat([pixels, images]))
        return image_grid(rows, columns=count)

    def save(self, folder: Path) -> None:
        """Write `vae/`, with the scale that gives its latents unit variance."""
        if not self.config.decoder_only:
            self.vae.config = replace(self.vae.config, scaling_factor=1 / self._latent_std())
        save_vae(self.vae, folder / "vae")

    @torch.no_grad()
    def _latent_std(self) -> float:
        """Standard deviation of raw latents over the training pictures (Rombach, appendix G)."""
        # A bad picture must not cost a checkpoint, whatever the run says of bad ones.
        items = self.dataset(self.train_data, validation=True)
        data = Samples(items, len(self.train_data), skip=True)
        length = len(self.train_data)
        count = min(SCALE_SAMPLES, length)
        places = [i * length // count for i in range(count)]  # data may be sorted by what it shows
        total = square = number = 0.0
        for start in range(0, count, 32):
            items = [data.read(Place(place)) for place in places[start : start + 32]]
            pixels = torch.stack([item["pixels"] for item in items]).to(self.device)
            noise = torch.stack([item["noise"] for item in items]).to(self.device)
            latents = self.vae.encode(pixels).sample(noise).cpu().double()
            total += float(latents.sum())
            square += float(latents.square().sum())
            number += latents.numel()
        variance = square / number - (total / number) ** 2
        if not 0 < variance < inf:
            raise CheckpointError(
                f"vae: its latents have variance {variance}, so the model is not saved; lower"
                " learning_rate and resume from the checkpoint before"
            )
        return variance**0.5

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The hinge loss (Lim and Ye 2017)."""
        judged = self.players["discriminator"](torch.cat([real, fake])).to(real.dtype)  # 2b 1 p p
        real_logits, fake_logits = judged.chunk(2)
        loss = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
        return {"loss": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """How much harder the reconstruction pulls at the last layer (Esser et al. 2021, eq. 7)."""
        last = self.vae.last_layer
        (pull,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (push,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        return (_mean(pull).norm() / (_mean(push).norm() + 1e-4)).clamp(0, 1e4).detach()


def _mean(gradient: Tensor) -> Tensor:
    """The mean over all processes: how they share out the batch must change nothing."""
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient = gradient / dist.get_world_size()
    return gradient


def _lpips() -> nn.Module:
    try:
        import lpips
    except ImportError:
        raise ConfigError(
            'perceptual_scale needs the lpips package: pip install "ldm-kit[train]", or set it to 0'
        ) from None
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
