import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ldm.training.ema import EMA, _fused, _lerp


def steps(module, count):
    for step in range(count):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        yield step


def test_closed_form():
    """avg_n = prod(d) w_0 + sum_k (1 - d_k) prod_{j > k} d_j w_{k+1}, with the decay's warm-up."""
    torch.manual_seed(0)
    module, ema_decay = nn.Linear(3, 2), 0.4
    ema = EMA(module, ema_decay)
    history = [module.weight.detach().double().clone()]
    for step in steps(module, 12):
        ema.update(step)
        history.append(module.weight.detach().double().clone())
    decays = [min(ema_decay, (1 + k) / (10 + k)) for k in range(12)]
    assert decays[0] == 0.1 and decays[-1] == ema_decay  # both sides of the minimum are met
    expected, rest = torch.zeros_like(history[0]), 1.0
    for decay, weight in zip(reversed(decays), reversed(history[1:]), strict=True):
        expected += rest * (1 - decay) * weight
        rest *= decay
    expected += rest * history[0]
    torch.testing.assert_close(ema.average["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_constant_decay_is_that_of_diffusers():
    """diffusers' EMAModel, whose warm-up is (1 + step) / (10 + step) too, counted from step 1."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    ema = EMA(module, 0.999)
    theirs = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=False)
    theirs.optimization_step = 1  # its first call would copy the weights
    for step in steps(module, 20):
        ema.update(step + 1)
        theirs.step(module.parameters())
    for mine, other in zip(ema.average.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_applied_exchanges_and_restores_without_copies():
    module = nn.Linear(3, 2)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(5)
    weight, average = module.weight.detach().clone(), ema.average["weight"].clone()
    places = {module.weight.data_ptr(), ema.average["weight"].data_ptr()}
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(module.weight, average)
        assert not torch.equal(average, weight)
        assert {module.weight.data_ptr(), ema.average["weight"].data_ptr()} == places
        raise KeyError  # even then
    assert torch.equal(module.weight, weight) and torch.equal(ema.average["weight"], average)


def test_load():
    module = nn.Linear(3, 2)
    ema, saved = EMA(module, 0.9), {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    ema.load(saved)
    assert torch.equal(ema.average["weight"], saved["weight"])
    ema.update(100)
    expected = 0.9 * saved["weight"] + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)
    assert torch.equal(saved["weight"], torch.ones(2, 3))  # what was read stays as it was


@pytest.mark.parametrize("step", [0, 5, 1000])  # lerp has one formula below a half, one above
def test_a_skipped_step_leaves_no_trace(step):
    torch.manual_seed(0)
    one, other = nn.Linear(30, 7), nn.Linear(30, 7)
    averages = [EMA(one, 0.999) for _ in range(3)]
    one.load_state_dict(other.state_dict())
    before = {name: tensor.clone() for name, tensor in averages[0].average.items()}
    averages[0].update(step, torch.tensor(1.0))
    averages[1].update(step, torch.tensor(0.0))
    averages[2].update(step)
    for name, tensor in before.items():
        assert torch.equal(averages[0].average[name], tensor)
        assert torch.equal(averages[1].average[name], averages[2].average[name])
        assert not torch.equal(averages[2].average[name], tensor)


@pytest.mark.parametrize("share", [0.9, 0.1, 1e-4])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_the_kernel_of_a_gpu_does_what_that_of_a_cpu_does(share, skip):
    torch.manual_seed(0)
    weights = [torch.randn(30, 7), torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)]
    before = [torch.randn_like(tensor) for tensor in weights]
    skip = None if skip is None else torch.tensor(skip)
    results = []
    for move in (_lerp, _fused):
        average = [tensor.clone() for tensor in before]
        move(average, [tensor.clone() for tensor in weights], share, skip)
        results.append(average)
    for one, other, old, weight in zip(*results, before, weights, strict=True):
        expected = old.double() + (0 if skip == 1 else share) * (weight.double() - old.double())
        torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.double(), expected, rtol=1e-6, atol=1e-6)
        assert skip != 1 or (torch.equal(one, old) and torch.equal(other, old))
