"""The training objective.

Legend: b batch, c channels, h w height and width of the latents, n d length and width of the
context.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import Prediction
from ldm.diffusion.denoiser import Network
from ldm.diffusion.prediction import interpolated_variance, to_x0, training_target
from ldm.diffusion.schedule import NoiseSchedule, per_sample

LossType = Literal["l2", "l1", "huber"]


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor,
    min_snr_gamma: float | None = None,
    *,
    seen_noise: Tensor | None = None,
    loss_type: LossType = "l2",
    huber_c: float = 0.1,
    vlb_weight: float = 0.0,
) -> Tensor:
    """The simple loss, or with `vlb_weight` the hybrid one, one number a sample.

    Args:
        network: (x_t: b c h w, t: b, context: b n d) -> prediction: b c h w, or b 2c h w where the
            schedule's `variance_type` is learned_range.
        schedule: the forward process.
        x0: scaled latents, float32, b c h w.
        noise: standard normal, b c h w.
        t: integer timesteps in [0, T - 1], b; best kept on the CPU.
        context: text embeddings, b n d.
        min_snr_gamma: weight the samples by `min_snr_weight`; 5 is the paper's choice.
        seen_noise: what x_t is made with, where that is not the noise to predict, b c h w.
        loss_type: see `distance`.
        huber_c: see `distance`.
        vlb_weight: where the network predicts its variance, adds so much of `variational_bound`
            times T, which trains the variance and leaves the mean alone.

    Returns:
        Mean distance over c h w, b.

    Source: Ho et al. 2020, eq. 14; Nichol & Dhariwal 2021, eq. 16.
    """
    prediction = schedule.config.prediction_type
    alpha, sigma_rate = (per_sample(rate, x0) for rate in schedule.rates(t))
    x_t = alpha * x0 + sigma_rate * (noise if seen_noise is None else seen_noise)
    output = network(x_t, t.to(torch.float32).to(x0.device, non_blocking=True), context)
    mean, variance = output.to(x0.dtype).tensor_split([x0.shape[1]], dim=1)  # b c h w
    target = training_target(x0, noise, alpha, sigma_rate, prediction)
    loss = distance(mean, target, loss_type, huber_c).flatten(1).mean(1)  # b
    if min_snr_gamma is not None:
        loss = loss * min_snr_weight(schedule, t, min_snr_gamma, prediction).to(loss)
    if vlb_weight and schedule.config.variance_type == "learned_range":
        guess = to_x0(mean.detach(), x_t, alpha, sigma_rate, prediction)
        bound = variational_bound(schedule, x0, guess, variance, t)
        loss = loss + vlb_weight * schedule.config.num_train_timesteps * bound
    return loss


def distance(output: Tensor, target: Tensor, kind: LossType, huber_c: float) -> Tensor:
    """How far each number is off: e^2 (`l2`), |e| (`l1`); or `huber`, twice Huber's function.

    That is e^2 where |e| is at most `huber_c`, and 2 huber_c |e| - huber_c^2 beyond.

    Source: Huber 1964, "Robust estimation of a location parameter".
    """
    match kind:
        case "l2":
            return (output - target).square()
        case "l1":
            return (output - target).abs()
        case "huber":
            return 2 * F.huber_loss(output, target, reduction="none", delta=huber_c)


def variational_bound(
    schedule: NoiseSchedule, x0: Tensor, guess: Tensor, variance: Tensor, t: Tensor
) -> Tensor:
    """A term of the variational bound on -log p(x0), in bits a dimension: b.

    Args:
        schedule: the forward process.
        x0: scaled latents, b c h w.
        guess: the network's x0, b c h w.
        variance: what it predicts of its step's variance, b c h w; see `interpolated_variance`.
        t: timesteps, b. At 0 stands the Gaussian density of x0, for latents have no levels to
            integrate it over, as the paper's pixels have.

    Source: Nichol & Dhariwal 2021, eq. 4 to 7 and 15; in bits, as in its authors' code.
    """
    weight, small, large = (per_sample(table, x0) for table in schedule.posterior(t))
    model = interpolated_variance(variance, small, large)  # b c h w
    error = (weight * (x0 - guess)).square() / model
    kl = ((model / small).log() + small / model + error - 1) / 2
    density = ((2 * math.pi * model).log() + error) / 2
    term = torch.where(per_sample(t == 0, x0) > 0, density, kl)
    return term.flatten(1).mean(1) / math.log(2)


def min_snr_weight(
    schedule: NoiseSchedule, t: Tensor, gamma: float, prediction: Prediction
) -> Tensor:
    """Weights that make every prediction's loss min(SNR, gamma) times that of x0, float64: b.

    Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", section 3.4.
    """
    alpha, sigma_rate = schedule.rates(t)
    snr = (alpha / sigma_rate) ** 2
    # |x0 error|^2 is |eps error|^2 / SNR, and |v error|^2 / (SNR + 1).
    per_x0 = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[prediction]
    return snr.clamp(max=gamma) / per_x0
