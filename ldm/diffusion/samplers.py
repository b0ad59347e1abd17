"""Samplers: pure functions (denoise, x, sigmas) -> x in sigma space, where x = x0 + sigma noise.

Each sampler is its update rule from sigma to sigma_next (`step`); `_run` is the loop around it.
Sigma space makes the family resemblance plain: DDIM with eta 0 is Euler, DDIM with eta 1 is
Euler ancestral, and these last two are DDPM with its smaller variance. They differ in the grid that
users know them by, which `SAMPLERS` keeps beside each function.

Coefficients are Python floats, hence float64; latents keep the dtype they came in.

Legend: b batch, c channels, h w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt
from typing import Literal

import torch
from torch import Tensor

from ldm.config import Spacing
from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.prediction import from_vp
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sigma_grid import sigma_grid
from ldm.errors import ConfigError, suggest

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


def sample_euler(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability flow ODE, dx/dsigma = (x - x0) / sigma.

    Args:
        denoise: (x: b c h w, sigma: b) -> x0: b c h w.
        x: latents in sigma space at sigmas[0], b c h w.
        sigmas: descending noise levels, one more than there are steps.
        noise: not used by this sampler.
        callback: called after each step, see `Callback`.

    Returns:
        Latents in sigma space at sigmas[-1], b c h w.

    Source: Karras et al. 2022, algorithm 1 without its correction and churn.
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        d = (x - x0) / sigma
        return x + d * (sigma_next - sigma)

    return _run(step, denoise, x, sigmas, callback)


def sample_heun(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method: Euler plus its correction, twice the network calls. Arguments as Euler's.

    Source: Karras et al. 2022, algorithm 1 (no churn).
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        d = (x - x0) / sigma
        x_next = x + d * (sigma_next - sigma)
        if sigma_next == 0:
            return x_next
        d_next = (x_next - denoise(x_next, _per_sample(sigma_next, x))) / sigma_next
        return x + (d + d_next) / 2 * (sigma_next - sigma)

    return _run(step, denoise, x, sigmas, callback)


def sample_dpmpp_2m(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order from the x0 of the step before. Arguments as Euler's.

    The first step and a step to sigma 0, where lambda is infinite, are of first order.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2, with lambda = -log sigma.
    """
    x0_last, h_last = x, 0.0

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        nonlocal x0_last, h_last
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        D = x0 + h / (2 * h_last) * (x0 - x0_last) if h_last else x0
        x0_last, h_last = x0, h
        return sigma_next / sigma * x + (1 - sigma_next / sigma) * D

    return _run(step, denoise, x, sigmas, callback)


