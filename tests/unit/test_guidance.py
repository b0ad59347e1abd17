import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.prediction import to_x0
from ldm.diffusion.schedule import NoiseSchedule, per_sample

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


class Network:
    """Nonlinear in x, t and context; counts the samples of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context):
        self.calls.append(len(x))
        shift = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return torch.tanh(x + shift) * (1 + t.reshape(-1, 1, 1, 1) / 1000) + 0.3 * shift


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    x = 4 * torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64)
    context, negative = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.5, 3.0, 14.0]), context, negative


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_equals_diffusers_on_the_network_output(inputs, prediction, rescale):
    x, sigma, context, negative = inputs
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    network = Network()
    mine = guided(Denoiser(network, schedule), context, negative, 7.5, rescale=rescale)(x, sigma)
    assert network.calls == [6]  # both halves in one call

    alpha = (1 + per_sample(sigma, x) ** 2) ** -0.5
    x_t, t = alpha * x, schedule.sigma_to_t(sigma)
    cond, uncond = network(x_t, t, context), network(x_t, t, negative)
    expected = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    expected = to_x0(expected, x_t, alpha, per_sample(sigma, x) * alpha, prediction)
    assert ((mine - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_is_the_same_combination_of_x0(inputs, prediction):
    x, sigma, context, negative = inputs
    denoiser = Denoiser(Network(), NoiseSchedule(ScheduleConfig(prediction_type=prediction)))
    cond, uncond = denoiser(x, sigma, context), denoiser(x, sigma, negative)
    mine = guided(denoiser, context, negative, 3.0)(x, sigma)
    torch.testing.assert_close(mine, uncond + 3.0 * (cond - uncond))


@pytest.mark.parametrize(("scale", "with_negative"), [(1.0, True), (7.5, False)])
def test_without_guidance_only_the_conditional_half_runs(inputs, scale, with_negative):
    x, sigma, context, negative = inputs
    network = Network()
    denoiser = Denoiser(network, NoiseSchedule(ScheduleConfig()))
    mine = guided(denoiser, context, negative if with_negative else None, scale, rescale=0.7)
    result = mine(x, sigma)
    assert network.calls == [3]
    assert torch.equal(result, denoiser(x, sigma, context))


def test_clipping_follows_guidance(inputs):
    x, sigma, context, negative = inputs
    schedule = NoiseSchedule(ScheduleConfig())
    plain = guided(Denoiser(Network(), schedule), context, negative, 7.5)(x, sigma)
    clipped = guided(Denoiser(Network(), schedule, clip_sample=True), context, negative, 7.5)
    assert plain.abs().max() > 1
    assert torch.equal(clipped(x, sigma), plain.clamp(-1, 1))
