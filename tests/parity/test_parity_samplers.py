"""Every sampler's whole trajectory against the diffusers scheduler of the same name, step by step.

Both run on the same smooth nonlinear network with the same noise. Every default in which the
schedulers differ from Stable Diffusion's folders or from one another is spelt out.

diffusers computes its tables in float32, which leaves errors of up to 4e-5 in the small sigmas.
`exact_tables` gives its schedulers our float64 ones, so that what is compared is the grid and the
arithmetic of the steps; tests/unit/test_schedule.py compares the tables, and
`test_diffusers_as_it_comes` runs untouched schedulers.
"""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser, LearnedVariance
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
    start, *fresh = noises(2 * steps + 1, dtype)
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
    if scheduler.order == 2:  # odd entries are whole steps, and so is the last, which is Euler's
        trajectory = [*trajectory[1::2], trajectory[-1]]
    elif len(trajectory) > steps:  # PNDM takes its first step twice, the second time to keep
        trajectory = trajectory[1:]
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [g for g in GRIDS if g[0] != "trailing"])
def test_ddpm_learned_range(monkeypatch, spacing, steps, prediction):
    def predicts_variance(x, t, context=None):
        return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)

    options = {"prediction_type": prediction, "steps_offset": 0, "variance_type": "learned_range"}
    reference = diffusers.DDPMScheduler(
        **BETAS, **options, clip_sample=False, timestep_spacing=spacing
    )
    config = ScheduleConfig(**options)
    learned = LearnedVariance(predicts_variance)
    own = {"variance": "learned_range", "predicted_variance": learned.predicted_variance}
    mine, sigmas = ours("ddpm", config, steps, spacing, options=own, net=learned)
    exact_tables(reference, config)
    expected = theirs(monkeypatch, reference, steps, net=predicts_variance)
    assert_same(at_vp(mine, sigmas), expected)


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


# diffusers extends the network's output itself, so for a v-model v: a mix of noise levels. CompVis
# extends epsilon, and so do we; the reference gets the epsilon that v means. No prk steps, as in
# Stable Diffusion's folders. Spacings as for DDIM.
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(
    ("spacing", "steps"), [g for g in GRIDS if g[0] != "linspace" and g != ("trailing", 7)]
)
def test_plms(monkeypatch, spacing, steps, to_one, prediction):
    reference = diffusers.PNDMScheduler(
        **BETAS,
        skip_prk_steps=True,
        set_alpha_to_one=to_one,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    config = ScheduleConfig(prediction_type=prediction, set_alpha_to_one=to_one)
    exact_tables(reference, config)

    def epsilon(x, t):
        abar = reference.alphas_cumprod[t]
        return abar.sqrt() * network(x, t) + (1 - abar).sqrt() * x

    net = epsilon if prediction == "v_prediction" else network
    mine, sigmas = ours("plms", config, steps, spacing)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps, net=net))


K_DIFFUSION = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,  # cannot predict x0 in diffusers
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm2": diffusers.KDPM2DiscreteScheduler,  # likewise
}


@cache
def made(scheduler):
    return scheduler(**BETAS)  # a quarter of a second for some


def k_diffusion(scheduler, **options):
    """A scheduler as if made with these options, none of which its tables depend on."""
    defaults = {"prediction_type": "epsilon", "steps_offset": 0}
    for spacing in ("karras", "exponential", "beta"):
        defaults[f"use_{spacing}_sigmas"] = False
    made(scheduler).register_to_config(**defaults | options)
    return made(scheduler)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in K_DIFFUSION
        for prediction in ("epsilon", "v_prediction", "sample")
        if (name, prediction) not in (("euler_a", "sample"), ("dpm2", "sample"))
    ],
)
@pytest.mark.parametrize(("spacing", "steps"), GRIDS)
def test_k_diffusion_family(monkeypatch, name, spacing, steps, prediction):
    reference = k_diffusion(
        K_DIFFUSION[name], prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    config = ScheduleConfig(prediction_type=prediction)
    # Heun divides by the small sigmas, which float32 latents of size sigma_max do not bear.
    dtype = torch.float64 if name == "heun" else torch.float32
    exact_tables(reference, config)
    mine, _ = ours(name, config, steps, spacing, dtype=dtype)
    assert_same(mine, theirs(monkeypatch, reference, steps, dtype=dtype))


@pytest.fixture
def sde_scheduler(monkeypatch):
    """diffusers' DPMSolverSDEScheduler, fed with our noise instead of a tree of torchsde's.

    The tree is a Brownian motion in sigma. A step asks it for its first half, then for the whole.
    """
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = import_module("diffusers.schedulers.scheduling_dpmsolver_sde")

    class Tree:
        def __init__(self, x, sigma_min, sigma_max, seed):
            self.draws, self.halves = iter(noises(101, x.dtype)[1:]), []

        def __call__(self, sigma, sigma_next):
            if not self.halves:
                self.halves = [next(self.draws), next(self.draws)]
                self.middle = sigma_next
                return self.halves[0]
            first, second = self.halves
            self.halves = []
            way = (sigma - self.middle).sqrt() * first + (self.middle - sigma_next).sqrt() * second
            return way / (sigma - sigma_next).sqrt()

    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Tree)
    return module.DPMSolverSDEScheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("spacing", "steps"), GRIDS)
