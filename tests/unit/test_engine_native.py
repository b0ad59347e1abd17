"""Attention and group normalisation in C against torch's, both against float64."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from ldm.engine import native


@pytest.fixture
def library(monkeypatch):
    if native.native() is None:
        pytest.skip("needs AVX512-BF16 and a C compiler")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(native, "_LARGE", 0)


@pytest.fixture
def anew():
    """The library is looked for once."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def rows(b, n, heads, c, *, scale=1.0):
    """A part of wider rows, as of a product for several layers: b heads n c."""
    wider = scale * torch.randn(b, n, 3, heads, c)
    return wider.bfloat16()[:, :, 1].transpose(1, 2)


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def gradients(attend, pull, *qkv):
    inputs = [x.detach().requires_grad_() for x in qkv]
    return torch.autograd.grad(attend(*inputs), inputs, pull.to(qkv[0]))


SHAPES = [
    (2, 8, 1024, 1024, 40), (2, 3, 200, 77, 80), (1, 1, 96, 96, 512), (2, 2, 50, 33, 10),
    (1, 2, 1, 1, 2), (3, 1, 49, 513, 64), (1, 4, 7, 1000, 160),
]  # fmt: skip


@pytest.mark.parametrize("b, heads, n, m, c", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0], ids=["flat", "usual", "peaked"])
def test_it_is_as_near_to_the_truth_as_torch_s(library, b, heads, n, m, c, scale):
    torch.manual_seed(0)
    q, k, v = rows(b, n, heads, c, scale=scale), rows(b, m, heads, c), rows(b, m, heads, c)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = native.attend(q, k, v)
    assert found.shape == exact.shape
    theirs = distance(F.scaled_dot_product_attention(q, k, v), exact)
    assert distance(found, exact) < 1.05 * theirs + 1e-3


@pytest.mark.parametrize("b, heads, n, m, c", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0], ids=["flat", "usual", "peaked"])
def test_its_gradients_are_as_near_to_the_truth_as_torch_s(library, b, heads, n, m, c, scale):
    torch.manual_seed(0)
    q, k, v = rows(b, n, heads, c, scale=scale), rows(b, m, heads, c), rows(b, m, heads, c)
    pull = rows(b, n, heads, c)
    torchs = F.scaled_dot_product_attention
    exact = gradients(torchs, pull, *(x.double() for x in (q, k, v)))
    theirs = gradients(torchs, pull, q, k, v)
    out, lse = native.attend_forward(q, k, v)
    assert torch.equal(out, native.attend(q, k, v))
    ours = native.attend_backward(pull, q, k, v, out, lse)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.shape == true.shape
        if m == 1:  # one key has all of the weight, whatever it is
            assert (mine.double() - true).abs().max() < 4e-3 * pull.abs().max()
        else:
            assert distance(mine, true) < 1.05 * distance(other, true) + 1e-3


