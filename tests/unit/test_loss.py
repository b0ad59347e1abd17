import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence

from ldm.config import ScheduleConfig
from ldm.diffusion.loss import diffusion_loss, distance, variational_bound
from ldm.diffusion.schedule import NoiseSchedule

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 3, 5, 5, generator=generator).unbind(0)
    return x0, noise, torch.tensor([3, 250, 640, 999]), torch.zeros(4, 1, 1)


def network(x, t, context):
    return torch.sin(2 * x) + t.reshape(-1, 1, 1, 1) / 500 + context.reshape(-1, 1, 1, 1)


def reference_loss(x0, noise, t, context, prediction):
    """As diffusers' text-to-image training example computes it, a sample at a time."""
    scheduler = DDPMScheduler(**BETAS)
    output = network(scheduler.add_noise(x0, noise, t), t, context)
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(x0, noise, t),
        "sample": x0,
    }[prediction]
    return torch.stack([(o - y).pow(2).mean() for o, y in zip(output, target, strict=True)])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss(batch, prediction):
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    mine = diffusion_loss(network, schedule, *batch)
    torch.testing.assert_close(mine, reference_loss(*batch, prediction), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(batch, prediction):
    """diffusers' example: min(SNR, gamma), over SNR for epsilon and over SNR + 1 for v."""
    t = batch[2]
    snr = compute_snr(DDPMScheduler(**BETAS), t)
    weight = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weight = weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    mine = diffusion_loss(network, schedule, *batch, min_snr_gamma=5.0)
    expected = weight * reference_loss(*batch, prediction)
    torch.testing.assert_close(mine, expected, rtol=2e-4, atol=0)


def test_min_snr_makes_the_predictions_agree(batch):
    """One and the same error of x0 costs the same, whatever the network predicts."""
    x0, noise, t, context = batch
    schedule = NoiseSchedule(ScheduleConfig())
    alpha, sigma_rate = (rate.float().reshape(-1, 1, 1, 1) for rate in schedule.rates(t))
    error = 0.1 * torch.cos(x0)
    losses = [
        diffusion_loss(
            lambda x, t, c, output=output: output,
            NoiseSchedule(ScheduleConfig(prediction_type=prediction)),
            *batch,
            min_snr_gamma=5.0,
        )
        for prediction, output in [
            ("sample", x0 + error),
            ("epsilon", noise - alpha / sigma_rate * error),
            ("v_prediction", alpha * noise - sigma_rate * x0 - error / sigma_rate),
        ]
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_terminal_snr_has_finite_weights(batch, prediction):
    """At T - 1 the SNR is that of 2**-24, and 0 / 0 is nowhere."""
    schedule = NoiseSchedule(
        ScheduleConfig(rescale_betas_zero_snr=True, prediction_type=prediction)
    )
    plain = diffusion_loss(network, schedule, *batch)
    weighted = diffusion_loss(network, schedule, *batch, min_snr_gamma=5.0)
    snr = 1 / (2**24 - 1)
    expected = {"epsilon": 1, "v_prediction": snr / (snr + 1), "sample": snr}[prediction]
    assert (weighted / plain)[-1].item() == pytest.approx(expected, rel=1e-5)


def test_distances():
    """Huber's is l2 near 0 and goes on along its tangent."""
    error, zero = torch.linspace(-3, 3, 601, dtype=torch.float64), torch.zeros(601).double()
    c = 0.25
    huber = distance(error, zero, "huber", c)
    line = c**2 + 2 * c * (error.abs() - c)
    torch.testing.assert_close(huber, torch.where(error.abs() <= c, error**2, line))
    assert torch.equal(distance(error, zero, "l1", c), error.abs())
    assert torch.equal(distance(error, zero, "l2", c), error**2)


@pytest.mark.parametrize("kind", ["l1", "huber"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_of_other_distances(batch, prediction, kind):
    x0, noise, t, context = batch
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    scheduler = DDPMScheduler(**BETAS)
    output = network(scheduler.add_noise(x0, noise, t), t, context)
    velocity = scheduler.get_velocity(x0, noise, t)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction]
    error = (output - target).abs()
    expected = error if kind == "l1" else torch.where(error <= 1, error**2, 2 * error - 1)
    mine = diffusion_loss(network, schedule, *batch, loss_type=kind, huber_c=1.0)
    torch.testing.assert_close(mine, expected.mean((1, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_that_is_seen_is_not_predicted(batch, prediction):
    """diffusers' example with --input_perturbation."""
    x0, noise, t, context = batch
    seen = noise + 0.3 * torch.cos(7 * noise)
    scheduler = DDPMScheduler(**BETAS)
    output = network(scheduler.add_noise(x0, seen, t), t, context)
    velocity = scheduler.get_velocity(x0, noise, t)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction]
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    mine = diffusion_loss(network, schedule, *batch, seen_noise=seen)
    expected = (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=0)


STEPS = 8
CONFIG = ScheduleConfig(
    STEPS, "linear", beta_start=0.02, beta_end=0.4, variance_type="learned_range"
)
LEARNED = NoiseSchedule(CONFIG)


def chain():
    """Each step's beta and abar, and the abar before it (Ho et al. 2020, section 2)."""
    betas = torch.linspace(0.02, 0.4, STEPS, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    return betas, abar, torch.cat([torch.ones(1).double(), abar[:-1]])


def test_variational_bound_is_a_divergence_of_gaussians():
    """Against torch.distributions, with the posterior's mean and variance as Ho et al. write it."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, STEPS, 2, 3, 3)
    draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    x0, guess, output, x_t = draws.unbind(0)
    t = torch.arange(STEPS)
    betas, abar, before = (rate.reshape(-1, 1, 1, 1) for rate in chain())
    small = betas * (1 - before) / (1 - abar)
    small[0] = small[1]  # as the authors' code does

    def mean(x0):
        pulls = before.sqrt() * betas / (1 - abar), (1 - betas).sqrt() * (1 - before) / (1 - abar)
        return pulls[0] * x0 + pulls[1] * x_t

    v = (output + 1) / 2
    model = Normal(mean(guess), (v * betas.log() + (1 - v) * small.log()).exp().sqrt())
    expected = kl_divergence(Normal(mean(x0), small.sqrt()), model)
    expected[0] = -model.log_prob(x0)[0]
    mine = variational_bound(LEARNED, x0, guess, output, t)
    torch.testing.assert_close(mine, expected.mean((1, 2, 3)) / math.log(2))
    right = variational_bound(LEARNED, x0, x0, -torch.ones_like(x0), t)
    torch.testing.assert_close(right[1:], torch.zeros(STEPS - 1).double())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_hybrid_loss_trains_the_variance_and_not_the_mean(batch, prediction):
    """L_simple + 0.01 T L_t, whose second part has no gradient for the mean."""
    schedule = NoiseSchedule(replace(CONFIG, prediction_type=prediction))
    x0, noise, _, context = batch
    t = torch.tensor([0, 1, 4, 7])
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(4, 6, 5, 5, generator=generator).requires_grad_()
    losses = [
        diffusion_loss(lambda *_: output, schedule, x0, noise, t, context, vlb_weight=weight)
        for weight in (0.0, 0.01)
    ]
    alpha, sigma = (rate.float().reshape(-1, 1, 1, 1) for rate in LEARNED.rates(t))
    x_t, mean = alpha * x0 + sigma * noise, output[:, :3].detach()
    guess = {
        "epsilon": (x_t - sigma * mean) / alpha,
        "v_prediction": alpha * x_t - sigma * mean,
        "sample": mean,
    }[prediction]
    bound = variational_bound(LEARNED, x0, guess, output[:, 3:], t)
    torch.testing.assert_close(losses[1] - losses[0], 0.01 * STEPS * bound, rtol=1e-3, atol=1e-5)
    simple, hybrid = (torch.autograd.grad(loss.sum(), output)[0] for loss in losses)
    assert torch.equal(simple[:, :3], hybrid[:, :3])
    assert not simple[:, 3:].any() and hybrid[:, 3:].all()