def test_dpmpp_sde(monkeypatch, sde_scheduler, spacing, steps, prediction):
    reference = k_diffusion(
        sde_scheduler, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    config = ScheduleConfig(prediction_type=prediction)
    exact_tables(reference, config)
    mine, _ = ours("dpmpp_sde", config, steps, spacing)
    assert_same(mine, theirs(monkeypatch, reference, steps))


DPM_SOLVERS = {
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    ),
    "dpmpp_2m_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint"},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_type": "bh2", "predict_x0": True}),
}


def dpm_solver(name, **options):
    scheduler, own = DPM_SOLVERS[name]
    return scheduler(
        **BETAS,
        **own,
        solver_order=2,
        lower_order_final=True,
        final_sigmas_type="zero",
        steps_offset=1,
        **options,
    )


@pytest.mark.parametrize("name", DPM_SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [*GRIDS, ("linspace", 1)])
def test_dpm_solvers(monkeypatch, name, spacing, steps, prediction):
    reference = dpm_solver(name, prediction_type=prediction, timestep_spacing=spacing)
    config = ScheduleConfig(prediction_type=prediction)
    mine, sigmas = ours(name, config, steps, spacing)
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps))


# diffusers starts its k-diffusion schedulers at noise * sigma_max there, as its linspace does; we
# always start at unit variance, so the first latents are put on that scale here. Some of its
# schedulers round or truncate the timesteps of these sigmas, where we show the network the exact
# ones: their network here looks at none. (For karras on DPM-Solvers it rounds for itself, below.)
@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpm2", "dpmpp_sde", *DPM_SOLVERS])
def test_grids_of_sigmas(monkeypatch, sde_scheduler, name, spacing, steps):
    def timeless(x, t, context=None):
        return network(x, 500)

    option = {f"use_{spacing}_sigmas": True}
    config, dtype = ScheduleConfig(), torch.float32
    if name in DPM_SOLVERS:
        reference = dpm_solver(name, **option)
    else:
        scheduler = {**K_DIFFUSION, "dpmpp_sde": sde_scheduler}[name]
        reference = k_diffusion(scheduler, **option, timestep_spacing="linspace")
        unit_start = property(lambda self: (self.sigmas.max() ** 2 + 1) ** 0.5)
        monkeypatch.setattr(scheduler, "init_noise_sigma", unit_start)
        dtype = torch.float64
    net = network if name in ("euler", "heun", "lms") else timeless
    exact_tables(reference, config)
    mine, sigmas = ours(name, config, steps, spacing, dtype=dtype, net=net)
    mine = at_vp(mine, sigmas) if name in DPM_SOLVERS else mine
    assert_same(mine, theirs(monkeypatch, reference, steps, dtype=dtype, net=net))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("name", DPM_SOLVERS)
def test_karras_of_dpm_solvers(monkeypatch, name, steps):
    def rounding(x, t, context=None):
        return network(x, torch.as_tensor(t, dtype=torch.float32).round())

    reference = dpm_solver(name, use_karras_sigmas=True)
    config = ScheduleConfig()
    mine, sigmas = ours(name, config, steps, "karras", net=rounding)
    exact_tables(reference, config)
    assert_same(at_vp(mine, sigmas), theirs(monkeypatch, reference, steps, net=rounding))


# x + d (sigma_next - sigma) from sigma 4096 cancels the more of float32's digits the nearer
# sigma_next is to 0: hence the tolerance, and not fewer steps. diffusers' other schedulers cannot.
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("name", ["euler", "euler_a", *DPM_SOLVERS])
def test_zero_terminal_snr(monkeypatch, name, steps):
    """From sigma 4096; the recipe of Lin et al. 2024: v-prediction and trailing."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    if name in DPM_SOLVERS:
        reference = dpm_solver(name, **options, timestep_spacing="trailing")
    else:
        reference = K_DIFFUSION[name](**BETAS, **options, timestep_spacing="trailing")
    config = ScheduleConfig(**options)
    exact_tables(reference, config)
    mine, sigmas = ours(name, config, steps, "trailing")
    mine = at_vp(mine, sigmas)
    expected = theirs(monkeypatch, reference, steps)
    if name not in DPM_SOLVERS:
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
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "unipc"])
def test_image_to_image(monkeypatch, name, strength):
    """diffusers' img2img: noise the image to the first kept step, then run what is left."""
    scheduler = {
        "ddim": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        "euler": diffusers.EulerDiscreteScheduler(**BETAS),
        "heun": diffusers.HeunDiscreteScheduler(**BETAS),
        "dpm2": diffusers.KDPM2DiscreteScheduler(**BETAS),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**BETAS),
        "unipc": diffusers.UniPCMultistepScheduler(**BETAS),
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


AS_THEY_COME = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "plms": diffusers.PNDMScheduler,
    **K_DIFFUSION,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *[(name, "leading") for name in AS_THEY_COME],
        *[(name, "linspace") for name in AS_THEY_COME if name not in ("ddim", "plms")],
    ],
)
def test_diffusers_as_it_comes(monkeypatch, name, spacing):
    """Stable Diffusion 1.5's own scheduler_config.json through each class, float32 and all."""
    reference = AS_THEY_COME[name].from_config(
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
    assert_same(mine if name in K_DIFFUSION else at_vp(mine, sigmas), expected)


def test_from_vp_undoes_to_vp():
    x = noises(1)[0]
    torch.testing.assert_close(from_vp(to_vp(x, 3.7), 3.7), x)