def sample_ddim(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM: deterministic at eta 0, ancestral sampling at eta 1. Other arguments as Euler's.

    Each step goes to the next sigma of the grid. diffusers' goes to timestep t - T // steps, which
    is another one for `linspace`, and for `trailing` where `steps` does not divide T.

    Args:
        noise: fresh unit noise, needed when eta is above 0.
        eta: share of the ancestral noise, in [0, 1].

    Raises:
        ConfigError: eta is outside [0, 1], or above 0 without `noise`.

    Source: Song et al. 2021, eq. 12 and 16, divided by sqrt(alpha_{t-1}).
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampling: eta is {eta}; it must lie between 0 and 1")

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        epsilon = (x - x0) / sigma
        up = eta * sigma_next / sigma * sqrt(sigma**2 - sigma_next**2)
        down = sqrt(sigma_next**2 - up**2)
        x_next = x0 + down * epsilon
        return x_next + up * _draw(noise) if up else x_next

    return _run(step, denoise, x, sigmas, callback)


def sample_euler_a(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler ancestral: an Euler step down to sigma_down, then noise back up to sigma_next.

    An Euler step from sigma to sigma_down is x0 + sigma_down epsilon, so this is DDIM with eta 1.

    Args:
        noise: fresh unit noise; other arguments as Euler's.

    Raises:
        ConfigError: `noise` is missing.

    Source: k-diffusion, `sample_euler_ancestral`; Song et al. 2021, eq. 12 with eq. 16 at eta 1.
    """
    return sample_ddim(denoise, x, sigmas, noise=noise, callback=callback, eta=1.0)


def sample_ddpm(
    denoise: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> Tensor:
    """Ancestral sampling from the posterior q(x_next | x, x0), on the whole chain or a strided one.

    No noise in the last step, as in the paper; diffusers' adds some unless that is timestep 0.

    Args:
        noise: fresh unit noise; not drawn for a step to sigma 0. Other arguments as Euler's.
        variance: the posterior's own (beta tilde, `fixed_small`), or beta (`fixed_large`).

    Raises:
        ConfigError: `noise` is missing, or there is no such variance.

    Source: Ho et al. 2020, algorithm 2 and eq. 6 and 7, divided by sqrt(abar_{t-1}).
    """
    if variance not in ("fixed_small", "fixed_large"):
        hint = suggest(variance, ["fixed_small", "fixed_large"])
        raise ConfigError(f"sampling: there is no DDPM variance '{variance}'; {hint}")

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        ratio = (sigma_next / sigma) ** 2
        mean = x0 + ratio * (x - x0)
        if sigma_next == 0:
            return mean
        if variance == "fixed_small":
            var = ratio * (sigma**2 - sigma_next**2)
        else:  # 1 - abar_t / abar_{t-1}, at the scale of x_{t-1}; abar = 1 / (1 + sigma^2)
            var = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
        return mean + sqrt(var) * _draw(noise)

    return _run(step, denoise, x, sigmas, callback)


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler with the grid and the start that users know it by: those of diffusers.

    Attributes:
        sample: the function.
        needs_noise: draws noise whatever its options (DDIM does only when eta is above 0).
        options: keyword arguments of its own.
        final: where the last step goes: sigma 0, or as the schedule's `set_alpha_to_one` says.
        whole_timesteps: visits whole timesteps only.
        spare_timestep: divides the chain into one step more and leaves out its last.
        unit_start: starts from unit variance at the VP scale for every spacing; else only for
            `leading` and `karras`, and from noise * sigma for `linspace` and `trailing`.
    """

    sample: Callable[..., Tensor]
    needs_noise: bool = False
    options: tuple[str, ...] = ()
    final: Literal["zero", "schedule"] = "zero"
    whole_timesteps: bool = True
    spare_timestep: bool = False
    unit_start: bool = True

    def grid(
        self,
        schedule: NoiseSchedule,
        steps: int,
        spacing: Spacing | None = None,
        *,
        strength: float = 1.0,
    ) -> Tensor:
        """The sigmas that this sampler visits. Arguments, result and Raises as `sigma_grid`."""
        spacing = spacing or schedule.config.timestep_spacing
        # The karras grid visits the smallest sigma itself: what is left to go to is 0.
        to_zero = self.final == "zero" or schedule.config.set_alpha_to_one or spacing == "karras"
        return sigma_grid(
            schedule,
            steps,
            spacing,
            strength=strength,
            final="zero" if to_zero else "sigma_min",
            whole_timesteps=self.whole_timesteps,
            spare_timestep=self.spare_timestep,
        )

    def initial_latents(self, noise: Tensor, sigma: float, spacing: Spacing) -> Tensor:
        """Where a run from pure noise starts.

        Args:
            noise: standard normal, b c h w.
            sigma: first sigma of the grid.
            spacing: spacing of the grid.

        Returns:
            Latents in sigma space, b c h w.
        """
        if self.unit_start or spacing in ("leading", "karras"):
            return from_vp(noise, sigma)
        return noise * sigma


SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(sample_ddpm, needs_noise=True, options=("variance",)),
    "ddim": SamplerSpec(sample_ddim, options=("eta",), final="schedule"),
    "euler": SamplerSpec(sample_euler, whole_timesteps=False, unit_start=False),
    "euler_a": SamplerSpec(
        sample_euler_a, needs_noise=True, whole_timesteps=False, unit_start=False
    ),
    "heun": SamplerSpec(sample_heun, whole_timesteps=False, unit_start=False),
    "dpmpp_2m": SamplerSpec(sample_dpmpp_2m, spare_timestep=True),
}


def get_sampler(name: str) -> SamplerSpec:
    """The sampler of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampling: there is no sampler '{name}'; {suggest(name, SAMPLERS)}")
    return SAMPLERS[name]


def _run(
    step: Step, denoise: DenoiseFn, x: Tensor, sigmas: Tensor, callback: Callback | None
) -> Tensor:
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, _per_sample(sigma, x))
        x = step(x, x0, sigma, sigma_next)
        if callback is not None:
            try:
                replaced = callback(i, sigma_next, x, x0)
            except StopSampling as stop:
                return stop.x
            x = x if replaced is None else replaced
    return x


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    """b copies of sigma, on the CPU in float64: the denoiser looks up its timesteps there."""
    return torch.full((len(x),), sigma, dtype=torch.float64)  # b


def _draw(noise: NoiseFn | None) -> Tensor:
    if noise is None:
        raise ConfigError("sampling: this sampler is stochastic; pass `noise`, or use eta 0")
    return noise()
