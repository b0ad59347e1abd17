"""The loop that every sampler shares: it runs an update rule from sigma to sigma along a grid.

Coefficients are Python floats, hence float64; latents keep the dtype they came in.

Legend: b batch, c channels, h w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn
from ldm.errors import ConfigError

NoiseFn = Callable[[], Tensor]
"""Draws fresh standard normal noise of x's shape, dtype and device."""

Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]
"""(step, sigma, x, x0) after each step, with the x that the step arrived at, that x's sigma, and
the x0 predicted on the way. A tensor that it returns replaces x; `StopSampling(x)` ends the run."""

Step = Callable[[Tensor, Tensor, float, float], Tensor]
"""(x, x0 = denoise(x, sigma), sigma, sigma_next) -> x at sigma_next."""


class StopSampling(Exception):
    """Raised by a callback to end the run; the sampler returns what it carries, x: b c h w."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x


def run(
    step: Step, denoise: DenoiseFn, x: Tensor, sigmas: Tensor, callback: Callback | None
) -> Tensor:
    """Take `step` from each sigma of the grid to the next; all arguments as `sample_euler`'s."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, batch_of(sigma, x))
        x = step(x, x0, sigma, sigma_next)
        if callback is not None:
            try:
                replaced = callback(i, sigma_next, x, x0)
            except StopSampling as stop:
                return stop.x
            x = x if replaced is None else replaced
    return x


def batch_of(sigma: float, x: Tensor) -> Tensor:
    """b copies of sigma, on the CPU in float64: the denoiser looks up its timesteps there."""
    return torch.full((len(x),), sigma, dtype=torch.float64)  # b


def sampler(make: Callable[..., Step]) -> Callable[..., Tensor]:
    """A sampler of its update rule: `make(denoise, sigmas, noise, **options)` gives its `Step`.

    The sampler is `(denoise, x, sigmas, *, noise=None, callback=None, **options) -> x`.

    Raises:
        ConfigError: the rule draws noise and the caller gave none.
    """

    @wraps(make, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def sample(
        denoise: DenoiseFn,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: NoiseFn | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        step = make(denoise, sigmas, noise or _no_noise, **options)
        return run(step, denoise, x, sigmas, callback)

    del sample.__wrapped__  # type: ignore  # help() shows how a sampler is called, not made
    return sample


def _no_noise() -> Tensor:
    raise ConfigError("sampling: this sampler is stochastic; pass `noise`, or use eta 0")
