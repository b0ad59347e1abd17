"""Which noise levels a sampler visits."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ldm.config import Spacing
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError, suggest


def sigma_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: Spacing | None = None,
    *,
    strength: float = 1.0,
    final: Literal["zero", "sigma_min"] = "zero",
    whole_timesteps: bool = False,
    spare_timestep: bool = False,
) -> Tensor:
    """The sigmas of a run of `steps` steps, descending, and the one that the last step goes to.

    `leading`, `trailing` and `linspace` are those of Lin et al. 2024, table 2, with diffusers'
    rounding: multiples of T // steps (plus the schedule's `steps_offset`, which gives way where
    it would lead out of the table), steps back from T - 1, and T - 1 to 0 evenly. The others go
    from the table's largest sigma to its smallest: evenly in sigma^(1/7) (`karras`) or in
    log sigma (`exponential`), or as the quantiles of Beta(0.6, 0.6) (`beta`), densest at both ends.

    Args:
        schedule: the forward process.
        steps: steps of the full run, at strength 1.
        spacing: how they are spaced; the schedule's by default.
        strength: below 1, keep only the last int(steps * strength) steps (image to image).
        final: where the last step goes: to sigma 0 or to the table's smallest sigma.
        whole_timesteps: round `linspace` to whole timesteps.
        spare_timestep: divide `leading` and `linspace` into one step more and leave out its
            last, as DPM-Solver does.

    Returns:
        float64 on the CPU, one entry more than there are steps.

    Raises:
        ConfigError: a spacing, number of steps or strength that gives no grid.

    Source: Lin et al. 2024, table 2; Karras et al. 2022, eq. 5 with rho = 7; Lee et al. 2024, "Beta
    sampling is all you need" (for timesteps; for sigmas as in diffusers and the web UIs).
    """
    spacing = spacing or schedule.config.timestep_spacing
    if not 0 < strength <= 1:
        raise ConfigError(f"sampling: strength is {strength}; it must be above 0 and at most 1")
    if steps < 1:
        raise ConfigError(f"sampling: {steps} steps; give at least 1")
    kept = int(steps * strength)
    if kept < 1:
        raise ConfigError(
            f"sampling: strength {strength} of {steps} steps leaves none; raise one of them"
        )

    high, low = schedule.sigmas[-1].item(), schedule.sigmas[0].item()
    match spacing:
        case "karras":
            sigmas = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
        case "exponential":
            sigmas = np.exp(np.linspace(np.log(high), np.log(low), steps))
        case "beta":
            sigmas = low + (high - low) * _beta_quantiles(np.linspace(1, 0, steps))
        case _:
            timesteps = _timesteps(schedule, steps, spacing, spare_timestep)
            if whole_timesteps:
                timesteps = timesteps.round()
            # Linear between whole timesteps, as in diffusers; `t_to_sigma` is linear in log sigma.
            sigmas = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas.numpy())
    last = 0.0 if final == "zero" else low
    return torch.from_numpy(np.append(sigmas, last))[steps - kept :]


def _beta_quantiles(p: np.ndarray, a: float = 0.6) -> np.ndarray:
    """The quantiles of Beta(a, a) at probabilities p, by bisection of its distribution function.

    B(x; a, a) = x^a sum_n (1 - a)_n / n! x^n / (a + n), which halves a term with every n up to
    x = 1/2; the other half is its mirror image.
    """
    n = np.arange(60)
    terms = np.cumprod(np.append(1, (n[1:] - a) / n[1:])) / (a + n)

    def incomplete(x: np.ndarray) -> np.ndarray:
        return x**a * (terms * x[..., None] ** n).sum(-1)

    goal = 2 * np.minimum(p, 1 - p) * incomplete(np.array(0.5))
    low, high = np.zeros_like(goal), np.full_like(goal, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = incomplete(middle) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p < 0.5, high, 1 - high)


def _timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing, spare: bool) -> np.ndarray:
    """`steps` descending timesteps in [0, T - 1], by numpy for the rounding that users know."""
    length = schedule.config.num_train_timesteps
    count = steps + (spare and spacing != "trailing")
    if count > length:
        raise ConfigError(
            f"sampling: {steps} steps are too many for a schedule of {length} timesteps;"
            " take fewer, or spacing karras"
        )
    match spacing:
        case "leading":
            timesteps = np.arange(count)[::-1] * (length // count)
            offset = min(schedule.config.steps_offset, length - 1 - timesteps[0])
            return (timesteps + offset)[:steps].astype(np.float64)
        case "trailing":
            return np.arange(length, 0, -length / steps)[:steps].round() - 1
        case "linspace":  # a single step starts from noise; np.linspace would start it at 0
            evenly = np.linspace(0, length - 1, count) if count > 1 else np.array([length - 1.0])
            return evenly[::-1][:steps]
    hint = suggest(spacing, get_args(Spacing))
    raise ConfigError(f"sampling: there is no timestep spacing '{spacing}'; {hint}")
