"""The GPU's fused forms and their kernels: on a GPU, or in Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tiny import UNET, VAE, randomize

from ldm.engine import gpu
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

pytest.importorskip("triton")

INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
anywhere = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="by test_all_in_the_interpreter"
)


def test_all_in_the_interpreter():
    """In a process of its own: Triton decides as it is imported who runs its kernels."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "not interpreter"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_where_triton_cannot_build_it_says_so_once(monkeypatch, caplog):
    """Networks are recorded as they are then."""

    def refuse(name, *args, **options):
        raise RuntimeError("Failed to find a C compiler")

    gpu.triton_works.cache_clear()
    monkeypatch.setattr(torch, "zeros", refuse)
    with caplog.at_level("INFO"):
        assert not gpu.triton_works() and not gpu.triton_works()
    assert [record.message for record in caplog.records if "C compiler" in record.message]
    assert len(caplog.records) == 1
    gpu.triton_works.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    from ldm.engine import kernels

    # no TF32 in convolutions, which has three digits
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device(DEVICE), torch.no_grad():
        yield kernels


def make(kind, config):
    torch.manual_seed(0)
    network = kind(config).eval()
    randomize(network)
    for parameter in network.parameters():  # or rounding would grow from layer to layer
        parameter.mul_(0.7)
    return network.to(memory_format=torch.channels_last)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@anywhere
@pytest.mark.parametrize("large", [False, True], ids=["one program a group", "several"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("given", ["nothing", "bias", "bias and shift"])
def test_group_normalisation(kernels, large, silu, given, monkeypatch):
    if large:
        monkeypatch.setattr(kernels, "_LARGE", 0)
        monkeypatch.setattr(kernels, "_CHUNKS", 3)
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(3, 15)
    randomize(norm)
    x = (torch.randn(4, 15, 17, 19) + 2).to(memory_format=torch.channels_last)
    bias = torch.randn(15) if given != "nothing" else None
    shift = torch.randn(2, 20)[:, 3:18] if given == "bias and shift" else None
    expected = x if bias is None else x + bias[:, None, None]
    expected = expected if shift is None else expected + shift.repeat(2, 1)[:, :, None, None]
    expected = norm(expected.contiguous())
    found = kernels.group_norm(x, norm, silu=silu, bias=bias, shift=shift)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, F.silu(expected) if silu else expected) < 1e-6


@anywhere
def test_gates_and_residuals(kernels):
    torch.manual_seed(0)
    rows = 3 * torch.randn(2, 5, 66)
    value, gate = rows.chunk(2, -1)
    assert distance(kernels.gated(rows), value * F.gelu(gate)) < 1e-6
    x, other = (torch.randn(2, 33, 40, 7) for _ in range(2))
    bias = torch.randn(33)
    expected = x + bias[:, None, None] + other
    x = x.to(memory_format=torch.channels_last)
    assert distance(kernels.added(x, bias, other), expected) < 1e-6


@anywhere
@pytest.mark.parametrize("b, k", [(1, 1), (3, 2)])
def test_the_unet(kernels, b, k):
    unet = make(UNet, UNET)
    form = gpu.fused(plain := deepcopy(unet))
    x, t, context = torch.randn(b, 4, 4, 8), torch.linspace(900, 10, b), torch.randn(k * b, 7, 32)
    assert distance(form(x, t, context), unet(x, t, context)) < 1e-5
    # the plain network still is one, and what changes in place counts in both
    assert distance(plain(x, t, context), unet(x, t, context)) < 1e-5
    for mine, own in zip(plain.parameters(), unet.parameters(), strict=True):
        change = 0.9 + 0.2 * torch.rand_like(own)
        mine.mul_(change)
        own.mul_(change)
    assert distance(form(x, t, context), unet(x, t, context)) < 1e-5


@anywhere
def test_the_autoencoder(kernels):
    vae = make(AutoencoderKL, VAE)
    x, z = torch.randn(2, 3, 32, 24), torch.randn(2, 4, 8, 6)
    encoder, decoder = gpu.fused(vae.encoder), gpu.fused(vae.decoder)
    assert distance(encoder(x), vae.encoder(x)) < 1e-5
    assert distance(decoder(z), vae.decoder(z)) < 1e-5
