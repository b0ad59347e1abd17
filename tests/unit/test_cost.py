"""The cost of training against closed forms, and against what is published of Stable Diffusion."""

import pytest
import torch
from torch import nn

from ldm.config import PRESETS
from ldm.training.cost import Cost, days, measure, unet_cost

A, B, C, SIDE = 5, 12, 7, 9


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(A, B), nn.GELU(), nn.Linear(B, C))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(A, B, 3, padding=1), nn.GELU(), nn.Conv2d(B, C, 3, padding=1, stride=3)
    )


@pytest.mark.parametrize(
    ("make", "shape", "first", "second", "pixels"),
    [
        (dense, (A,), 2 * A * B, 2 * B * C, 1),
        (convolutional, (A, SIDE, SIDE), 18 * A * B * SIDE**2, 18 * B * C * (SIDE / 3) ** 2, 81),
    ],
)
def test_small_networks(make, shape, first, second, pixels):
    """A layer's backward pass is two such products, one where its input needs no gradient."""
    cost = measure(make, lambda b: (torch.empty(b, *shape),))
    assert cost.parameters == sum(p.numel() for p in make().parameters())
    assert cost.forward == first + second
    assert cost.total == 2 * first + 3 * second
    assert cost.activations == 4 * pixels * (A + B + B)  # each layer's input
    assert cost.copies == 0


def test_half_precision():
    cost = measure(dense, lambda b: (torch.empty(b, A),), half=True)
    assert cost.activations == 2 * (A + B + B)
    assert cost.copies == 2 * B * C  # the weight that leads a gradient on
    assert cost.total == 2 * (2 * A * B) + 3 * (2 * B * C)


def test_stable_diffusion():
    """Published: 860 million parameters, 0.8 TFLOP a forward pass at 512 x 512 pixels."""
    cost = unet_cost(PRESETS["sd15"].unet, 64, 64)
    assert cost.parameters == 859_520_964
    assert cost.forward == pytest.approx(0.8e12, rel=0.1)
    assert cost.total == pytest.approx(3 * cost.forward, rel=0.05)


def test_activations_are_those_of_a_real_step(monkeypatch):
    """The bytes that autograd keeps of real tensors, of a U-Net with numbers in it."""
    from tiny import UNET

    from ldm.models.unet import UNet

    unet, kept = UNet(UNET).train(), []
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def bytes_of(b: int) -> int:
        kept.clear()
        inputs = torch.randn(b, 4, 8, 8), torch.zeros(b), torch.randn(b, 77, 32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            output = unet(*inputs)
        assert output.shape == inputs[0].shape
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(size for place, size in storages.items() if place not in own)

    cost = unet_cost(UNET, 8, 8)
    assert cost.activations == pytest.approx(bytes_of(2) - bytes_of(1), rel=1e-3)
    again = unet_cost(UNET, 8, 8, gradient_checkpointing=True)
    assert again.activations < cost.activations / 3 and again.forward == cost.forward
    assert again.total == pytest.approx(cost.total + cost.forward, rel=0.1)


def test_memory_and_days():
    cost = Cost(parameters=1000, forward=10, total=30, activations=500, copies=40)
    assert cost.memory(8) == 1000 * (4 + 4 + 8 + 4) + 40 + 8 * 500
    assert cost.memory(8, shared_by=4, ema=False) == 1000 * 16 / 4 + 40 + 8 * 500
    # 864 million samples of 1 GFLOP on 10 devices that do 10 GFLOP/s: a tenth of 86.4 million s
    assert days(864e6, 1e9, 10, 20e9, 0.5) == pytest.approx(100)
