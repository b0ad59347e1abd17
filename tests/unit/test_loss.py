import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.config import ScheduleConfig
from ldm.diffusion.loss import diffusion_loss
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
    override = NoiseSchedule(ScheduleConfig())
    assert torch.equal(mine, diffusion_loss(network, override, *batch, prediction=prediction))


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
            schedule,
            x0,
            noise,
            t,
            context,
            prediction=prediction,
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


def test_zero_terminal_snr_has_finite_weights(batch):
    schedule = NoiseSchedule(
        ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    )
    plain = diffusion_loss(network, schedule, *batch)
    weighted = diffusion_loss(network, schedule, *batch, min_snr_gamma=5.0)
    snr = 1 / (2**24 - 1)
    assert (weighted / plain)[-1].item() == pytest.approx(snr / (snr + 1), rel=1e-5)
