import diffusers
import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import from_x0, to_x0, training_target
from ldm.diffusion.schedule import NoiseSchedule, per_sample
from ldm.errors import ConfigError

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@pytest.fixture
def process():
    """x0, noise, x_t, alpha and sigma_rate of a few timesteps, in double precision."""
    schedule = NoiseSchedule(ScheduleConfig())
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64).unbind(0)
    t = torch.tensor([0, 300, 700, 999])
    alpha, sigma_rate = (per_sample(rate, x0) for rate in schedule.rates(t))
    return x0, noise, alpha * x0 + sigma_rate * noise, alpha, sigma_rate, t


def test_velocity_closed_form(process):
    """v is the rate of change of x_t along the circle (alpha, sigma_rate) = (cos, sin)."""
    x0, noise, _, alpha, sigma_rate, _ = process
    angle = torch.atan2(sigma_rate, alpha)
    h = 1e-5
    ahead = (angle + h).cos() * x0 + (angle + h).sin() * noise
    behind = (angle - h).cos() * x0 + (angle - h).sin() * noise
    v = training_target(x0, noise, alpha, sigma_rate, "v_prediction")
    torch.testing.assert_close(v, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


def test_velocity_is_that_of_diffusers(process):
    x0, noise, _, alpha, sigma_rate, t = process
    reference = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    expected = reference.get_velocity(x0, noise, t)
    v = training_target(x0, noise, alpha, sigma_rate, "v_prediction")
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_mean_x0(process, prediction):
    x0, noise, x_t, alpha, sigma_rate, _ = process
    target = training_target(x0, noise, alpha, sigma_rate, prediction)
    torch.testing.assert_close(to_x0(target, x_t, alpha, sigma_rate, prediction), x0)
    torch.testing.assert_close(from_x0(x0, x_t, alpha, sigma_rate, prediction), target)


def test_targets_of_epsilon_and_sample(process):
    x0, noise, _, alpha, sigma_rate, _ = process
    assert torch.equal(training_target(x0, noise, alpha, sigma_rate, "epsilon"), noise)
    assert torch.equal(training_target(x0, noise, alpha, sigma_rate, "sample"), x0)


@pytest.mark.parametrize("function", [to_x0, from_x0, training_target])
def test_unknown_prediction(function):
    one = torch.ones(1)
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        function(one, one, one, one, "epsilom")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_undoes_the_noise(process, prediction):
    """A network that knows the answer is asked at the right x_t and timestep, and gives x0."""
    x0, noise, x_t, alpha, sigma_rate, t = process
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))

    def network(x, timesteps, context):
        torch.testing.assert_close(x, x_t)
        assert timesteps.tolist() == t.tolist()
        assert context == "context"
        return training_target(x0, noise, alpha, sigma_rate, prediction)

    sigma = schedule.sigmas[t]
    x = x0 + per_sample(sigma, x0) * noise
    torch.testing.assert_close(Denoiser(network, schedule)(x, sigma, "context"), x0)  # type: ignore


def test_denoiser_casts_and_clips():
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="sample"))
    seen = []

    def network(x, t, context):
        seen.append((x.dtype, t.dtype))
        return x

    denoiser = Denoiser(network, schedule, dtype=torch.bfloat16, clip_sample=True)
    x, sigma = torch.tensor([-9.0, 0.5, 9.0]).reshape(1, 1, 1, 3), torch.tensor([0.75])
    x0 = denoiser(x, sigma, x)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert x0.dtype == torch.float32
    expected = torch.tensor([-1.0, 0.4, 1.0]).reshape(x.shape)  # 0.5 / sqrt(1 + 0.75^2) = 0.4
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-3)
