"""The patch discriminator against its closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.discriminator import PatchDiscriminator


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_receptive_field_is_that_of_pix2pix(layers: int, field: int) -> None:
    """Isola et al. 2017 name their discriminators 16x16 and 70x70; the others by the recursion."""
    network = PatchDiscriminator(width=4, layers=layers).double()
    closed_form = 1
    for conv in reversed(convolutions(network)):
        closed_form = (closed_form - 1) * conv.stride[0] + conv.kernel_size[0]
    assert closed_form == field

    # which pixels one verdict depends on, with positive weights and without normalisation
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.01)
        elif hasattr(module, "norm"):
            module.norm = nn.Identity()
    images = torch.ones(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    touched = images.grad[0, 0] != 0
    assert (touched.any(dim=0).sum(), touched.any(dim=1).sum()) == (field, field)


@torch.no_grad()
def test_equals_the_network_written_out() -> None:
    """C64-C128-C256-C512 of Isola et al. 2017, with normalisation over channel groups."""
    torch.manual_seed(0)
    network = PatchDiscriminator()
    # larger weights and biases than at the start, that nothing hides behind a small number
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 1.0))
    images = torch.rand(2, 3, 64, 80) * 2 - 1
    p = dict(network.named_parameters())

    def normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean(dim=(2, 3, 4), keepdim=True)
        var = groups.var(dim=(2, 3, 4), keepdim=True, unbiased=False)
        x = ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        return x * weight[:, None, None] + bias[:, None, None]

    x = F.conv2d(images, p["conv_in.weight"], p["conv_in.bias"], 2, 1)
    x = torch.where(x > 0, x, 0.2 * x)
    for i, stride in enumerate((2, 2, 1)):
        name = f"blocks.{i}"
        x = F.conv2d(x, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], stride, 1)
        x = normalise(x, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"])
        x = torch.where(x > 0, x, 0.2 * x)
    expected = F.conv2d(x, p["conv_out.weight"], p["conv_out.bias"], 1, 1)

    assert [conv.out_channels for conv in convolutions(network)] == [64, 128, 256, 512, 1]
    torch.testing.assert_close(network(images), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_picture_is_judged_alone() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(width=16).train()
    images = torch.rand(3, 3, 48, 48) * 2 - 1
    together = network(images)
    for image, logits in zip(images, together, strict=True):
        torch.testing.assert_close(network(image[None])[0], logits, atol=1e-6, rtol=1e-5)
    assert not list(network.buffers())  # no running statistics either


def test_initial_weights_are_those_of_pix2pix() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator()
    network.requires_grad_(False)
    for conv in convolutions(network)[1:-1]:
        count = conv.weight.numel()
        assert abs(float(conv.weight.std()) / 0.02 - 1) < 5 / math.sqrt(2 * count)
        assert abs(float(conv.weight.mean())) < 5 * 0.02 / math.sqrt(count)
        assert conv.bias is not None and not conv.bias.any()
    for norm in (m for m in network.modules() if isinstance(m, nn.GroupNorm)):
        assert abs(float(norm.weight.mean()) - 1) < 5 * 0.02 / math.sqrt(norm.num_channels)
        assert 0.01 < float(norm.weight.std()) < 0.03 and not norm.bias.any()
