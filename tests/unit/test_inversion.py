"""DDIM inversion against the run that it undoes, in float64."""

import math

import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inversion import invert_ddim
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError


def network(x, t, context):
    """Smooth and nonlinear in x and t, mixing neighbours."""
    t = t.reshape(-1, 1, 1, 1) / 1000
    mixed = 0.8 * x + 0.5 * x.roll(1, -1) - 0.3 * t
    return torch.tanh(mixed) * (0.6 + 0.4 * t) + 0.2 * (3 * t).sin()


def round_trip(prediction, steps, spacing, iterations):
    """Relative errors of the recovered start, and of the latents that DDIM makes of it."""
    schedule, spec = NoiseSchedule(ScheduleConfig(prediction_type=prediction)), get_sampler("ddim")
    denoiser = Denoiser(network, schedule)
    sigmas = spec.grid(schedule, steps, spacing)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    start = spec.initial_latents(noise, sigmas[0].item(), spacing)

    def denoise(x, sigma):
        return denoiser(x, sigma, x.new_zeros(0))

    end = spec.sample(denoise, start, sigmas)
    recovered = invert_ddim(denoise, end, sigmas, iterations=iterations)
    again = spec.sample(denoise, recovered, sigmas)
    pairs = ((recovered, start), (again, end))
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("steps", "iterations", "tolerance"),
    [(5, 40, 1e-3), (10, 20, 1e-3), (50, 10, 1e-3), (50, 40, 1e-9), (200, 5, 1e-3)],
)
def test_inversion_of_ddim_returns_the_start(prediction, spacing, steps, iterations, tolerance):
    assert max(round_trip(prediction, steps, spacing, iterations)) < tolerance


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_iteration_is_of_first_order(prediction):
    coarse, fine = (round_trip(prediction, steps, "leading", 1)[0] for steps in (125, 250))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("std", [0.01, 0.8, 100.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(14.0, 3.0), (1.0, 0.9), (0.5, 0.03)])
def test_an_iteration_shrinks_the_error_as_promised(std, sigma, sigma_next):
    """For data drawn from N(0, std^2), where x0 = share x with a share between 0 and 1."""
    share = std**2 / (std**2 + sigma**2)
    slope = share + sigma_next / sigma * (1 - share)  # of the step
    sigmas = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    promised = (sigma - sigma_next) / (sigma + sigma_next)
    for iterations in (1, 2, 5):
        x = invert_ddim(lambda x, _: share * x, slope * start, sigmas, iterations=iterations)
        error, before = abs(x.item() - 1), 1 - slope
        assert error <= before * promised**iterations * (1 + 1e-9) + 1e-15


def test_errors():
    x, sigmas = torch.ones(1, 1, 1, 1), torch.tensor([2.0, 1.0, 0.0])
    with pytest.raises(ConfigError, match="the last sigma is 0"):
        invert_ddim(lambda x, sigma: x, x, sigmas)
    with pytest.raises(ConfigError, match="0 iterations; give at least 1"):
        invert_ddim(lambda x, sigma: x, x, sigmas[:2], iterations=0)
