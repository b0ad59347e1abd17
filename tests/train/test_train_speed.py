"""What training does for its speed: in another way than torch by itself, or by telling of it."""

import pytest
import torch
import torch.nn.functional as F
from train_helpers import run

from ldm.models import attention
from ldm.models.attention import attend
from ldm.training import loop


@pytest.mark.parametrize(("n", "m"), [(64, 64), (256, 77), (5, 3)])
def test_bfloat16_attention_and_its_gradients(n, m):
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
def test_whose_backward_pass_is_taken(made_by, keys, own, monkeypatch):
    monkeypatch.setattr(attention, "maker", lambda: made_by)
    q, k = (torch.randn(1, 1, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, keys))
    assert (type(attend(q, k, k).grad_fn).__name__ == "_BackwardInFloat32Backward") == own
