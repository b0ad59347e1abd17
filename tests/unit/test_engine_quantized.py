"""Eight bits: the error, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm.checkpoint.folder import load_folder
from ldm.engine import Engine
from ldm.engine.compiled import Compiled
from ldm.engine.quantized import quantized
from ldm.errors import ConfigError
from ldm.models.unet import UNet


@pytest.fixture(scope="module")
def unet() -> UNet:
    """The bundled one: the error of random weights says little."""
    folder = Path(ldm.__file__).parent / "pretrained" / "flowers"
    return load_folder(folder, dtype=torch.float32).unet.eval()


def test_int8_is_off_by_less_than_half_a_percent(unet: UNet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = (torch.randn(3, 4, 16, 16), torch.tensor([10.0, 500.0, 990.0]), torch.randn(3, 77, 128))
    with torch.no_grad():
        expected, copy = unet(*args), quantized(unet, "int8")
        error = copy(*args) - expected
        assert torch.equal(unet(*args), expected)  # the original is as it was
    relative = error.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (relative > 1e-5).all()
    assert (relative < 5e-3).all()
    assert len({Compiled(each, tmp_path).key(args) for each in (unet, copy)}) == 2


def test_engines_that_can_compute_with_eight_bits_do(unet: UNet) -> None:
    """A fast form on a CPU cannot; a compiled one can."""
    copy = quantized(unet, "int8")
    assert Engine(copy, "fast").ready() is copy
    assert isinstance(Engine(copy, "compiled").ready(), Compiled)


@pytest.mark.parametrize(
    ("how", "message"),
    [("int4", "no quantization 'int4'"), ("fp8", "fp8 takes a GPU"), ("int8", "needs torchao")],
)
def test_what_cannot_be_is_refused(
    unet: UNet, how: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=message):
        quantized(unet, how)
