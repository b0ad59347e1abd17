"""Compiled networks: the plain network's numbers; what is built anew, and when."""

import copy
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize
from torch import Tensor, nn

from ldm.config import AutoencoderConfig, UNetConfig
from ldm.engine.cache import default_cache
from ldm.engine.compiled import Compiled, jitted, prepare
from ldm.engine.shapes import Network, PerShape, TwoWays
from ldm.errors import ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8, 8),
    layers_per_block=1,
    cross_attention=(False, False),  # the middle has it anyway
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
VAE = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def random(network: Any) -> Any:
    randomize(network)
    return network.eval()


def unet_args(pictures: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Two contexts a picture, as under guidance; timesteps that all have one place in memory."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(pictures, 4, 4, 4, generator=generator)
    context = torch.randn(2 * pictures, 3, 8, generator=generator)
    return x, torch.tensor(500.0).expand(pictures), context


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return random(UNet(UNET))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "ldm" / "compiled"


@pytest.fixture(scope="module")
def built(unet: nn.Module, cache: Path) -> Compiled:
    """Compiled for one picture."""
    compiled = Compiled(unet, cache)
    compiled(*unet_args(), None)
    return compiled


def test_numbers_are_the_plain_network_s(built: Compiled, unet: nn.Module) -> None:
    x, t, context = unet_args()
    with torch.no_grad():
        expected = unet(x, t, context)
    assert built.build_seconds > 0
    for layout in (torch.contiguous_format, torch.channels_last):
        result = built(x.to(memory_format=layout), t, context, None)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_second_process_finds_it(
    built: Compiled, unet: nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = Compiled(copy.deepcopy(unet), cache)
    args = (*unet_args(), None)
    assert torch.equal(found(*args), built(*args))
    assert found.build_seconds == 0


def test_an_autoencoder_s_decoder_compiles(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    torch.manual_seed(0)
    vae = random(AutoencoderKL(VAE))
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents)
    result = prepare(vae).decode(latents)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_two_ways_are_the_autoencoder_s() -> None:
    vae = AutoencoderKL(VAE).eval()
    ways = TwoWays(vae, Plain)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images)
        assert torch.equal(ways.encode(images).logvar, posterior.logvar)
        assert torch.equal(ways.decode(posterior.mean), vae.decode(posterior.mean))


def test_whatever_changes_the_code_changes_the_key(
    unet: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = unet_args()

    def key(network: nn.Module, *args: Tensor | None) -> str:
        return Compiled(network, cache).key(args)

    weights, heads, training = copy.deepcopy(unet), copy.deepcopy(unet), copy.deepcopy(unet)
    weights.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    heads.mid_block.attentions[0].transformer_blocks[0].attn1.heads = 2
    training.train()
    keys = [
        key(unet, *args),
        *(key(other, *args) for other in (weights, heads, training)),
        key(unet, *unet_args(2)),
        key(unet, *args, None),
        key(unet, args[0].double(), *args[1:]),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    keys.append(key(unet, *args))
    assert len(set(keys)) == len(keys)
    assert key(copy.deepcopy(unet), *unet_args()) == keys[-1]


def test_damaged_files_are_made_again_which_takes_a_compiler(
    unet: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = Compiled(unet, tmp_path)
    file = tmp_path / f"{compiled.key(unet_args())}.pt2"
    file.write_bytes(b"half a file")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match="'no-such-compiler'.*install"),
    ):
        compiled(*unet_args())
    assert f"{file} cannot be loaded" in caplog.text
    assert os.listdir(tmp_path) == [file.name]


def test_the_cache_is_the_user_s_own(
    unet: nn.Module, built: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="compiler"):
        Compiled(unet)(*unet_args())
    assert default_cache() == tmp_path / "ldm" / "compiled"
    assert default_cache().stat().st_mode & 0o777 == 0o700
    planted = default_cache() / f"{Compiled(unet).key((*unet_args(), None))}.pt2"
    shutil.copy(built.cache / planted.name, planted)
    Compiled(unet)(*unet_args(), None)  # who could write it?
    planted.chmod(0o666)
    with pytest.raises(ConfigError, match="compiler"):
        Compiled(unet)(*unet_args(), None)
    default_cache().chmod(0o770)
    with pytest.raises(ConfigError, match="others can write there"):
        Compiled(unet)(*unet_args())


def test_a_gpu_s_may_have_any_number_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile refuses more than eight of one network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    network, shapes = nn.Sequential(nn.Linear(3, 2)), [torch.ones(n, 3) for n in range(1, 12)]
    refusing = torch.compile(network, fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match="fullgraph"):
        [refusing(x) for x in shapes]
    torch._dynamo.reset()
    run = jitted(network)
    assert [run(x).shape for x in shapes] == [(n, 2) for n in range(1, 12)]
    torch._dynamo.reset()


class Plain(PerShape):
    """Prepared by doing nothing, and counted."""

    made = 0

    def make(self, args: tuple[Tensor | None, ...]) -> Network:
        self.made += 1
        return self.network


def test_the_shape_not_used_for_longest_is_forgotten() -> None:
    plain = Plain(lambda x, y: x + 1, keep=2)
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(1, dtype=torch.float64)
    made = []
    for x in (a, b, a, c, a, b):  # c takes the place of b
        assert torch.equal(plain(x, None), x + 1)
        made.append(plain.made)
    assert made == [1, 2, 2, 3, 3, 4]
