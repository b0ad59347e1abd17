"""Every sampler's whole trajectory against the diffusers scheduler of the same name, step by step.

Both run on the same smooth nonlinear network with the same noise. Every default in which the
schedulers differ from Stable Diffusion's folders or from one another is spelt out.

diffusers computes its tables in float32, which leaves errors of up to 4e-5 in the small sigmas.
`exact_tables` gives its schedulers our float64 ones, so that what is compared is the grid and the
arithmetic of the steps; tests/unit/test_schedule.py compares the tables, and
`test_diffusers_as_it_comes` runs untouched schedulers.
"""

import diffusers
import numpy as np
import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import from_vp, to_vp
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import NoiseSchedule

STEPS = [1, 2, 7, 20, 50]
TOLERANCE = 1e-5
SHAPE = (2, 3, 6, 5)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# linspace of one step: numpy starts it at timestep 0, we at the noisiest.
GRIDS = [
    (spacing, steps)
    for spacing in ("leading", "trailing", "linspace")
    for steps in STEPS
    if (spacing, steps) != ("linspace", 1)
]


def network(x, t, context=None):
    """Smooth and nonlinear in x and t, mixing neighbours; bounded, so that no run explodes."""
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
    return (
        torch.tanh(0.8 * x + 0.5 * x.roll(1, -1) - 0.3 * t) * (0.6 + 0.4 * t) + 0.2 * (3 * t).sin()
    )


def noises(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count)]


def ours(name, config, steps, spacing, *, options=None, net=network, dtype=torch.float32):
    """Latents after every step in sigma space, and the grid."""
    schedule, spec = NoiseSchedule(config), get_sampler(name)
    sigmas = spec.grid(schedule, steps, spacing)
    start, *fresh = noises(steps + 1, dtype)
    draws, trajectory = iter(fresh), []
    x = spec.initial_latents(start, sigmas[0].item(), spacing)
    denoiser = Denoiser(net, schedule)
    spec.sample(
        lambda x, sigma: denoiser(x, sigma, x.new_zeros(0)),
        x,
        sigmas,
        noise=lambda: next(draws),
        callback=lambda i, sigma, x, x0: trajectory.append(x),
        **(options or {}),
    )
    assert len(trajectory) == steps
    return trajectory, sigmas


def exact_tables(scheduler, config):
    scheduler.alphas_cumprod = NoiseSchedule(config).alphas_cumprod.clone()
    if hasattr(scheduler, "final_alpha_cumprod") and not config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def theirs(monkeypatch, scheduler, steps, net=network, dtype=torch.float32, **step_options):
    """Latents after every whole step at the scheduler's own scale."""
    start, *fresh = noises(steps + 1, dtype)
    draws = iter(fresh)
    module = type(scheduler).__module__
    if hasattr(__import__(module, fromlist=["_"]), "randn_tensor"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws))
    scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma
    trajectory = []
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
        trajectory.append(x)
    if scheduler.order == 2:  # Heun's odd entries are corrected; its last step is Euler's
        trajectory = [*trajectory[1::2], trajectory[-1]]
    return trajectory


def assert_same(mine, reference, tolerance=TOLERANCE):
    assert len(mine) == len(reference)
    for step, (a, b) in enumerate(zip(mine, reference, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < tolerance, f"step {step}: {error:.2e}"


def at_vp(trajectory, sigmas):
    return [to_vp(x, s) for x, s in zip(trajectory, sigmas[1:].tolist(), strict=True)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), GRIDS)
def test_ddpm_fixed_small(monkeypatch, spacing, steps, prediction):
    reference = diffusers.DDPMScheduler(
        **BETAS,
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    config = ScheduleConfig(prediction_type=prediction)
    mine, sigmas = ours("ddpm", config, steps, spacing)
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps))


# steps_offset=0, so that the last timestep is 0: elsewhere diffusers adds noise in the very last
# step, where Ho et al. 2020 (algorithm 2) and we do not. For the same reason no trailing spacing.
@pytest.mark.parametrize(("spacing", "steps"), [g for g in GRIDS if g[0] != "trailing"])
def test_ddpm_fixed_large(monkeypatch, spacing, steps):
    reference = diffusers.DDPMScheduler(
        **BETAS,
        variance_type="fixed_large",
        clip_sample=False,
        prediction_type="epsilon",
        timestep_spacing=spacing,
        steps_offset=0,
    )
    config = ScheduleConfig(steps_offset=0)
    mine, sigmas = ours("ddpm", config, steps, spacing, options={"variance": "fixed_large"})
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps))


