"""One-step samplers: each step forgets the ones before it.

Sigma space makes the family resemblance plain. On the probability flow ODE, Euler's method is DDIM
with eta 0, and `heun` and `dpm2` are Euler with a second look at the slope. With noise, DDIM with
eta 1 is Euler ancestral, and both are DDPM with its smaller variance (`ancestral_step`);
`dpmpp_2s_a` and `dpmpp_sde` are that with a second look.

Legend: b batch, c channels, h w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import get_args

from torch import Tensor

from ldm.config import Variance
from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.prediction import interpolated_variance
from ldm.diffusion.sampling_loop import NoiseFn, Step, batch_of, sampler
from ldm.errors import ConfigError, suggest


@sampler
def sample_euler(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
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
        return x0 + d * sigma_next  # x + d (sigma_next - sigma), and x0 to the bit at sigma 0

    return step


@sampler
def sample_heun(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """Heun's method: Euler plus its correction, twice the network calls. Arguments as Euler's.

    It is also the Keras DDIM example's second-order sampling with its alpha at 1.

    Source: Karras et al. 2022, algorithm 1 (no churn).
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        d = (x - x0) / sigma
        x_next = x0 + d * sigma_next
        d_next = (x_next - denoise(x_next, batch_of(sigma_next, x))) / sigma_next
        return x + (d + d_next) / 2 * (sigma_next - sigma)

    return step


@sampler
def sample_dpm2(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """DPM-Solver-2: Euler with the slope of the step's middle. Arguments as Euler's.

    The middle is that of log sigma. The Keras DDIM example's second-order sampling with its alpha
    at 1/2 is the same with the middle of the diffusion time.

    Source: Lu et al. 2022, "DPM-Solver", algorithm 1; k-diffusion, `sample_dpm_2`.
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        middle = sqrt(sigma * sigma_next)
        x_middle = x0 + (x - x0) / sigma * middle
        d = (x_middle - denoise(x_middle, batch_of(middle, x))) / middle
        return x + d * (sigma_next - sigma)

    return step


@sampler
def sample_ddim(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn, eta: float = 0.0) -> Step:
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
        return x_next + up * noise() if up else x_next

    return step


@sampler
def sample_euler_a(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """Euler ancestral: an Euler step down to sigma_down, then noise back up to sigma_next.

    An Euler step from sigma to sigma_down is x0 + sigma_down epsilon, so this is DDIM with eta 1.

    Source: k-diffusion, `sample_euler_ancestral`; Song et al. 2021, eq. 12 with eq. 16 at eta 1.
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        up = sigma_next / sigma * sqrt(sigma**2 - sigma_next**2)
        x_next = x0 + sqrt(sigma_next**2 - up**2) * ((x - x0) / sigma)
        return x_next + up * noise() if up else x_next

    return step


@sampler
def sample_ddpm(
    denoise: DenoiseFn,
    sigmas: Tensor,
    noise: NoiseFn,
    variance: Variance = "fixed_small",
    predicted_variance: Callable[[], Tensor] | None = None,
) -> Step:
    """Ancestral sampling from the posterior q(x_next | x, x0), on the whole chain or a strided one.

    No noise in the last step, as in the paper; diffusers' adds some unless that is timestep 0.

    Args:
        noise: fresh unit noise; not drawn for a step to sigma 0. Other arguments as Euler's.
        variance: the posterior's own (beta tilde, `fixed_small`), beta (`fixed_large`), or between
            them what the network says (`learned_range`).
        predicted_variance: gives what that is in the last call, b c h w; of a call with more
            samples than x, as for guidance, the last ones count.

    Raises:
        ConfigError: `noise` is missing, or there is no such variance.

    Source: Ho et al. 2020, algorithm 2 and eq. 6 and 7, divided by sqrt(abar_{t-1}); Nichol &
    Dhariwal 2021, eq. 15.
    """
    if variance not in get_args(Variance):
        hint = suggest(variance, get_args(Variance))
        raise ConfigError(f"sampling: there is no DDPM variance '{variance}'; {hint}")
    if variance == "learned_range" and predicted_variance is None:
        raise ConfigError("sampling: this network predicts no variance; use fixed_small")

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        ratio = (sigma_next / sigma) ** 2
        mean = x0 + ratio * (x - x0)
        if sigma_next == 0:
            return mean
        small = ratio * (sigma**2 - sigma_next**2)
        # 1 - abar_t / abar_{t-1}, at the scale of x_{t-1}; abar = 1 / (1 + sigma^2)
        large = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
        if predicted_variance is not None and variance == "learned_range":
            output = predicted_variance()[-len(x) :].to(x)
            return mean + interpolated_variance(output, small, large).sqrt() * noise()
        return mean + sqrt(small if variance == "fixed_small" else large) * noise()

    return step


@sampler
def sample_dpmpp_2s_a(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """DPM-Solver++(2S) ancestral: a second-order step below sigma_next, then noise back up to it.

    Source: k-diffusion, `sample_dpmpp_2s_ancestral`; Lu et al. 2022, "DPM-Solver++", algorithm 1.
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        down = sigma_next**2 / sigma  # as an ancestral step does, see there
        middle = sqrt(sigma * down)
        x_middle = x0 + middle / sigma * (x - x0)
        x0_middle = denoise(x_middle, batch_of(middle, x))
        up = sqrt(sigma_next**2 - down**2)
        return x0_middle + down / sigma * (x - x0_middle) + up * noise()

    return step


@sampler
def sample_dpmpp_sde(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """DPM-Solver++ (SDE): an ancestral step with the x0 that one to its middle leads to.

    The noise of the half step and of the whole step are increments of one Brownian motion whose
    time is sigma, as in k-diffusion.

    Source: k-diffusion, `sample_dpmpp_sde` with r = 1/2.
    """

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        middle = sqrt(sigma * sigma_next)
        before, after = noise(), noise()
        whole = sqrt(sigma - middle) * before + sqrt(middle - sigma_next) * after
        x_middle = ancestral_step(x, x0, sigma, middle, before)
        x0_middle = denoise(x_middle, batch_of(middle, x))
        return ancestral_step(x, x0_middle, sigma, sigma_next, whole / sqrt(sigma - sigma_next))

    return step


def ancestral_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float, noise: Tensor) -> Tensor:
    """A draw from the posterior q(x_next | x, x0), given its unit noise.

    Or: an Euler step to down = sigma_next^2 / sigma, and noise from there back up to sigma_next.

    Args:
        x: latents in sigma space at `sigma`, b c h w.
        x0: what they are thought to come from, b c h w.
        sigma: noise level of x.
        sigma_next: noise level to go to, below `sigma`.
        noise: standard normal, b c h w.

    Source: Ho et al. 2020, eq. 6 and 7, divided by sqrt(abar_{t-1}).
    """
    ratio = (sigma_next / sigma) ** 2
    return x0 + ratio * (x - x0) + sigma_next * sqrt(1 - ratio) * noise
