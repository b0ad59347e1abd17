"""From a network that predicts epsilon, v or x0 at the VP scale to D(x; sigma), which returns x0.

Legend: b batch, c channels, h w height and width of the latents, n d length and width of the
context.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import Prediction
from ldm.diffusion.prediction import to_x0
from ldm.diffusion.schedule import NoiseSchedule, per_sample

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t: b c h w at the VP scale, t: b real timesteps, context: k*b n d) -> prediction: k*b c h w.

With k contexts a picture, first the first of each, the network sees each picture with each."""

DenoiseFn = Callable[[Tensor, Tensor], Tensor]
"""(x: b c h w in sigma space, sigma: b) -> x0: b c h w."""


class LearnedVariance:
    """A network that predicts its steps' variance as well, made one that returns the mean alone.

    Source: Nichol & Dhariwal 2021, section 3.1.
    """

    def __init__(self, network: Network):
        self.network = network

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        mean, self._variance = self.network(x_t, t, context).chunk(2, dim=1)  # b c h w
        return mean

    def predicted_variance(self) -> Tensor:
        """What the last call has predicted of the variance, b c h w."""
        return self._variance


class Denoiser:
    """D(x; sigma): the network's estimate of x0 from x = x0 + sigma noise.

    Args:
        network: the U-Net, or an engine made of it.
        schedule: turns sigmas into the timesteps that the network knows.
        prediction: what the network predicts; the schedule's by default.
        clip_sample: clip x0 to [-1, 1], for pixel models; the schedule's by default.
        dtype: what the network computes in; that of x by default. Results have x's own dtype.

    Source: Karras et al. 2022, eq. 7 with the "VP" column of table 1.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        prediction: Prediction | None = None,
        *,
        clip_sample: bool | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction or schedule.config.prediction_type
        self.clip_sample = schedule.config.clip_sample if clip_sample is None else clip_sample
        self.dtype = dtype

    def __call__(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """Estimate x0.

        Args:
            x: latents in sigma space, b c h w.
            sigma: noise levels, b; on the CPU in float64 nothing is lost or waited for.
            context: text embeddings, b n d.

        Returns:
            x0: scaled latents, b c h w, in x's dtype.
        """
        return self.to_x0(self.network_output(x, sigma, context), x, sigma)

    def network_output(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """What the network itself returns for x, in x's dtype. Arguments as `__call__`.

        With k contexts a picture, `k*b n d`, there are as many results, `k*b c h w`.
        """
        alpha, _ = _rates(sigma, x)
        t = self.schedule.sigma_to_t(sigma).to(torch.float32)  # b
        t = t.to(x.device, non_blocking=True)
        x_t = (alpha * x).to(self.dtype or x.dtype)
        return self.network(x_t, t, context).to(x.dtype)

    def to_x0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The x0 that this output of the network means. Arguments as `__call__`."""
        alpha, sigma_rate = _rates(sigma, x)
        x0 = to_x0(output, alpha * x, alpha, sigma_rate, self.prediction)
        return x0.clamp(-1, 1) if self.clip_sample else x0


def _rates(sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) at these sigmas, b 1 1 1 each."""
    alpha = (1 + sigma.double() ** 2).rsqrt()
    return per_sample(alpha, like), per_sample(sigma.double() * alpha, like)