# diffusers' DDIM steps to t - T // steps whatever timestep it visits next. Where that is not the
# next one (linspace; trailing in 7 steps) it skips or repeats noise levels, and we do not.
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(
    ("spacing", "steps"), [g for g in GRIDS if g[0] != "linspace" and g != ("trailing", 7)]
)
def test_ddim(monkeypatch, spacing, steps, to_one, eta, prediction):
    reference = diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=to_one,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    config = ScheduleConfig(prediction_type=prediction, set_alpha_to_one=to_one)
    mine, sigmas = ours("ddim", config, steps, spacing, options={"eta": eta})
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps, eta=eta))


def test_ddim_clipped(monkeypatch):
    """Clipping x0, with epsilon derived from the clipped x0 (not diffusers' default)."""
    reference = diffusers.DDIMScheduler(**BETAS, clip_sample=True, steps_offset=1)
    config = ScheduleConfig(clip_sample=True, set_alpha_to_one=True)
    mine, sigmas = ours("ddim", config, 20, "leading", options={"eta": 0.5})
    exact_tables(reference, config)
    expected = theirs(monkeypatch, reference, 20, eta=0.5, use_clipped_model_output=True)
    assert_same(at_vp(mine, sigmas), expected)


K_DIFFUSION = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,  # cannot predict x0 in diffusers
    "heun": diffusers.HeunDiscreteScheduler,
}


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in K_DIFFUSION
        for prediction in ("epsilon", "v_prediction", "sample")
        if (name, prediction) != ("euler_a", "sample")
    ],
)
@pytest.mark.parametrize(("spacing", "steps"), GRIDS)
def test_k_diffusion_family(monkeypatch, name, spacing, steps, prediction):
    reference = K_DIFFUSION[name](
        **BETAS, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    config = ScheduleConfig(prediction_type=prediction)
    # Heun divides by the small sigmas, which float32 latents of size sigma_max do not bear.
    dtype = torch.float64 if name == "heun" else torch.float32
    exact_tables(reference, config)
    mine, _ = ours(name, config, steps, spacing, dtype=dtype)
    assert_same(mine, theirs(monkeypatch, reference, steps, dtype=dtype))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [*GRIDS, ("linspace", 1)])
def test_dpmpp_2m(monkeypatch, spacing, steps, prediction):
    reference = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    config = ScheduleConfig(prediction_type=prediction)
    mine, sigmas = ours("dpmpp_2m", config, steps, spacing)
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps))


# diffusers starts these at noise * sigma_max, as its linspace does; we always start karras at unit
# variance, so the first latents are put on the same scale here.
@pytest.mark.parametrize("steps", [2, 7, 20, 50])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("euler", diffusers.EulerDiscreteScheduler), ("heun", diffusers.HeunDiscreteScheduler)],
)
def test_karras(monkeypatch, name, scheduler, steps):
    reference = scheduler(**BETAS, use_karras_sigmas=True, timestep_spacing="linspace")
    unit_start = property(lambda self: (self.sigmas.max() ** 2 + 1) ** 0.5)
    monkeypatch.setattr(scheduler, "init_noise_sigma", unit_start)
    dtype = torch.float64 if name == "heun" else torch.float32
    exact_tables(reference, ScheduleConfig())
    mine, _ = ours(name, ScheduleConfig(), steps, "karras", dtype=dtype)
    assert_same(mine, theirs(monkeypatch, reference, steps, dtype=dtype))


# diffusers' DPM-Solver shows the network karras timesteps rounded to whole ones, and we the exact
# ones; the network here rounds for itself. (One step would go straight to sigma 0.)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_dpmpp_2m_karras(monkeypatch, steps):
    def rounding(x, t, context=None):
        return network(x, torch.as_tensor(t, dtype=torch.float32).round())

    reference = diffusers.DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, lower_order_final=True, final_sigmas_type="zero"
    )
    config = ScheduleConfig()
    mine, sigmas = ours("dpmpp_2m", config, steps, "karras", net=rounding)
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps, net=rounding))