def test_gradients_of_any_layout_and_number_of_threads(library):
    torch.manual_seed(0)
    q, k, v = rows(2, 300, 3, 40), rows(2, 77, 3, 40), rows(2, 77, 3, 40)
    out, lse = native.attend_forward(q, k, v)
    pull = torch.randn(2, 3, 300, 40).bfloat16()
    before, together = torch.get_num_threads(), native.attend_backward(pull, q, k, v, out, lse)
    try:
        for threads in (1, 5, 20):
            torch.set_num_threads(threads)
            again = native.attend_backward(pull, q, k, v, out, lse)
            assert all(map(torch.equal, again, together))
    finally:
        torch.set_num_threads(before)
    columns = pull.transpose(2, 3).contiguous().transpose(2, 3)
    one, number = pull[:, :1].expand_as(q), torch.ones((), dtype=torch.bfloat16).expand_as(q)
    for given in (rows(2, 300, 3, 40), columns, one, number):
        plain = native.attend_backward(given.contiguous(), q, k, v, out, lse)
        assert all(map(torch.equal, native.attend_backward(given, q, k, v, out, lse), plain))
    parts = [x[1:, 2:] for x in (pull, q, k, v, out, lse)]
    alone = native.attend_backward(*parts)
    assert all(torch.equal(a, b[1:, 2:]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("other", ["one head for all", "values of another width"])
def test_what_only_torch_s_takes_is_torch_s(library, other):
    q, k, v = rows(2, 9, 2, 16), rows(2, 5, 2, 16), rows(2, 5, 2, 16)
    if other == "one head for all":
        k, v = k[:, :1], v[:, :1]
    else:
        v = v[..., :8]
    assert torch.equal(native.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_threads_share_it_out_and_change_nothing(library):
    torch.manual_seed(0)
    q, k, v = rows(2, 300, 3, 40), rows(2, 77, 3, 40), rows(2, 77, 3, 40)
    together, before = native.attend(q, k, v), torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            assert torch.equal(native.attend(q, k, v), together)
    finally:
        torch.set_num_threads(before)
    alone = native.attend(q[1:, 2:, 60:61], k[1:, 2:], v[1:, 2:])
    assert torch.equal(alone, together[1:, 2:, 60:61])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(library, value):
    q, k, v = rows(1, 64, 2, 16), rows(1, 40, 2, 16), rows(1, 40, 2, 16)
    for x, place in ((q, (0, 1, 5, 3)), (k, (0, 1, 7, 3)), (v, (0, 1, 7, 3))):
        changed = [x.clone() if x is each else each for each in (q, k, v)]
        [each for each, old in zip(changed, (q, k, v), strict=True) if old is x][0][place] = value
        ours = native.attend(*changed).isfinite()
        theirs = F.scaled_dot_product_attention(*(each.float() for each in changed)).isfinite()
        assert torch.equal(ours, theirs)
        assert not ours.all()


def test_other_dtypes_are_torch_s(library):
    q, k, v = (rows(1, 9, 2, 16).half() for _ in range(3))
    assert torch.equal(native.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_where_torch_multiplies_by_tiles_it_attends(library, monkeypatch):
    qkv = [rows(1, 64, 2, 16) for _ in range(3)]
    assert native.fits(*qkv)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not native.fits(*qkv)
    x, norm = picture(1, 64, 8, 8), normalisation(8, 64)
    assert native._normalises(x, norm)


def test_what_is_too_small_to_pay_torch_attends(library, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    small, large = ([rows(1, n, 2, 16) for _ in range(3)] for n in (90, 91))
    assert not native.fits(*small)
    assert native.fits(*large)


def picture(b, c, h, w, *, mean=0.5):
    x = torch.randn(b, c, h, w) * torch.rand(c, 1, 1) + mean
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def normalisation(groups, channels):
    norm = torch.nn.GroupNorm(groups, channels).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.normal_()
    return norm.bfloat16()


def group_norm(x, norm, silu, dtype):
    out = F.group_norm(
        x.to(dtype), norm.num_groups, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
    )
    return F.silu(out) if silu else out


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "groups, size",
    [
        (32, (2, 320, 64, 64)), (16, (3, 64, 7, 5)), (8, (1, 32, 1, 1)), (4, (2, 96, 33, 2)),
        (1, (1, 32, 9, 9)), (8, (2, 48, 40, 30)), (2, (1, 16, 25, 25)), (32, (1, 128, 256, 256)),
    ],
)  # fmt: skip
def test_normalisation_is_exact_but_for_one_rounding(library, groups, size, silu):
    torch.manual_seed(0)
    x, norm = picture(*size), normalisation(groups, size[1])
    exact, theirs = (group_norm(x, norm, silu, d) for d in (torch.float64, torch.bfloat16))
    found = native.group_norm(x, norm, silu=silu)
    assert found.shape == x.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-4)
    if silu:  # which torch rounds twice
        assert distance(found, exact) < 0.8 * distance(theirs, exact)


def test_normalisation_of_numbers_far_from_zero(library):
    torch.manual_seed(0)
    x, norm = picture(2, 64, 32, 32, mean=100.0), normalisation(8, 64)
    exact = group_norm(x, norm, False, torch.float64)
    assert torch.allclose(
        native.group_norm(x, norm, silu=False).double(), exact, rtol=2**-8, atol=2e-3
    )
    flat = torch.full_like(x, 3.0)  # no variance: the bias is left
    found = native.group_norm(flat, norm, silu=False)
    assert torch.allclose(found, norm.bias.view(1, 64, 1, 1).expand_as(found), atol=1e-2)


def test_threads_and_company_change_nothing_in_normalisation(library):
    torch.manual_seed(0)
    x, norm = picture(3, 64, 40, 40), normalisation(8, 64)
    together, before = native.group_norm(x, norm, silu=True), torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            assert torch.equal(native.group_norm(x, norm, silu=True), together)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(native.group_norm(x[1:2], norm, silu=True), together[1:2])


@pytest.mark.parametrize("silu", [False, True])
def test_normalisation_in_its_place(library, silu):
    torch.manual_seed(0)
    x, norm = picture(2, 64, 40, 40), normalisation(8, 64)
    before, expected = x.clone(), native.group_norm(x, norm, silu=silu)
    assert torch.equal(x, before)
    found = native.group_norm(x, norm, silu=silu, inplace=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_group(library, value):
    x, norm = picture(2, 64, 6, 6), normalisation(8, 64)
    x[1, 17, 3, 3] = value
    finite = native.group_norm(x, norm, silu=True).isfinite()
    assert not finite[1, 16:24].any()
    assert finite[0].all() and finite[1, :16].all() and finite[1, 24:].all()


@pytest.mark.parametrize("what", ["float32", "another layout", "40 channels", "a part of wider"])
def test_what_it_does_not_normalise_torch_does(library, what):
    channels = 40 if what == "40 channels" else 64
    x, norm = picture(2, channels, 6, 6), normalisation(8, channels)
    if what == "float32":
        x, norm = x.float(), norm.float()
    elif what == "another layout":
        x = x.contiguous()
    elif what == "a part of wider":
        x = picture(2, 128, 6, 6)[:, :64]
    assert torch.equal(native.group_norm(x, norm, silu=True), F.silu(norm(x)))


@pytest.mark.parametrize("what", ["a bias of float32", "every second weight"])
def test_other_weights_are_torch_s(library, what):
    x, norm = picture(2, 64, 6, 6), normalisation(8, 64)
    if what == "a bias of float32":
        norm.bias.data = norm.bias.float()
    else:
        norm.weight.data = normalisation(8, 128).weight[::2]
    assert not native._normalises(x, norm)


def test_threads_build_it_once(anew, tmp_path, monkeypatch):
    if native.native() is None:
        pytest.skip("needs AVX512-BF16 and a C compiler")
    native._library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(lambda _: native.native(), range(4))
    assert first is not None and all(other is first for other in others)
    assert len(list((tmp_path / "ldm" / "compiled").iterdir())) == 1


@pytest.mark.parametrize(
    "without",
    [
        "a compiler", "a compiler that works", "the other quote", "time", "a folder of one's own",
        "the processor",
    ],
)  # fmt: skip
def test_without_it_torch_does_it(without, anew, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: without != "the processor")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_LARGE", 0)
    if without == "a compiler":
        monkeypatch.setenv("CC", "no-such-compiler -v")
    elif without == "a compiler that works":
        monkeypatch.setenv("CC", "cc -fno-such-option")
    elif without == "the other quote":
        monkeypatch.setenv("CC", "'cc")
    elif without == "time":
        slow = tmp_path / "slow"
        slow.write_text("#!/bin/sh\necho an error >&2\nexec sleep 60\n")
        slow.chmod(0o755)
        run = native.subprocess.run
        monkeypatch.setattr(
            native.subprocess,
            "run",
            lambda *args, **options: run(*args, **options | {"timeout": 1}),
        )
        monkeypatch.setenv("CC", str(slow))
    elif without == "a folder of one's own":
        (tmp_path / "ldm" / "compiled").mkdir(parents=True)
        (tmp_path / "ldm" / "compiled").chmod(0o777)
    q, k, v = (rows(1, 9, 2, 16) for _ in range(3))
    x, norm = picture(2, 64, 6, 6), normalisation(8, 64)
    with caplog.at_level(logging.WARNING):
        attended, normalised = native.attend(q, k, v), native.group_norm(x, norm, silu=True)
    assert torch.equal(attended, F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(normalised, F.silu(norm(x)))
    words = {
        "a compiler": "there is no C compiler no-such-compiler -v",
        "a compiler that works": "-fno-such-option",
        "the other quote": "No closing quotation",
        "time": "timed out",
        "a folder of one's own": "others can write there",
    }
    assert words.get(without, "") in caplog.text
    assert without != "the processor" or not caplog.text
