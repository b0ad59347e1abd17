"""Samplers against closed forms; tests/parity/test_parity_samplers.py has the diffusers side."""

import math
from itertools import pairwise

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


# Of the whole method on a grid even in log sigma. `plms` takes every grid to be even in sigma;
# `lms` has an order of its own test; the two look back on slower starts.
ORDERS = {
    "ddpm": 1, "ddim": 1, "euler": 1, "euler_a": 1,
    "plms": 2, "heun": 2, "dpm2": 2, "dpmpp_2s_a": 2, "dpmpp_sde": 2, "dpmpp_2m": 2,
    "dpmpp_2m_sde": 2, "unipc": 3,
}  # fmt: skip


def spread(name, sigmas, start):
    """The standard deviation of what a sampler makes of N(MEAN, start^2), exactly.

    With this denoiser the result is affine in the start and in every noise drawn: each sample of
    the batch gets one of them as its unit, and their shares add up in squares.
    """
    count = 2 * len(sigmas)
    units = iter(torch.eye(count, dtype=torch.float64).reshape(count, count, 1, 1, 1))
    x = MEAN + start * next(units)
    result = SAMPLERS[name].sample(denoise, x, sigmas, noise=lambda: next(units))
    return (result - MEAN).square().sum().sqrt().item()


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence(name, order):
    """For Gaussian data; what a sampler with noise converges to is the same law."""
    high, low = 10.0, 0.05
    errors = []
    for steps in (64, 128, 256):
        sigmas = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
        result = spread(name, sigmas, math.hypot(STD, high))
        errors.append(abs(result - math.hypot(STD, low)))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_zero_terminal_snr(name):
    """From sigma 4096 with a leap to the next one: the data's own law in 50 steps."""
    schedule = NoiseSchedule(ScheduleConfig(rescale_betas_zero_snr=True, set_alpha_to_one=True))
    sigmas = get_sampler(name).grid(schedule, 50, "trailing")
    error = abs(spread(name, sigmas, math.hypot(1, sigmas[0].item())) - STD)
    assert error < (0.06 if ORDERS.get(name) == 1 else 0.016)


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [("lms", [9.0, 7.5, 4.0, 3.5, 2.0, 0.4, 0.0]), ("plms", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])],
)
def test_cubic_slopes_are_integrated_exactly(name, sigmas):
    """Fourth order from the fourth step on: `lms` on any grid, `plms` on an even one."""

    def integral(sigma):
        return sigma**4 / 4 - 2 * sigma**3 + sigma**2 / 2 - 3 * sigma

    def cubic(x, sigma):  # x - sigma dx/dsigma
        sigma = sigma.to(x).reshape(-1, 1, 1, 1)
        return x - sigma * (sigma**3 - 6 * sigma**2 + sigma - 3)

    xs = []
    grid = torch.tensor(sigmas, dtype=torch.float64)
    SAMPLERS[name].sample(
        cubic, noise_source()(), grid, callback=lambda i, sigma, x, x0: xs.append(x)
    )
    for i in range(3, len(sigmas) - 1):
        expected = xs[i - 1] + integral(sigmas[i + 1]) - integral(sigmas[i])
        torch.testing.assert_close(xs[i], expected, rtol=1e-12, atol=1e-12)


def test_dpmpp_2s_a_is_that_of_k_diffusion():
    """The numbers are those of k-diffusion 0.1.1, `sample_dpmpp_2s_ancestral`, on these inputs."""
    sigmas = torch.tensor([14.0, 6.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    x = torch.tensor([-20.0, -3.0, 5.0, 16.0]).double().reshape(4, 1, 1, 1)
    unit = torch.tensor([0.5, -1.0, 1.5, -0.25]).double().reshape(4, 1, 1, 1)
    noises, mine = iter([unit, -unit, unit / 2, -unit / 2]), []
    SAMPLERS["dpmpp_2s_a"].sample(
        nonlinear,
        x,
        sigmas,
        noise=lambda: next(noises),
        callback=lambda i, s, x, x0: mine.append(x),
    )
    expected = [
        [-1.1549629736, -6.0014080154, 9.0988013344, 1.7381686405],
        [-1.1611329799, 0.7889456803, -1.227451343, 0.7993859306],
        [-0.7109031002, 0.3620311406, -0.4081330409, 0.6143085138],
        [-1.0188436462, 1.0364673933, -1.0621518314, 1.0045005367],
        [-1.0, 1.0, -1.0, 1.0],
    ]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(5, 4, 1, 1, 1)
    torch.testing.assert_close(torch.stack(mine), expected, rtol=0, atol=1e-9)


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

    whole = sample(nonlinear, x, sigmas, noise=noise_source(), callback=watch)
    assert [entry[:2] for entry in seen] == list(enumerate(sigmas[1:].tolist()))
    assert torch.equal(seen[-1][2], whole)
    assert torch.equal(seen[0][3], nonlinear(x, sigmas[:1].expand(2)))

    stopped = sample(nonlinear, x, sigmas, noise=noise_source(), callback=stop)
    assert torch.equal(stopped, sample(nonlinear, x, sigmas[:3], noise=noise_source()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_replaces(name):
    """The second and last step starts from zeros, but remembers the first as its method does."""
    sigmas = NoiseSchedule(ScheduleConfig()).sigmas[[900, 600, 300]]
    s0, s1, s2 = sigmas.tolist()
    x = s0 * noise_source(seed=2)()
    zeros, seen, drawn, source = torch.zeros_like(x), [], [], noise_source()

    def replace(i, sigma, x, x0):
        seen.append(x0)
        return zeros if i == 0 else None

    def noise():
        drawn.append(source())
        return drawn[-1]

    result = SAMPLERS[name].sample(nonlinear, x, sigmas, noise=noise, callback=replace)
    x0, d, d_last = seen[1], -seen[1] / s1, (x - seen[0]) / s0
    h, h_last = math.log(s1 / s2), math.log(s0 / s1)
    D = x0 + h / h_last / 2 * (x0 - seen[0])
    match name:
        case "plms":
            expected = (3 * d - d_last) / 2 * (s2 - s1)
        case "lms":  # the slope at the middle, on the line through the last two
            expected = (d + (s2 - s1) / 2 * (d - d_last) / (s1 - s0)) * (s2 - s1)
        case "dpmpp_2m":
            expected = (1 - s2 / s1) * D
        case "dpmpp_2m_sde":
            ratio = (s2 / s1) ** 2
            expected = (1 - ratio) * D + s2 * math.sqrt(1 - ratio) * drawn[1]
        case "unipc":  # what is corrected is the step before
            corrected = (1 - s1 / s0) / 2 * (x0 - seen[0])
            expected = s2 / s1 * corrected + (1 - s2 / s1) * D
        case _:  # these remember nothing
            draws = iter(drawn[len(drawn) // 2 :])
            sample = SAMPLERS[name].sample
            expected = sample(nonlinear, zeros, sigmas[1:], noise=lambda: next(draws))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_of_the_network_and_draws(name):
    """`calls` a step and 1 for the step to sigma 0; noise only where `needs_noise` says so."""
    called, drawn, source = [], [], noise_source()

    def counting(x, sigma):
        called.append(sigma)
        return nonlinear(x, sigma)

    def noise():
        drawn.append(1)
        return source()

    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]).double()
    SAMPLERS[name].sample(counting, 8 * source(), sigmas, noise=noise)
    assert len(called) == 3 * SAMPLERS[name].calls + 1 + (name == "plms")
    assert all(s.shape == (2,) and s.dtype == torch.float64 for s in called)
    assert bool(drawn) == SAMPLERS[name].needs_noise


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
