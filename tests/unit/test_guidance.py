import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided, masked, thresholded
from ldm.diffusion.prediction import to_x0
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule, per_sample
from ldm.errors import ConfigError

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


class Network:
    """Nonlinear in x, t and context; counts the samples of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context):
        self.calls.append(len(context))
        k = len(context) // len(x)  # contexts a picture
        x, t = x.repeat(k, 1, 1, 1), t.repeat(k)
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


# The sigmas of the batch are 0.5, 3 and 14; the interval's upper end is part of it.
@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 100.0), [True, True, True]),
        ((1.0, 3.0), [False, True, False]),
        ((3.0, 14.0), [False, False, True]),
        ((0.0, 0.4), [False, False, False]),
    ],
)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_an_interval_guides_only_within_it(inputs, interval, inside, rescale):
    x, sigma, context, negative = inputs
    network = Network()
    denoiser = Denoiser(network, NoiseSchedule(ScheduleConfig()))
    plain = denoiser(x, sigma, context)
    everywhere = guided(denoiser, context, negative, 7.5, rescale=rescale)(x, sigma)
    network.calls.clear()
    mine = guided(denoiser, context, negative, 7.5, rescale=rescale, interval=interval)(x, sigma)
    assert network.calls == [6 if any(inside) else 3]  # one half of the work outside
    expected = torch.where(torch.tensor(inside).reshape(3, 1, 1, 1), everywhere, plain)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_equals_diffusers(inputs, percentile):
    x, sigma, _, _ = inputs
    x[2] /= 100  # a sample that stays within [-1, 1]
    reference = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=torch.inf
    )
    mine = thresholded(lambda x, sigma: x, percentile)(x, sigma)
    torch.testing.assert_close(mine, reference._threshold_sample(x.clone()))
    assert torch.equal(mine[2], x[2])
    # the same picture at three times the scale, with the limit there
    scaled = thresholded(lambda x, sigma: 3 * x, percentile, limit=3.0)(x, sigma)
    torch.testing.assert_close(scaled, 3 * mine)


def test_masked_mixes_x0(inputs):
    x, sigma, _, _ = inputs
    known, mask = x.flip(0), torch.rand(3, 1, 6, 6, dtype=torch.float64)
    mine = masked(lambda x, sigma: x.tanh(), mask, known)(x, sigma)
    torch.testing.assert_close(mine, mask * x.tanh() + (1 - mask) * known)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("plms", "lms")])
def test_masked_keeps_what_is_known_to_the_bit(inputs, name):
    """Where the sampler's last step gives x0; plms and lms extend the slope down to sigma 0."""
    x, _, _, _ = inputs
    known, mask = x.flip(0) / 4, torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    denoise = masked(lambda x, sigma: x.tanh(), mask, known)
    result = SAMPLERS[name].sample(denoise, x, sigmas, noise=lambda: torch.ones_like(x))
    assert torch.equal(result[..., 3:], known[..., 3:])
    alone = SAMPLERS[name].sample(
        lambda x, sigma: x.tanh(), x, sigmas, noise=lambda: torch.ones_like(x)
    )
    torch.testing.assert_close(result[..., :3], alone[..., :3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, c: guided(d, c, c, 2.0, interval=(3.0, 1.0)), r"interval is \(3.0, 1.0\]"),
        (lambda d, c: guided(d, c, c, 2.0, interval=(-1.0, 1.0)), "from 0 or more up"),
        (lambda d, c: thresholded(d, 1.5), "percentile is 1.5"),
        (lambda d, c: thresholded(d, 0.9, limit=0.0), "limit is 0.0"),
    ],
)
def test_errors(inputs, make, message):
    denoiser = Denoiser(Network(), NoiseSchedule(ScheduleConfig()))
    with pytest.raises(ConfigError, match=message) as error:
        make(denoiser, inputs[2])
    assert "\n" not in str(error.value)
