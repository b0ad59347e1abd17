"""The autoencoder against diffusers' AutoencoderKL: same weights, same answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as Reference
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from ldm.config import PRESETS, AutoencoderConfig
from ldm.errors import ConfigError
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


@torch.no_grad()
def test_one_tile_equals_plain_decode() -> None:
    vae, _ = pair(F8)
    latents = normal(2, 4, 8, 5)
    assert torch.equal(vae.decode_tiled(latents, tile=8, overlap=2), vae.decode(latents))


@pytest.mark.parametrize(("h", "w"), [(24, 24), (29, 8), (5, 40), (17, 23)])
def test_tiles_of_a_local_decoder_leave_no_trace(
    h: int, w: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that sees one pixel at a time: the blend must give back its picture."""
    vae = AutoencoderKL(F2)
    seen: list[tuple[int, int]] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append((latents.shape[2], latents.shape[3]))
        return F.interpolate(latents, scale_factor=2)

    monkeypatch.setattr(vae, "decode", decode)
    latents = normal(2, 3, h, w)
    tiled = vae.decode_tiled(latents, tile=8, overlap=3)
    torch.testing.assert_close(tiled, F.interpolate(latents, scale_factor=2))
    assert len(seen) > 1 and max(max(size) for size in seen) == 8  # memory is a tile's


def test_tiles_of_different_brightness_fade_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile a flat grey of its own: the steepest step is that of a linear fade."""
    vae = AutoencoderKL(F2)
    greys: list[float] = []

    def decode(latents: Tensor) -> Tensor:
        greys.append(float(len(greys) % 2))  # neighbours in a row differ by one
        return F.interpolate(torch.full_like(latents, greys[-1]), scale_factor=2)

    monkeypatch.setattr(vae, "decode", decode)
    tiled = vae.decode_tiled(torch.zeros(1, 3, 8, 28), tile=8, overlap=3)
    assert tiled.min() == 0 and tiled.max() == 1
    assert len(greys) == 5
    # the least overlap is 6 picture pixels; a hard seam would step by 1
    torch.testing.assert_close(tiled.diff(dim=-1).abs().max(), torch.tensor(1 / 6))


@torch.no_grad()
def test_tiles_of_the_decoder_are_near_to_plain_decode() -> None:
    vae, _ = pair(F2)
    y, x = torch.meshgrid(torch.linspace(-2, 2, 48), torch.linspace(-2, 2, 48), indexing="ij")
    latents = torch.stack([y.sin(), x.cos(), (x * y).sin()])[None] + 0.3 * normal(1, 3, 48, 48)
    plain, tiled = vae.decode(latents), vae.decode_tiled(latents, tile=32, overlap=8)
    assert (plain - tiled).abs().mean() < 0.1 * plain.std()
    # tiles cover 0 to 32 and 16 to 48: where one ends, the picture steps no more than elsewhere
    for image in (tiled, tiled.mT):
        steps = image.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # w-1
        assert steps[[31, 63]].max() < 1.1 * steps.mean()


@pytest.mark.parametrize("overlap", [0, 8, 9])
def test_tiles_that_cannot_be_are_refused_in_one_line(overlap: int) -> None:
    with pytest.raises(ConfigError, match="need 0 < overlap < tile") as caught:
        AutoencoderKL(F2).decode_tiled(torch.zeros(1, 3, 16, 16), tile=8, overlap=overlap)
    assert "\n" not in str(caught.value)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    vae, _ = pair(F8)
    vae.train()
    images, noise = normal(2, 3, 16, 16).clamp(-1, 1), normal(2, 4, 2, 2)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    vae.decoder.mid_block.resnets[0].register_forward_pre_hook(count)

    def gradients(recompute: bool) -> tuple[int, list[Tensor | None]]:
        nonlocal calls
        calls = 0
        vae.gradient_checkpointing = recompute
        vae.zero_grad()
        decoded, posterior = vae(images, noise)
        ((decoded - images).square().mean() + 1e-3 * posterior.kl().mean()).backward()
        return calls, [p.grad for p in vae.parameters()]

    kept_calls, kept = gradients(False)
    recomputed_calls, recomputed = gradients(True)
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
