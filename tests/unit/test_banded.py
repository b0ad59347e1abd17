"""An autoencoder in bands of rows is the autoencoder."""

import numpy as np
import pytest
import torch
from tiny import VAE, randomize

from ldm.config import AutoencoderConfig
from ldm.data.flowers import Flowers
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.banded import BandedAutoencoder, Features
from ldm.pipeline import LatentDiffusionPipeline

F8 = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4)


def make(config):
    torch.manual_seed(0)
    vae = AutoencoderKL(config)
    randomize(vae)
    return vae.eval()


@pytest.mark.parametrize("config", [VAE, F8], ids=["f4", "f8"])
@pytest.mark.parametrize("tile", [1, 3, 8, 64])
@pytest.mark.parametrize("size", [(16, 24), (5, 7), (33, 8)])
@torch.no_grad()
def test_bands_of_any_height_are_the_whole(config, tile, size):
    vae = make(config)
    banded = BandedAutoencoder(vae, tile)
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, *size, generator=rng)
    expected = vae.decode(latents)
    assert ((banded.decode(latents) - expected).abs().max() / expected.abs().max()) < 1e-5
    f = config.downsample_factor
    images = torch.rand(2, 3, size[0] * f, size[1] * f, generator=rng) * 2 - 1
    mine, posterior = banded.encode(images), vae.encode(images)
    torch.testing.assert_close(mine.mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.logvar, posterior.logvar, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_band_is_all_that_a_convolution_sees(monkeypatch):
    """However tall the picture: a tile's pixels, and a row above and below."""
    vae, seen = make(VAE), []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        "ldm.models.banded.F.conv2d", lambda x, *rest: (seen.append(x.shape), conv2d(x, *rest))[1]
    )
    BandedAutoencoder(vae, tile=4).decode(torch.randn(1, 4, 64, 8))
    assert len(seen) > 50
    for _, _, height, width in seen:
        assert (height - 2) * (width - 2) <= 2 * 2 * (4 * 4) ** 2  # doubled by upsampling, 4 times


@torch.no_grad()
def test_half_precision():
    vae = make(VAE).bfloat16()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole, banded = vae.decode(latents), BandedAutoencoder(vae, 3).decode(latents)
    assert banded.dtype == torch.bfloat16
    exact = make(VAE).to(torch.bfloat16).float().decode(latents.float())
    error = (banded.float() - exact).abs().mean()
    assert error < 2 * (whole.float() - exact).abs().mean() + 1e-6


def test_the_moments_of_bands_are_those_of_the_picture():
    """A far mean and a small spread, in bands of unequal height."""
    x = 100 + 0.1 * torch.randn(2, 8, 11, 5, generator=torch.Generator().manual_seed(1))
    norm = torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    bands = [x[:, :, :4], x[:, :, 4:8], x[:, :, 8:]]
    features = Features.gather(bands, 11)
    assert torch.equal(features.values, x)
    var, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    torch.testing.assert_close(features.mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(features.square - features.mean**2, var, rtol=1e-2, atol=0)
    exact = norm.double()(x.double()).float()
    torch.testing.assert_close(features.normalisation(norm.float())(x), exact, rtol=0, atol=0.02)


def test_a_large_picture_by_the_bundled_model():
    """512 px in bands that hold a sixteenth: the same 8-bit picture."""
    pipe = LatentDiffusionPipeline.from_pretrained("flowers")
    pixels = torch.from_numpy(np.array(Flowers(length=1, size=512)[0].image)).permute(2, 0, 1)
    pixels = pixels[None] / 127.5 - 1
    latents = pipe.encode(pixels)  # 1 4 128 128
    whole = pipe.decode(latents)[0]
    pipe.enable_vae_tiling(tile=32)
    torch.testing.assert_close(pipe.encode(pixels), latents, rtol=0, atol=1e-4)
    difference = np.abs(np.asarray(pipe.decode(latents)[0]).astype(int) - np.asarray(whole))
    assert difference.max() <= 1 and difference.mean() < 0.01
