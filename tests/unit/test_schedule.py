import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as reference_rescale

from ldm.config import ScheduleConfig
from ldm.diffusion.schedule import NoiseSchedule, rescale_zero_terminal_snr
from ldm.errors import ConfigError

DISCRETE = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
CONFIGS = [
    *(ScheduleConfig(**betas) for betas in DISCRETE),
    ScheduleConfig(beta_schedule="cosine_signal_rates"),
    ScheduleConfig(rescale_betas_zero_snr=True),
]


def keras_rates(time, min_signal_rate=0.02, max_signal_rate=0.95):
    """The schedule of the Keras DDIM example, as its text defines it; time in [0, 1]."""
    start, end = np.arccos(max_signal_rate), np.arccos(min_signal_rate)
    angles = start + time * (end - start)
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("betas", DISCRETE)
@pytest.mark.parametrize("length", [1000, 50])
def test_tables_are_those_of_diffusers(betas, length):
    mine = NoiseSchedule(ScheduleConfig(**betas, num_train_timesteps=length))
    reference = diffusers.DDPMScheduler(**betas, num_train_timesteps=length)
    # rtol is float32's: theirs are single precision
    torch.testing.assert_close(mine.betas, reference.betas.double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        mine.alphas_cumprod, reference.alphas_cumprod.double(), rtol=5e-6, atol=1e-9
    )
    assert mine.sigmas.dtype == torch.float64


def test_sigmas_closed_form():
    mine = NoiseSchedule(ScheduleConfig(beta_schedule="linear", beta_start=0.1, beta_end=0.1))
    abar = 0.9 ** np.arange(1, 1001)
    np.testing.assert_allclose(mine.alphas_cumprod.numpy(), abar, rtol=1e-12)
    np.testing.assert_allclose(mine.sigmas.numpy(), np.sqrt(1 / abar - 1), rtol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.beta_schedule)
def test_timestep_to_sigma_and_back(config):
    schedule = NoiseSchedule(config)
    t = torch.cat([torch.arange(1000.0), torch.rand(500) * 999]).double()
    torch.testing.assert_close(schedule.sigma_to_t(schedule.t_to_sigma(t)), t, rtol=0, atol=1e-7)
    whole = torch.arange(1000)
    torch.testing.assert_close(schedule.t_to_sigma(whole), schedule.sigmas, rtol=1e-9, atol=0)
    ends = torch.tensor([0.0, 1e-9, 1e9])
    assert schedule.sigma_to_t(ends).tolist() == [0, 0, 999]


@pytest.mark.parametrize("betas", DISCRETE)
def test_sigma_to_t_is_that_of_diffusers(betas):
    schedule = NoiseSchedule(ScheduleConfig(**betas))
    sigmas = np.geomspace(schedule.sigmas[0], schedule.sigmas[-1], 97)
    log_sigmas = schedule.sigmas.log().numpy()
    reference = diffusers.EulerDiscreteScheduler(**betas)
    expected = [float(reference._sigma_to_t(sigma, log_sigmas)) for sigma in sigmas]
    mine = schedule.sigma_to_t(torch.from_numpy(sigmas))
    np.testing.assert_allclose(mine.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rates", [(0.02, 0.95), (0.1, 0.8)])
def test_cosine_signal_rates_is_that_of_keras(rates):
    low, high = rates
    config = ScheduleConfig(
        beta_schedule="cosine_signal_rates",
        min_signal_rate=low,
        max_signal_rate=high,
        num_train_timesteps=321,
    )
    schedule = NoiseSchedule(config)
    signal, noise = keras_rates(np.arange(321) / 320, low, high)
    alpha, sigma_rate = schedule.rates(torch.arange(321))
    np.testing.assert_allclose(alpha.numpy(), signal, rtol=1e-12)
    np.testing.assert_allclose(sigma_rate.numpy(), noise, rtol=1e-12)
    t = np.linspace(0, 320, 1234)  # between the timesteps, too, it is exact
    signal, noise = keras_rates(t / 320, low, high)
    np.testing.assert_allclose(schedule.t_to_sigma(torch.from_numpy(t)), noise / signal, rtol=1e-12)
    back = schedule.sigma_to_t(torch.from_numpy(noise / signal))
    np.testing.assert_allclose(back, t, rtol=0, atol=1e-9)


def test_cosine_signal_rates_survives_as_trained_betas():
    """What other tools read of it: the table of betas, and nothing of the formula."""
    config = ScheduleConfig(beta_schedule="cosine_signal_rates")
    original = NoiseSchedule(config)
    reference = diffusers.DDIMScheduler(trained_betas=original.betas.tolist())
    torch.testing.assert_close(
        reference.alphas_cumprod.double(), original.alphas_cumprod, rtol=5e-5, atol=0
    )
    table = NoiseSchedule(ScheduleConfig(trained_betas=tuple(original.betas.tolist())))
    torch.testing.assert_close(table.sigmas, original.sigmas, rtol=1e-9, atol=0)
    between = torch.tensor([0.5, 500.25])
    assert not torch.equal(table.t_to_sigma(between), original.t_to_sigma(between))
    torch.testing.assert_close(
        table.t_to_sigma(between), original.t_to_sigma(between), rtol=1e-4, atol=0
    )


def test_zero_terminal_snr():
    schedule = NoiseSchedule(ScheduleConfig(rescale_betas_zero_snr=True))
    plain = NoiseSchedule(ScheduleConfig())
    expected = reference_rescale(plain.betas.float())
    torch.testing.assert_close(schedule.betas, expected.double(), rtol=1e-3, atol=1e-6)
    in_double = reference_rescale(plain.betas.clone())
    torch.testing.assert_close(schedule.betas, in_double, rtol=1e-12, atol=0)
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    assert schedule.sigmas[-1].item() == pytest.approx(euler.sigmas[0].item(), rel=1e-7)
    assert schedule.sigmas[-1].item() == math.sqrt(2**24 - 1)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item())
    torch.testing.assert_close(rescale_zero_terminal_snr(schedule.betas), schedule.betas)


@pytest.mark.parametrize("betas", DISCRETE)
def test_add_noise_is_that_of_diffusers(betas):
    x0, noise = torch.randn(2, 4, 3, 5, 5).unbind(0)
    t = torch.tensor([0, 17, 500, 999])
    expected = diffusers.DDPMScheduler(**betas).add_noise(x0, noise, t)
    mine = NoiseSchedule(ScheduleConfig(**betas)).add_noise(x0, noise, t)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_betas": (0.1,) * 999}, "999 trained_betas for num_train_timesteps 1000"),
        (
            {"trained_betas": (0.1, 0.0), "num_train_timesteps": 2},
            "every beta must be above 0",
        ),
        (
            {"beta_schedule": "cosine_signal_rates", "rescale_betas_zero_snr": True},
            "lower min_signal_rate",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        NoiseSchedule(ScheduleConfig(**options))
