"""The forward process: how much signal and how much noise there is at each timestep.

Notation of the variance-preserving (VP) process, Ho et al. 2020 eq. 4:
    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise
and of the same process seen at unit signal ("sigma space", Karras et al. 2022):
    x = x_t / sqrt(abar_t) = x0 + sigma_t noise,    sigma_t = sqrt((1 - abar_t) / abar_t)

Legend: T timesteps, b batch, c channels, h w height and width of the latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import ConfigError

# What abar_T = 0 is replaced by, so that the last sigma is 4096 and not infinite: the smallest
# float16, and the number that diffusers' Euler and DPM-Solver schedulers use.
TERMINAL_ALPHA_CUMPROD = 2.0**-24


class NoiseSchedule:
    """Tables of the noise schedule, and the map between timesteps and sigmas.

    Everything is float64 on the CPU: samplers need a handful of numbers a step, and float32 tables
    lose four digits of the small sigmas.

    Args:
        config: formula of the schedule, or its table.

    Attributes:
        betas: variance of each step of the chain, after any rescaling, T.
        alphas_cumprod: abar, the share of signal in the variance, T. With zero terminal SNR the
            last one is 2**-24 instead of 0, so that sigma stays finite.
        sigmas: noise per unit of signal, ascending, T.

    Raises:
        ConfigError: `trained_betas` does not fit, or zero terminal SNR is asked of
            `cosine_signal_rates`.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        tabled = config.trained_betas is not None
        self._continuous = config.beta_schedule == "cosine_signal_rates" and not tabled
        if self._continuous and config.rescale_betas_zero_snr:
            raise ConfigError(
                "schedule: rescale_betas_zero_snr does not apply to cosine_signal_rates;"
                " lower min_signal_rate instead"
            )
        self.betas = _betas(config)
        if config.rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if self.alphas_cumprod[-1] == 0:
            self.alphas_cumprod[-1] = TERMINAL_ALPHA_CUMPROD
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self._log_sigmas = self.sigmas.log()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal rate sqrt(abar_t) and noise rate sqrt(1 - abar_t) of integer timesteps `t`: b."""
        alphas_cumprod = self.alphas_cumprod[t.cpu()]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def posterior(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step back q(x_{t-1} | x_t, x0) from integer timesteps `t`: b, at the VP scale.

        Returns:
            How much x0 weighs in its mean; its variance, beta tilde, the smallest that a step of
            the model can have; and beta, the largest: b each. At t 0, where beta tilde is 0, it is
            that of t 1.

        Source: Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, section 3.1.
        """
        after = self.alphas_cumprod
        before = torch.cat([after.new_ones(1), after[:-1]])  # T
        beta = 1 - after / before
        small = beta * (1 - before) / (1 - after)
        small[0] = small[1]
        weight = before.sqrt() * beta / (1 - after)
        t = t.cpu()
        return weight[t], small[t], beta[t]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x0), at the VP scale.

        Args:
            x0: scaled latents, b c h w.
            noise: standard normal, b c h w.
            t: integer timesteps in [0, T - 1], b; on the CPU no device has to be waited for.

        Source: Ho et al. 2020, eq. 4.
        """
        alpha, sigma_rate = self.rates(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma_rate, x0) * noise

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The real timestep in [0, T - 1] at which the noise level is `sigma` (any shape).

        Linear in log sigma between the entries of the table, as in k-diffusion and diffusers; the
        closed form for `cosine_signal_rates`. Sigmas outside the table give its ends.
        """
        sigma = sigma.to("cpu", torch.float64)
        last = self.config.num_train_timesteps - 1
        if self._continuous:
            start, end = _angles(self.config)
            return ((sigma.atan() - start) / (end - start) * last).clamp(0, last)
        log_sigma = sigma.log()
        high = torch.searchsorted(self._log_sigmas, log_sigma).clamp(1, last)
        below, above = self._log_sigmas[high - 1], self._log_sigmas[high]
        return high - 1 + ((log_sigma - below) / (above - below)).clamp(0, 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level at real timesteps `t` in [0, T - 1] (any shape): undoes `sigma_to_t`."""
        t = t.to("cpu", torch.float64)
        last = self.config.num_train_timesteps - 1
        if self._continuous:
            start, end = _angles(self.config)
            return (start + (end - start) * t / last).tan()
        low = t.floor().long().clamp(0, last - 1)
        return torch.lerp(self._log_sigmas[low], self._log_sigmas[low + 1], t - low).exp()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, shaped, typed and placed to multiply `like`: b -> b 1 1 1."""
    # Unless told not to, a copy to a GPU waits for all the work that is queued there.
    values = values.to(like.dtype).to(like.device, non_blocking=True)
    return values.reshape(-1, *(1,) * (like.ndim - 1))  # b 1 1 1


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift sqrt(abar) so that it ends at 0 and keeps its first entry; twice changes nothing more.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", alg. 1.
    """
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    return _betas_of((first * (signal - last) / (first - last)) ** 2)


def _betas(config: ScheduleConfig) -> Tensor:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return _checked(config.trained_betas, count)
    match config.beta_schedule:
        case "linear":  # Ho et al. 2020, section 4
            return torch.linspace(start, end, count, dtype=torch.float64)
        case "scaled_linear":  # Rombach et al. 2022
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            time = torch.arange(count + 1, dtype=torch.float64) / count
            alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
        case "cosine_signal_rates":  # the Keras DDIM example: the angle is linear in time
            angles = torch.linspace(*_angles(config), count, dtype=torch.float64)
            return _betas_of(angles.cos() ** 2)


def _angles(config: ScheduleConfig) -> tuple[float, float]:
    return math.acos(config.max_signal_rate), math.acos(config.min_signal_rate)


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before


def _checked(table: tuple[float, ...], count: int) -> Tensor:
    if len(table) != count:
        raise ConfigError(
            f"schedule: {len(table)} trained_betas for num_train_timesteps {count};"
            " give one a timestep"
        )
    betas = torch.tensor(table, dtype=torch.float64)
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ConfigError("schedule: every beta must be above 0 and at most 1")
    return betas
