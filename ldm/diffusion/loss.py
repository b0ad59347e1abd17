"""The training objective.

Legend: b batch, c channels, h w height and width of the latents, n d length and width of the
context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.config import Prediction
from ldm.diffusion.denoiser import Network
from ldm.diffusion.prediction import training_target
from ldm.diffusion.schedule import NoiseSchedule, per_sample


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor,
    prediction: Prediction | None = None,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """The simple loss, one number a sample.

    Args:
        network: (x_t: b c h w, t: b, context: b n d) -> prediction: b c h w.
        schedule: the forward process.
        x0: scaled latents, float32, b c h w.
        noise: standard normal, b c h w.
        t: integer timesteps in [0, T - 1], b; best kept on the CPU.
        context: text embeddings, b n d.
        prediction: what the network predicts; the schedule's by default.
        min_snr_gamma: weight the samples by `min_snr_weight`; 5 is the paper's choice.

    Returns:
        Mean squared error over c h w, b.

    Source: Ho et al. 2020, eq. 14.
    """
    prediction = prediction or schedule.config.prediction_type
    alpha, sigma_rate = (per_sample(rate, x0) for rate in schedule.rates(t))
    x_t = alpha * x0 + sigma_rate * noise
    output = network(x_t, t.to(torch.float32).to(x0.device, non_blocking=True), context)
    target = training_target(x0, noise, alpha, sigma_rate, prediction)
    loss = (output.to(target.dtype) - target).square().flatten(1).mean(1)  # b
    if min_snr_gamma is not None:
        loss = loss * min_snr_weight(schedule, t, min_snr_gamma, prediction).to(loss)
    return loss


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
