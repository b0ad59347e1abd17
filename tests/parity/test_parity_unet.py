"""The U-Net against diffusers' UNet2DConditionModel: same weights, same answers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ldm.config import PRESETS, GradientCheckpointing, UNetConfig
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import ResnetBlock, timestep_embedding
from ldm.models.unet import UNet
from ldm.training.cost import flop_counter

SD15 = UNetConfig(
    block_out_channels=(32, 64, 128, 128), num_attention_heads=8, cross_attention_dim=24
)
SD21 = UNetConfig(
    block_out_channels=(32, 64, 128, 128),
    attention_head_dim=16,
    cross_attention_dim=40,
    use_linear_projection=True,
)
INPAINTING = dataclasses.replace(SD15, in_channels=9)
OTHER = UNetConfig(
    block_out_channels=(16, 32, 48),
    layers_per_block=1,
    cross_attention=(False, True, True),
    transformer_layers_per_block=2,
    num_attention_heads=(2, 4, 6),
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-6,
)


def reference(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' model of the same shape; its `attention_head_dim` counts heads."""
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in config.cross_attention
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if cross else "UpBlock2D"
            for cross in reversed(config.cross_attention)
        ),
        transformer_layers_per_block=config.transformer_layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.heads,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        num_class_embeds=config.num_class_embeds,
    )


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Random numbers in every parameter: what starts at zero would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel()
        parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 0.5 + 0.2 * noise)


def epsilons(module: nn.Module) -> dict[str, float]:
    norms = nn.GroupNorm | nn.LayerNorm
    return {name: norm.eps for name, norm in module.named_modules() if isinstance(norm, norms)}


def pair(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    theirs = reference(config).eval()
    fill(theirs)
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(config: UNetConfig, b: int = 2, h: int = 16, w: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, config.in_channels, h, w, generator=generator)
    context = torch.randn(b, 7, config.cross_attention_dim, generator=generator)
    return x, context


def error(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.1  # a reference near zero would agree with anything
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("size", [(16, 16), (13, 19)], ids=["even", "odd"])
@pytest.mark.parametrize(
    "config", [SD15, SD21, INPAINTING, OTHER], ids=["sd15", "sd21", "inpainting", "other"]
)
@torch.no_grad()
def test_equals_diffusers(config: UNetConfig, size: tuple[int, int]) -> None:
    ours, theirs = pair(config)
    x, context = inputs(config, 2, *size)
    t = torch.tensor([3, 981])
    assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-5


@torch.no_grad()
def test_classes_equal_diffusers() -> None:
    """The class without a label is the table's last row."""
    ours, theirs = pair(dataclasses.replace(OTHER, num_class_embeds=5))
    x, context = inputs(OTHER)
    t, labels = torch.tensor([3, 981]), torch.tensor([0, 3])
    expected = theirs(x, t, context, class_labels=labels).sample
    assert error(ours(x, t, context, labels), expected) < 1e-5
    none = theirs(x, t, context, class_labels=torch.tensor([4, 4])).sample
    assert error(ours(x, t, context), none) < 1e-5
    assert error(expected, none) > 0.01


@pytest.mark.parametrize(
    "t",
    [torch.tensor(7), torch.tensor(7.25), torch.tensor([0.5, 998.75])],
    ids=["0-d", "0-d float", "floats"],
)
@torch.no_grad()
def test_timesteps_of_every_kind(t: Tensor) -> None:
    ours, theirs = pair(OTHER)
    x, context = inputs(OTHER)
    assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-5
    assert not torch.equal(ours(x, t, context), ours(x, t + 0.25, context))


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sd21-v"])
def test_the_names_and_shapes_of_stable_diffusion(preset: str) -> None:
    config = PRESETS[preset].unet
    with torch.device("meta"):
        ours, theirs = UNet(config), reference(config)
    weights = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert weights == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert len(weights) == 686
    # too small to show in an answer, where the features are of ordinary size
    assert epsilons(ours) == epsilons(theirs)


def test_a_new_network_starts_with_silent_branches() -> None:
    unet = UNet(OTHER)
    x, context = inputs(OTHER)
    assert torch.equal(unet(x, torch.tensor(5), context), torch.zeros(2, 4, 16, 16))
    # behind the last layer, the middle is the identity: every branch in it adds nothing
    h = torch.randn(2, 48, 4, 4)
    assert torch.equal(unet.mid_block(h, torch.randn(2, 64), context), h)
    branches = [m for m in unet.modules() if isinstance(m, ResnetBlock | SpatialTransformer)]
    assert len(branches) == 18
    for branch in branches:
        last = branch.conv2 if isinstance(branch, ResnetBlock) else branch.proj_out
        assert not any(parameter.any() for parameter in last.parameters())


def test_timestep_embedding_in_closed_form() -> None:
    t, width = 412.5, 8
    waves = [t / 10_000 ** (i / 4) for i in range(4)]
    expected = [math.cos(wave) for wave in waves] + [math.sin(wave) for wave in waves]
    actual = timestep_embedding(torch.tensor([t]), width)[0]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize("how", [True, "selective"])
def test_gradient_checkpointing_changes_no_gradient(how: GradientCheckpointing) -> None:
    unet = UNet(OTHER)
    fill(unet)
    x, context = inputs(OTHER)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    unet.down_blocks[1].resnets[0].register_forward_pre_hook(count)

    def gradients(recompute: GradientCheckpointing, train: bool = True) -> tuple[int, list[Tensor]]:
        nonlocal calls
        calls = 0
        unet.train(train)
        unet.gradient_checkpointing = recompute
        unet.zero_grad()
        unet(x, torch.tensor([3, 981]), context).square().mean().backward()
        return calls, [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    kept_calls, kept = gradients(False)
    recomputed_calls, recomputed = gradients(how)
    assert (kept_calls, recomputed_calls) == (1, 2)
    assert gradients(how, train=False)[0] == 1
    assert len(kept) == len(list(unet.parameters()))
    for ours, theirs in zip(recomputed, kept, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_recomputed_and_what_is_kept(half: bool) -> None:
    """Selectively, no product is computed twice, and near half of what is kept goes."""
    unet = UNet(SD15).train()
    x, context = inputs(SD15, 2, 16, 16)
    kept, flop = {}, {}
    for how in (False, "selective", True):
        unet.gradient_checkpointing = how
        with flop_counter() as counter:
            with (
                profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
                torch.autocast("cpu", torch.bfloat16, enabled=half),
            ):
                output = unet(x, torch.tensor([3, 981]), context)
            output.float().sum().backward()
        flop[how] = counter.get_total_flops()
        kept[how] = sum(event.self_cpu_memory_usage for event in record.key_averages())
    assert flop["selective"] == flop[False] < 0.85 * flop[True]
    assert kept[True] < 0.5 * kept["selective"] < 0.35 * kept[False]


@torch.no_grad()
def test_channels_last_and_autocast_give_the_same_answer() -> None:
    for config in (SD15, SD21):
        ours, theirs = pair(config)
        x, context = inputs(config, 2, 13, 19)
        t = torch.tensor([3, 981])
        expected = theirs(x, t, context).sample
        with torch.autocast("cpu", torch.bfloat16):
            assert error(ours(x, t, context).float(), expected) < 0.05
        ours = ours.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        assert error(ours(x, t, context), expected) < 1e-5
