"""The two sides of training: the loop of ldm, and that of diffusers' example scripts.

Legend: b batch, l h w latents, n d tokens and width of the context, H W pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ldm.benchmark.cases import Job
from ldm.benchmark.models import SHAPES, TOKENS, latent_shape
from ldm.benchmark.pace import Pace

PRECISION: dict[str, Any] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LEARNING_RATE, DECAY, KL = 1e-4, 0.9999, 1e-6
BATCHES = 2  # of samples in the data set
ENDLESS = 10**6  # steps


def ours(job: Job, variant: str) -> Callable[[Pace], None]:
    """A real run of `scripts/train.py` on the procedural flowers, which waits before each step."""
    from ldm.training.config import UNetTraining, VaeTraining
    from ldm.training.data import open_data
    from ldm.training.loop import Run
    from ldm.training.samples import Batch, Loader
    from ldm.training.stop import Stop

    [point], is_unet = job.points, job.work == "train_unet"
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(job.folder),
        "output_dir": job.scratch / variant,
        "resolution": point.height,
        "train_batch_size": point.batch,
        "max_train_samples": BATCHES * point.batch,
        "max_train_steps": ENDLESS,
        "validation_steps": ENDLESS,
        "checkpointing_steps": ENDLESS,
        "validation_samples": 1,
        "learning_rate": LEARNING_RATE,
        "ema_decay": DECAY,
        "mixed_precision": PRECISION[job.dtype],
        "torch_compile": variant == "ldm compiled",
        "report_to": None,
    }
    config = UNetTraining(**options, cache_latents=True) if is_unet else VaeTraining(**options)

    class Paced(Run):
        def read(self, loader: Loader) -> tuple[list[Batch], list[str]]:
            while next(pace).check:
                pace.output = self.checked()
            return super().read(loader)

        def checked(self) -> list[Tensor]:
            [(name, module)] = self.stage.players.items()
            batch = _checked_batch(job, self.accelerator.device)
            if is_unet:
                moments = batch["latents"] / self.stage.vae.config.scaling_factor  # type: ignore
                batch["moments"] = torch.cat([moments, torch.full_like(moments, -30)], 1)
                batch["posterior_noise"] = torch.zeros_like(moments)
            with self.accelerator.autocast():
                loss = self.stage.loss(name, batch, 0)["loss"]
            return _checked(loss, module, self.accelerator)

    pace: Pace

    def turns(given: Pace) -> None:
        nonlocal pace
        pace = given
        run = Paced(job.work.removeprefix("train_"), config, *open_data(config))
        run.prepare()
        pace.watch(run.stage, "loss")
        pace.watch(run.accelerator, "backward")
        pace.watch(torch.nn.utils, "get_total_norm")
        for optimizer in run.state.optimizers.values():
            pace.watch(optimizer, "step")
        for average in run.state.averages.values():
            pace.watch(average, "update")
        run.train(Stop())

    return turns


def theirs(job: Job, variant: str) -> Callable[[Pace], None]:
    """diffusers' networks in the loop of its train_text_to_image.py, with --use_ema.

    Its latents and text embeddings are made beforehand, unless the variant has images: these and
    the tokens are made beforehand, and encoded in each step as in the script.
    """
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel

    [point], is_unet = job.points, job.work == "train_unet"
    accelerator = Accelerator(
        mixed_precision=PRECISION["fp32" if variant == "diffusers fp32" else job.dtype],
        cpu=not job.device.startswith("cuda"),
    )
    kind: Any = UNet2DConditionModel if is_unet else AutoencoderKL
    where = {"subfolder": "unet" if is_unet else "vae"}
    module: Any = kind.from_pretrained(job.folder, **where).train()
    average = kind.from_pretrained(job.folder, **where)
    ema = EMAModel(average.parameters(), decay=DECAY, model_cls=kind, model_config=average.config)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule: Any = DDPMScheduler.from_pretrained(job.folder, subfolder="scheduler")
    rate = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0)
    data = _data(job, variant)
    loader = DataLoader(data, batch_size=point.batch, shuffle=True)
    module, optimizer, loader, rate = accelerator.prepare(module, optimizer, loader, rate)
    frozen: list[Any] = []
    if variant == "diffusers images":
        for maker, name in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
            network = maker.from_pretrained(job.folder, subfolder=name).requires_grad_(False)
            frozen.append(network.to(accelerator.device, job.torch_dtype(variant)))

    def encoded(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        vae, text_encoder = frozen
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        latents = posterior.sample() * vae.config.scaling_factor
        return latents, text_encoder(tokens, return_dict=False)[0]

    def unet_loss(latents: Tensor, context: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        noisy = schedule.add_noise(latents, noise, t)  # b l h w
        prediction = module(noisy, t, context, return_dict=False)[0]
        return F.mse_loss(prediction.float(), noise.float(), reduction="mean")

    def vae_loss(images: Tensor, noise: Tensor) -> Tensor:
        network = accelerator.unwrap_model(module)
        with accelerator.autocast():
            posterior = network.encode(images).latent_dist
            output = network.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / images[0].numel()
        return (output.float() - images).abs().mean() + KL * kl

    def loss_of(batch: list[Tensor]) -> Tensor:
        if not is_unet:
            noise = torch.randn(latent_shape(job, point), device=accelerator.device)
            return vae_loss(batch[0], noise)
        latents, context = encoded(*batch) if frozen else batch
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
        return unet_loss(latents, context, noise, t)

    def checked() -> list[Tensor]:
        batch = _checked_batch(job, accelerator.device)
        names = ("latents", "context", "noise", "t") if is_unet else ("pixels", "noise")
        inputs = [batch[name] for name in names]
        loss = (unet_loss if is_unet else vae_loss)(*inputs)
        return _checked(loss, module, accelerator)

    def turns(pace: Pace) -> None:
        batches, seen = chain.from_iterable(repeat(loader)), 0.0  # batches without end
        for point in pace:
            if point.check:
                pace.output = checked()
                continue
            with accelerator.accumulate(module):
                loss = loss_of(next(batches))
                # for the script's log, which waits for the device in each step
                seen += accelerator.gather(loss.repeat(len(data) // BATCHES)).mean().item()  # type: ignore
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            ema.step(module.parameters())

    return turns


def _data(job: Job, variant: str) -> TensorDataset:
    """What the other loop reads: (latents, context), (images, tokens), or images alone."""
    [point], (preset, text) = job.points, SHAPES[job.size]
    n, *latent = BATCHES * point.batch, *latent_shape(job, point)[1:]
    images = torch.rand(n, 3, point.height, point.width) * 2 - 1
    if variant == "diffusers images":
        return TensorDataset(images, torch.randint(0, text.vocab_size, (n, TOKENS)))
    if job.work == "train_vae":
        return TensorDataset(images)
    context = torch.randn(n, TOKENS, preset.unet.cross_attention_dim)
    return TensorDataset(torch.randn(n, *latent), context)


def _checked_batch(job: Job, device: Any) -> dict[str, Tensor]:
    """One batch that is the same on both sides."""
    [point], generator = job.points, torch.Generator().manual_seed(0)
    b, *latent = latent_shape(job, point)
    width = SHAPES[job.size][0].unet.cross_attention_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "latents": normal(b, *latent),
        "noise": normal(b, *latent),
        "context": normal(b, TOKENS, width),
        "t": torch.linspace(1, 990, b).long().to(device),
        "pixels": normal(b, 3, point.height, point.width).clamp(-1, 1),
    }


def _checked(loss: Tensor, module: nn.Module, accelerator: Any) -> list[Tensor]:
    """The loss and its gradient at the network's first weight, which all others have a part in."""
    accelerator.backward(loss)
    weights = dict(module.named_parameters())
    name = next(name for name in weights if name.endswith("conv_in.weight"))
    gradient = weights[name].grad
    assert gradient is not None
    found = [loss.detach(), gradient.clone()]
    module.zero_grad()
    return found
