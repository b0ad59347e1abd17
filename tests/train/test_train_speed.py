"""What training does for its speed: in another way than torch by itself, or by telling of it."""

import pytest
import torch
import torch.nn.functional as F
from train_helpers import run

from ldm.engine import native
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import Recomputing
from ldm.training import attention, loop
from ldm.training.attention import attend, hasten_attention


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "native", lambda: None)


@pytest.mark.parametrize(("n", "m"), [(64, 64), (256, 77), (5, 3)])
def test_bfloat16_attention_and_its_gradients(n, m, without_native):
    """On a CPU: forward as torch, gradients nearer to those of float64 than torch's own."""
    torch.manual_seed(0)
    # as the layers make them: heads are cut out of rows
    rows = [torch.randn(2, length, 4, 24).bfloat16().transpose(1, 2) for length in (n, m, m, n)]

    def results(attention_of, dtype):
        q, k, v, pull = (tensor.detach().to(dtype) for tensor in rows)
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = attention_of(*inputs)
        return out, torch.autograd.grad(out, inputs, pull)

    exact = results(F.scaled_dot_product_attention, torch.float64)
    theirs = results(F.scaled_dot_product_attention, torch.bfloat16)
    ours = results(attend, torch.bfloat16)
    assert torch.equal(ours[0], theirs[0])
    with torch.no_grad():
        assert torch.equal(attend(*rows[:3]), theirs[0])
    for mine, other, true in zip(ours[1], theirs[1], exact[1], strict=True):
        error, torchs = ((x - true).norm() / true.norm() for x in (mine, other))
        assert mine.dtype == torch.bfloat16
        assert error < torchs and error < 3e-3  # half a unit in the last place is up to 4e-3


@pytest.mark.parametrize(("precision", "pays"), [("bf16", False), ("bf16", True), ("no", False)])
def test_bfloat16_that_will_be_slow_is_told_of(
    precision, pays, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "machine", lambda: "x86_64")
    monkeypatch.setattr("ldm.training.loop.half_pays", lambda: pays)
    options = {"train_data_dir": str(pictures), "output_dir": tmp_path, "max_train_steps": 1}
    run("vae", **options, mixed_precision=precision)
    told = "float32 may well be faster" in capsys.readouterr().out
    assert told == (precision == "bf16" and not pays)


@pytest.mark.parametrize(
    ("made_by", "keys", "own"),
    [
        ("AuthenticAMD", 1024, False),
        ("AuthenticAMD", 1023, True),
        ("GenuineIntel", 1024, True),
    ],
)
def test_whose_backward_pass_is_taken(made_by, keys, own, monkeypatch, without_native):
    monkeypatch.setattr(attention, "maker", lambda: made_by)
    q, k = (torch.randn(1, 1, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, keys))
    assert (type(attend(q, k, k).grad_fn).__name__ == "_BackwardInFloat32Backward") == own


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_native_attention_trains_a_layer(recompute, monkeypatch):
    """Its gradients are nearer to those of float32 than those of torch's of bfloat16."""
    if native.native() is None:
        pytest.skip("needs AVX512-BF16 and a C compiler")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(native, "_LARGE", 0)
    torch.manual_seed(0)
    block = SpatialTransformer(64, 4, 32, 1, 8, linear=True)
    parts = Recomputed(block).train()
    parts.gradient_checkpointing = recompute
    x, context, pull = (
        torch.randn(2, 64, 12, 12),
        torch.randn(2, 77, 32),
        torch.randn(2, 64, 12, 12),
    )
    calls = {"attend_forward": 0, "attend_backward": 0}
    for name in calls:
        monkeypatch.setattr(native, name, counted(getattr(native, name), name, calls))

    def gradients(half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = parts(x, context)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(out, list(block.parameters()), pull.to(out))]
        )

    exact, torchs = gradients(False), gradients(True)
    hasten_attention(block)
    ours = gradients(True)
    # two attentions; what is kept selectively is not done twice
    assert calls == {"attend_forward": 4 if recompute is True else 2, "attend_backward": 2}
    assert (ours - exact).norm() < 1.02 * (torchs - exact).norm()
    assert not torch.equal(ours, torchs)
    assert torch.equal(gradients(False), exact)


@pytest.mark.parametrize(
    ("precision", "compiled", "taken"),
    [("bf16", False, ["AutoencoderKL"]), ("bf16", True, []), ("no", False, [])],
)
def test_which_trainings_go_the_shorter_way(
    precision, compiled, taken, pictures, tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(
        loop, "hasten_attention", lambda module: found.append(type(module).__name__)
    )
    options = {"train_data_dir": str(pictures), "output_dir": tmp_path, "max_train_steps": 1}
    run("vae", **options, mixed_precision=precision, torch_compile=compiled)
    assert found == taken


def test_it_has_no_second_derivative(monkeypatch):
    if native.native() is None:
        pytest.skip("needs AVX512-BF16 and a C compiler")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(native, "_LARGE", 0)
    rows = [torch.randn(2, 2, 8, 8).bfloat16().requires_grad_() for _ in range(3)]
    first = torch.autograd.grad(attend(*rows).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


class Recomputed(Recomputing):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return self.run(self.part, *args)


def counted(function, name, calls):
    def call(*args):
        calls[name] += 1
        return function(*args)

    return call
