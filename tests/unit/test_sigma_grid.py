import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.samplers import SAMPLERS, get_sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sigma_grid import sigma_grid
from ldm.errors import ConfigError

STEPS = [1, 2, 3, 7, 20, 27, 30, 48, 50, 333, 999, 1000]
SPACINGS = ["leading", "trailing", "linspace"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(ScheduleConfig(steps_offset=1))


def timesteps(schedule, grid):
    return schedule.sigma_to_t(grid[:-1]).numpy()


# Without the two grids in which diffusers starts at timestep 0 (numpy's linspace of one) and at
# timestep 1000 (the offset): `test_one_step_starts_from_noise` and `test_whole_chain` have ours.
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        (spacing, steps)
        for spacing in SPACINGS
        for steps in STEPS
        if (spacing, steps) not in (("linspace", 1), ("leading", 1000))
    ],
)
@pytest.mark.parametrize("name", ["euler", "heun", "euler_a", "lms"])
def test_sigmas_of_the_k_diffusion_family(schedule, name, spacing, steps):
    reference = {
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "lms": diffusers.LMSDiscreteScheduler,
    }[name](**BETAS, timestep_spacing=spacing, steps_offset=1)
    reference.set_timesteps(steps)
    expected = reference.sigmas.double()
    if name == "heun":  # every sigma but the first and the last appears twice
        expected = torch.cat([expected[:1], expected[1:-1:2], expected[-1:]])
    grid = get_sampler(name).grid(schedule, steps, spacing)
    torch.testing.assert_close(grid, expected, rtol=5e-5, atol=0)  # float32's 1 - abar


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "dpmpp_2m", "unipc"])
def test_timesteps_of_the_whole_timestep_family(schedule, name, spacing, steps):
    reference = {
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "plms": diffusers.PNDMScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[name](**BETAS, timestep_spacing=spacing, steps_offset=1)
    spec, spare = get_sampler(name), name in ("dpmpp_2m", "unipc")
    if name == "plms":
        reference.register_to_config(skip_prk_steps=True)
    if spare and steps == 1000 and spacing != "trailing":
        with pytest.raises(ConfigError, match="1000 steps are too many"):
            spec.grid(schedule, steps, spacing)
        return
    reference.set_timesteps(steps)
    expected = reference.timesteps.double().numpy()
    if name == "plms" and steps > 1:  # its second timestep twice
        expected = np.delete(expected, 1)
    if steps == 1 and spacing == "linspace" and not spare:
        expected = np.array([999.0])  # where diffusers starts at timestep 0
    if expected[0] == 1000:  # where diffusers leaves the table
        expected = expected - 1
    grid = spec.grid(schedule, steps, spacing)
    np.testing.assert_allclose(timesteps(schedule, grid), expected, rtol=0, atol=1e-6)


def test_one_step_starts_from_noise(schedule):
    assert sigma_grid(schedule, 1, "linspace").tolist() == [schedule.sigmas[-1].item(), 0]


def test_whole_chain(schedule):
    for spacing in SPACINGS:
        grid = sigma_grid(schedule, 1000, spacing)
        torch.testing.assert_close(grid[:-1], schedule.sigmas.flip(0))


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_karras(schedule, steps):
    reference = diffusers.EulerDiscreteScheduler(
        **BETAS, use_karras_sigmas=True, timestep_spacing="linspace"
    )
    reference.set_timesteps(steps)
    grid = sigma_grid(schedule, steps, "karras")
    torch.testing.assert_close(grid, reference.sigmas.double(), rtol=5e-5, atol=0)
    low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    equation_5 = [
        (high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        for i in range(steps)
    ]
    np.testing.assert_allclose(grid, [*equation_5, 0], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1500])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_grids_of_sigmas_equal_diffusers(schedule, spacing, steps):
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, **{f"use_{spacing}_sigmas": True})
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # ours are float64
    scheduler.set_timesteps(steps)
    grid = sigma_grid(schedule, steps, spacing)
    torch.testing.assert_close(grid, scheduler.sigmas.double(), rtol=2e-7, atol=0)


def test_exponential_is_even_in_log_sigma(schedule):
    grid = sigma_grid(schedule, 30, "exponential")
    ratios = grid[1:-1] / grid[:-2]
    expected = (schedule.sigmas[0] / schedule.sigmas[-1]) ** (1 / 29)
    torch.testing.assert_close(ratios, expected.expand(29), rtol=1e-12, atol=0)


def test_beta_spacing_has_the_quantiles_of_scipy(schedule):
    grid = sigma_grid(schedule, 401, "beta")[:-1]
    low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    expected = scipy.stats.beta.ppf(np.linspace(1, 0, 401), 0.6, 0.6)
    np.testing.assert_allclose((grid - low) / (high - low), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_sigmas_of_the_continuous_schedule(spacing):
    schedule = NoiseSchedule(ScheduleConfig(beta_schedule="cosine_signal_rates"))
    grid = sigma_grid(schedule, 10, spacing)
    ends = [np.tan(np.arccos(0.02)), np.tan(np.arccos(0.95)), 0]
    np.testing.assert_allclose(grid[[0, -2, -1]], ends, rtol=1e-9)


@pytest.mark.parametrize(
    ("to_one", "last"), [(True, 0.0), (False, (0.00085 / (1 - 0.00085)) ** 0.5)]
)
def test_final_sigma(to_one, last):
    schedule = NoiseSchedule(ScheduleConfig(set_alpha_to_one=to_one))
    assert get_sampler("ddim").grid(schedule, 5)[-1].item() == pytest.approx(last, rel=1e-9)
    assert get_sampler("plms").grid(schedule, 5)[-1].item() == pytest.approx(last, rel=1e-9)
    for name in SAMPLERS.keys() - {"ddim", "plms"}:
        assert get_sampler(name).grid(schedule, 5)[-1] == 0
    for spacing in ("karras", "exponential", "beta"):
        assert get_sampler("ddim").grid(schedule, 5, spacing)[-1] == 0


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.58, 0.8, 0.999, 1.0])
def test_strength_keeps_the_steps_of_diffusers(schedule, strength):
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(50)
    holder = type("Holder", (), {"scheduler": scheduler})()
    pipeline = diffusers.StableDiffusionImg2ImgPipeline
    expected, steps = pipeline.get_timesteps(holder, 50, strength, "cpu")
    grid = sigma_grid(schedule, 50, strength=strength)
    assert len(grid) == steps + 1
    np.testing.assert_allclose(timesteps(schedule, grid), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "0 steps; give at least 1"),
        ({"steps": 1001}, "1001 steps are too many for a schedule of 1000 timesteps"),
        ({"steps": 10, "strength": 0.0}, "strength is 0.0"),
        ({"steps": 10, "strength": 1.2}, "strength is 1.2"),
        ({"steps": 10, "strength": 0.05}, "leaves none"),
        ({"steps": 10, "spacing": "leadin"}, "did you mean 'leading'"),
    ],
)
def test_errors(schedule, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        sigma_grid(schedule, **arguments)
    assert "\n" not in str(error.value)
