"""The samplers by name, each with the grid and the start that users know it by.

Samplers are pure functions (denoise, x, sigmas) -> x in sigma space, where x = x0 + sigma noise:
those of one_step.py and multistep.py, over the loop of sampling_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from ldm.config import TIMESTEP_SPACINGS, Spacing
from ldm.diffusion.multistep import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_lms,
    sample_plms,
    sample_unipc,
)
from ldm.diffusion.one_step import (
    sample_ddim,
    sample_ddpm,
    sample_dpm2,
    sample_dpmpp_2s_a,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_a,
    sample_heun,
)
from ldm.diffusion.prediction import from_vp
from ldm.diffusion.sampling_loop import StopSampling as StopSampling
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sigma_grid import sigma_grid
from ldm.errors import ConfigError, suggest


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler with the grid and the start that users know it by: those of diffusers.

    Attributes:
        sample: the function.
        needs_noise: draws noise whatever its options (DDIM does only when eta is above 0).
        options: keyword arguments of its own.
        calls: of the network in a step (a step to sigma 0 takes one; `plms` takes two in its
            first).
        final: where the last step goes: sigma 0, or as the schedule's `set_alpha_to_one` says.
        whole_timesteps: visits whole timesteps only.
        spare_timestep: divides the chain into one step more and leaves out its last.
        unit_start: starts from unit variance at the VP scale for every spacing; else from
            noise * sigma for `linspace` and `trailing`.
    """

    sample: Callable[..., Tensor]
    needs_noise: bool = False
    options: tuple[str, ...] = ()
    calls: int = 1
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
        # A grid of sigmas visits the smallest one itself: what is left to go to is 0.
        of_sigmas = spacing not in TIMESTEP_SPACINGS
        to_zero = self.final == "zero" or schedule.config.set_alpha_to_one or of_sigmas
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
        if spacing in ("linspace", "trailing") and not self.unit_start:
            return noise * sigma
        return from_vp(noise, sigma)


_k_diffusion = partial(SamplerSpec, whole_timesteps=False, unit_start=False)

SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(sample_ddpm, needs_noise=True, options=("variance", "predicted_variance")),
    "ddim": SamplerSpec(sample_ddim, options=("eta",), final="schedule"),
    "plms": SamplerSpec(sample_plms, final="schedule"),
    "euler": _k_diffusion(sample_euler),
    "euler_a": _k_diffusion(sample_euler_a, needs_noise=True),
    "heun": _k_diffusion(sample_heun, calls=2),
    "lms": _k_diffusion(sample_lms),
    "dpm2": _k_diffusion(sample_dpm2, calls=2),
    "dpmpp_2s_a": _k_diffusion(sample_dpmpp_2s_a, needs_noise=True, calls=2),
    "dpmpp_sde": _k_diffusion(sample_dpmpp_sde, needs_noise=True, calls=2),
    "dpmpp_2m": SamplerSpec(sample_dpmpp_2m, spare_timestep=True),
    "dpmpp_2m_sde": SamplerSpec(sample_dpmpp_2m_sde, needs_noise=True, spare_timestep=True),
    "unipc": SamplerSpec(sample_unipc, spare_timestep=True),
}


def get_sampler(name: str) -> SamplerSpec:
    """The sampler of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampling: there is no sampler '{name}'; {suggest(name, SAMPLERS)}")
    return SAMPLERS[name]