# x + d (sigma_next - sigma) from sigma 4096 cancels the more of float32's digits the nearer
# sigma_next is to 0: hence the tolerance, and not fewer steps.
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", diffusers.EulerDiscreteScheduler),
        ("euler_a", diffusers.EulerAncestralDiscreteScheduler),
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_zero_terminal_snr(monkeypatch, name, scheduler, steps):
    """From sigma 4096; the recipe of Lin et al. 2024: v-prediction and trailing."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    reference = scheduler(**BETAS, **options, timestep_spacing="trailing")
    config = ScheduleConfig(**options)
    exact_tables(reference, config)
    mine, sigmas = ours(name, config, steps, "trailing")
    mine = at_vp(mine, sigmas)
    expected = theirs(monkeypatch, reference, steps)
    if name != "dpmpp_2m":
        expected = at_vp(expected, sigmas)
    assert_same(mine, expected, tolerance=5e-5)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_other_schedules(monkeypatch, name, beta_schedule):
    betas = {"beta_schedule": beta_schedule, "beta_start": 0.0001, "beta_end": 0.02}
    scheduler = {
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }[name]
    options = {"prediction_type": "v_prediction", "steps_offset": 0}
    reference = scheduler(**betas, **options, timestep_spacing="leading")
    config = ScheduleConfig(**betas, **options)
    exact_tables(reference, config)
    mine, sigmas = ours(name, config, 20, "leading")
    expected = theirs(monkeypatch, reference, 20)
    assert_same(at_vp(mine, sigmas) if name == "dpmpp_2m" else mine, expected)


def test_trained_betas(monkeypatch):
    betas = np.linspace(0.02, 0.3, 40)
    reference = diffusers.DDIMScheduler(
        num_train_timesteps=40, trained_betas=betas, clip_sample=False, set_alpha_to_one=True
    )
    config = ScheduleConfig(
        num_train_timesteps=40,
        trained_betas=tuple(betas.tolist()),
        steps_offset=0,
        set_alpha_to_one=True,
    )
    mine, sigmas = ours("ddim", config, 10, "leading")
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, 10))


@pytest.mark.parametrize("strength", [0.3, 0.58, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_image_to_image(monkeypatch, name, strength):
    """diffusers' img2img: noise the image to the first kept step, then run what is left."""
    scheduler = {
        "ddim": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        "euler": diffusers.EulerDiscreteScheduler(**BETAS),
        "heun": diffusers.HeunDiscreteScheduler(**BETAS),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**BETAS),
    }[name]
    scheduler.register_to_config(timestep_spacing="leading", steps_offset=1)
    steps, (image, noise) = 50, noises(2)

    pipeline = diffusers.StableDiffusionImg2ImgPipeline
    holder = type("Holder", (), {"scheduler": scheduler})()
    scheduler.set_timesteps(steps)
    timesteps, _ = pipeline.get_timesteps(holder, steps, strength, "cpu")
    x = scheduler.add_noise(image, noise, timesteps[:1].repeat(len(image)))
    for t in timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0]

    schedule, spec = NoiseSchedule(ScheduleConfig()), get_sampler(name)
    sigmas = spec.grid(schedule, steps, "leading", strength=strength)
    denoiser = Denoiser(network, schedule)
    mine = spec.sample(
        lambda x, sigma: denoiser(x, sigma, x), image + sigmas[0].item() * noise, sigmas
    )
    assert_same([to_vp(mine, sigmas[-1].item())], [x])


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *[(name, "leading") for name in ("ddpm", "ddim", "euler", "euler_a", "heun", "dpmpp_2m")],
        *[(name, "linspace") for name in ("ddpm", "euler", "euler_a", "heun", "dpmpp_2m")],
    ],
)
def test_diffusers_as_it_comes(monkeypatch, name, spacing):
    """Stable Diffusion 1.5's own scheduler_config.json through each class, float32 and all."""
    reference = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }[name].from_config(
        {
            **BETAS,
            "num_train_timesteps": 1000,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "skip_prk_steps": True,
            "trained_betas": None,
            "timestep_spacing": spacing,
        }
    )
    mine, sigmas = ours(name, ScheduleConfig(), 20, spacing)
    expected = theirs(monkeypatch, reference, 20)
    assert_same(at_vp(mine, sigmas) if name in ("ddpm", "ddim", "dpmpp_2m") else mine, expected)


def test_from_vp_undoes_to_vp():
    x = noises(1)[0]
    torch.testing.assert_close(from_vp(to_vp(x, 3.7), 3.7), x)
