"""The autoencoder against diffusers' AutoencoderKL: same weights, same answers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from ldm.config import PRESETS, AutoencoderConfig, GradientCheckpointing
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian

F8 = AutoencoderConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
F2 = AutoencoderConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    latent_channels=3,
    norm_num_groups=4,
    mid_block_add_attention=False,
    scaling_factor=0.75,
    shift_factor=0.25,
)


def reference(config: AutoencoderConfig) -> Reference:
    levels = len(config.block_out_channels)
    return Reference(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_add_attention,
    )


def epsilons(module: nn.Module) -> dict[str, float]:
    norms = nn.GroupNorm | nn.LayerNorm
    return {name: norm.eps for name, norm in module.named_modules() if isinstance(norm, norms)}


def pair(config: AutoencoderConfig) -> tuple[AutoencoderKL, Reference]:
    """Both with the same random numbers in every parameter."""
    theirs = reference(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel()
            parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 0.5 + 0.2 * noise)
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def error(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.1  # a reference near zero would agree with anything
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("config", [F8, F2], ids=["f8", "f2"])
@torch.no_grad()
def test_equals_diffusers(config: AutoencoderConfig) -> None:
    ours, theirs = pair(config)
    images = normal(2, 3, 40, 56).clamp(-1, 1)
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert error(posterior.mean, expected.mean) < 1e-5
    assert error(posterior.logvar, expected.logvar) < 1e-5
    latents = normal(*expected.mean.shape)
    decoded = theirs.decode(latents).sample
    assert error(ours.decode(latents), decoded) < 1e-5

    noise = normal(*expected.mean.shape)
    there, _ = ours(images, noise)
    sampled = theirs.decode(expected.mean + expected.std * noise).sample
    assert error(there, sampled) < 1e-5
    assert error(ours(images)[0], theirs.decode(expected.mode()).sample) < 1e-5


def test_the_names_and_shapes_of_stable_diffusion() -> None:
    config = PRESETS["sd15"].vae
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), reference(config)
    weights = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert weights == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert len(weights) == 248
    # too small to show in an answer, where the features are of ordinary size
    assert epsilons(ours) == epsilons(theirs)


def test_gaussian_equals_torch_distributions() -> None:
    moments = 3 * normal(5, 8, 4, 4)
    posterior = DiagonalGaussian.from_moments(moments)
    mean, logvar = moments[:, :4], moments[:, 4:]
    theirs = Independent(Normal(mean, (0.5 * logvar).exp()), 3)
    standard = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(posterior.kl(), kl_divergence(theirs, standard))
    assert torch.equal(posterior.mode(), mean)
    # the density of a sample knows both the mean and the deviation that it was drawn with
    noise = normal(5, 4, 4, 4)
    torch.testing.assert_close(
        theirs.log_prob(posterior.sample(noise)),
        standard.log_prob(noise) - 0.5 * logvar.sum(dim=(1, 2, 3)),
    )


def test_gaussian_clamps_the_log_variance_as_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = 100 * normal(2, 8, 4, 4)
    theirs = DiagonalGaussianDistribution(moments)
    assert torch.equal(DiagonalGaussian.from_moments(moments).logvar, theirs.logvar)
    assert theirs.logvar.min() == -30 and theirs.logvar.max() == 20


def test_kl_is_exact_under_half_precision() -> None:
    posterior = DiagonalGaussian.from_moments(normal(2, 8, 32, 32).bfloat16())
    expected = DiagonalGaussian(posterior.mean.double(), posterior.logvar.double())
    mean, logvar = expected.mean, expected.logvar
    exact = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl().double(), exact, rtol=1e-5, atol=0)


def test_scale_in_closed_form_and_back() -> None:
    vae = AutoencoderKL(F2)
    raw = normal(2, 3, 4, 4)
    torch.testing.assert_close(vae.scale(raw), 0.75 * (raw - 0.25))
    torch.testing.assert_close(vae.unscale(vae.scale(raw)), raw)


def test_last_layer_is_the_decoders_last_convolution() -> None:
    vae = AutoencoderKL(F2)
    assert vae.last_layer is dict(vae.named_parameters())["decoder.conv_out.weight"]


@pytest.mark.parametrize("how", [True, "selective"])
def test_gradient_checkpointing_changes_no_gradient(how: GradientCheckpointing) -> None:
    vae, _ = pair(F8)
    vae.train()
    images, noise = normal(2, 3, 16, 16).clamp(-1, 1), normal(2, 4, 2, 2)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    vae.decoder.mid_block.resnets[0].register_forward_pre_hook(count)

    def gradients(recompute: GradientCheckpointing) -> tuple[int, list[Tensor | None]]:
        nonlocal calls
        calls = 0
        vae.gradient_checkpointing = recompute
        vae.zero_grad()
        decoded, posterior = vae(images, noise)
        ((decoded - images).square().mean() + 1e-3 * posterior.kl().mean()).backward()
        return calls, [p.grad for p in vae.parameters()]

    kept_calls, kept = gradients(False)
    recomputed_calls, recomputed = gradients(how)
    assert (kept_calls, recomputed_calls) == (1, 2)
    for ours, theirs in zip(recomputed, kept, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@torch.no_grad()
def test_channels_last_and_autocast_give_the_same_answer() -> None:
    ours, theirs = pair(F8)
    images = normal(2, 3, 40, 56).clamp(-1, 1)
    expected = theirs.encode(images).latent_dist.mean
    decoded = theirs.decode(expected).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert error(ours.encode(images).mean.float(), expected) < 0.05
        assert error(ours.decode(expected).float(), decoded) < 0.05
    ours: nn.Module = ours.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert error(ours.encode(images).mean, expected) < 1e-5
    assert error(ours.decode(expected), decoded) < 1e-5
