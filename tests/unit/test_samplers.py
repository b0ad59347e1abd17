"""Samplers against closed forms; tests/parity/test_parity_samplers.py has the diffusers side."""

import math

import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.samplers import SAMPLERS, StopSampling, get_sampler, sample_ddim, sample_ddpm
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError

MEAN, STD = 0.3, 0.8


def denoise(x, sigma):
    """The exact D(x; sigma) of data drawn from N(MEAN, STD^2)."""
    sigma = sigma.to(x).reshape(-1, 1, 1, 1)
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def nonlinear(x, sigma):
    """The exact denoiser of data that is +1 or -1 with equal chance."""
    return torch.tanh(x / sigma.to(x).reshape(-1, 1, 1, 1) ** 2)


def noise_source(shape=(2, 1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_order_of_convergence(name, order):
    """On the probability flow ODE, whose solution for Gaussian data is a rescaling."""
    high, low = 10.0, 0.05
    x = high * noise_source()()
    exact = MEAN + (x - MEAN) * math.sqrt((STD**2 + low**2) / (STD**2 + high**2))
    errors = []
    for steps in (64, 128, 256):
        sigmas = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
        errors.append((SAMPLERS[name].sample(denoise, x, sigmas) - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_reproduces_the_data(variance):
    """Ancestral sampling of the full chain with the exact denoiser draws N(MEAN, STD^2)."""
    schedule = NoiseSchedule(ScheduleConfig())
    spec, noise = get_sampler("ddpm"), noise_source((20_000, 1, 1, 1))
    sigmas = spec.grid(schedule, 200, "trailing")
    x = spec.initial_latents(noise(), sigmas[0].item(), "trailing")
    x = spec.sample(denoise, x, sigmas, noise=noise, variance=variance)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


def test_ddim_with_eta_1_is_ddpm_on_the_full_chain():
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=60, set_alpha_to_one=True))
    sigmas = get_sampler("ddim").grid(schedule, 60)
    assert torch.equal(sigmas, get_sampler("ddpm").grid(schedule, 60))
    x = sigmas[0] * noise_source(seed=1)()
    ddim, ddpm = [], []
    for sample, options, trajectory in (
        (sample_ddim, {"eta": 1.0}, ddim),
        (sample_ddpm, {"variance": "fixed_small"}, ddpm),
    ):
        record = trajectory.append
        sample(
            nonlinear,
            x,
            sigmas,
            noise=noise_source(),
            callback=lambda i, s, x, x0, record=record: record(x),
            **options,
        )
    torch.testing.assert_close(torch.stack(ddim), torch.stack(ddpm), rtol=1e-10, atol=1e-12)


def test_ddpm_variances_are_those_of_the_paper():
    """beta_t, and beta_t (1 - abar_{t-1}) / (1 - abar_t), at the VP scale of x_{t-1}."""
    schedule = NoiseSchedule(ScheduleConfig())
    t, beta, abar = 500, schedule.betas, schedule.alphas_cumprod
    sigmas = schedule.sigmas[[t, t - 1]]
    zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    expected = {
        "fixed_large": beta[t],
        "fixed_small": beta[t] * (1 - abar[t - 1]) / (1 - abar[t]),
    }
    for variance, value in expected.items():
        mean = sample_ddpm(denoise, zero, sigmas, noise=lambda: zero, variance=variance)
        x = sample_ddpm(denoise, zero, sigmas, noise=lambda: one, variance=variance)
        std = ((x - mean) * abar[t - 1].sqrt()).item()
        assert std**2 == pytest.approx(value.item(), rel=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_replaces_and_stops(name):
    sigmas = NoiseSchedule(ScheduleConfig()).sigmas[[900, 600, 300, 100, 10]]
    x = sigmas[0] * noise_source(seed=2)()
    sample, seen = SAMPLERS[name].sample, []

    def watch(i, sigma, x, x0):
        seen.append((i, sigma, x, x0))

    def stop(i, sigma, x, x0):
        if i == 1:
            raise StopSampling(x)

    def replace(i, sigma, x, x0):
        return torch.zeros_like(x) if i == 2 else None

    whole = sample(nonlinear, x, sigmas, noise=noise_source(), callback=watch)
    assert [entry[:2] for entry in seen] == list(enumerate(sigmas[1:].tolist()))
    assert torch.equal(seen[-1][2], whole)
    assert torch.equal(seen[0][3], nonlinear(x, sigmas[:1].expand(2)))

    stopped = sample(nonlinear, x, sigmas, noise=noise_source(), callback=stop)
    assert torch.equal(stopped, sample(nonlinear, x, sigmas[:3], noise=noise_source()))

    replaced = sample(nonlinear, x, sigmas, noise=noise_source(), callback=replace)
    if name == "dpmpp_2m":  # its last step also remembers the x0 of the step before
        h_last, h = (math.log(sigmas[i] / sigmas[i + 1]) for i in (2, 3))
        x0 = torch.zeros_like(x)
        D = x0 + h / (2 * h_last) * (x0 - seen[2][3])
        expected = (1 - sigmas[4] / sigmas[3]) * D
    else:
        source = noise_source()
        if SAMPLERS[name].needs_noise:
            _ = [source() for _ in range(3)]
        expected = sample(nonlinear, torch.zeros_like(x), sigmas[3:], noise=source)
    torch.testing.assert_close(replaced, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_to_zero_is_x0_and_dtype_is_kept(name):
    x = torch.linspace(-3, 3, 8).reshape(2, 1, 2, 2)
    result = SAMPLERS[name].sample(nonlinear, x, torch.tensor([2.0, 0.0]).double())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, nonlinear(x, torch.tensor([2.0])))


def test_errors():
    with pytest.raises(ConfigError, match="did you mean 'euler_a'"):
        get_sampler("euler_")
    x, sigmas = torch.ones(1, 1, 1, 1), torch.tensor([2.0, 1.0])
    with pytest.raises(ConfigError, match="eta is 1.5"):
        sample_ddim(nonlinear, x, sigmas, eta=1.5)
    with pytest.raises(ConfigError, match="stochastic"):
        sample_ddim(nonlinear, x, sigmas, eta=0.5)
    with pytest.raises(ConfigError, match="did you mean 'fixed_small'"):
        sample_ddpm(nonlinear, x, sigmas, variance="fixed_smal")  # type: ignore
