"""What stands between the products of a network on a GPU, each as one kernel in Triton.

torch's own group normalisation copies channels-last features to another layout and back, and a
bias, an activation, a gate or a residual is a kernel of its own. All of that takes as long as the
products themselves.

Shapes: b pictures, c channels, h w height and width, n rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_jit: Any = triton.jit  # whose arguments have other types where it is called than inside
_TILE = 4096  # numbers that a program holds at a time
# Numbers of a group from which one program keeps the rest of the GPU waiting, and several share it.
_LARGE = 2**14
_CHUNKS = 256  # of rows, into which a large map is divided, if each has
_FEWEST = 32  # rows or more


def group_norm(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """A group normalisation of `x + bias + shift`, and SiLU of it, in float32 inside.

    Args:
        x: `b c h w`, read as channels-last.
        norm: its groups and weights.
        silu: whether SiLU follows.
        bias: none, or `c`.
        shift: none, or rows of `c` that repeat over the pictures, their last dimension contiguous.

    Returns:
        `b c h w`, channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    b, c, n = *x.shape[:2], x.shape[2] * x.shape[3]
    size = c // norm.num_groups
    # what is missing is not read
    added = (x if bias is None else bias, x if shift is None else shift)
    places: Any = (1, 0) if shift is None else (len(shift), shift.stride(0))
    given = {"BIASED": bias is not None, "SHIFTED": shift is not None}
    weights = (norm.weight, norm.bias)
    if n * size <= _LARGE:
        width = triton.next_power_of_2(size)
        tile = {"WIDTH": width, "ROWS": min(_TILE // width, triton.next_power_of_2(n))}
        _normalise[b, norm.num_groups](
            *(x, out, *added, *weights, n, c, size, *places, norm.eps),
            **(given | tile), SILU=silu, num_warps=8,
        )  # fmt: skip
        return out
    chunk = max(_FEWEST, triton.next_power_of_2(triton.cdiv(n, _CHUNKS)))
    chunks, width = triton.cdiv(n, chunk), min(128, triton.next_power_of_2(c))
    columns, tile = triton.cdiv(c, width), {"WIDTH": width, "ROWS": min(_TILE // width, chunk)}
    tile["CHUNK"] = chunk
    sums = x.new_empty(b, 2, chunks, c, dtype=torch.float32)
    _sum_up[b, chunks, columns](x, sums, *added, n, c, *places, **(given | tile))
    factors = x.new_empty(b, 2, c, dtype=torch.float32)
    _factors[b, norm.num_groups](
        *(sums, factors, *added, *weights, n, c, size, chunks, *places, norm.eps),
        **given, WIDTH=triton.next_power_of_2(size),
    )  # fmt: skip
    _apply[b, chunks, columns](x, out, factors, n, c, **tile, SILU=silu)
    return out


def added(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """`x + bias + other` of features `b c h w`, in the place of x if that is channels-last."""
    x, other = (each.contiguous(memory_format=torch.channels_last) for each in (x, other))
    n, c = x.numel() // len(bias), len(bias)
    width = min(128, triton.next_power_of_2(c))
    grid = (triton.cdiv(n, _TILE // width), triton.cdiv(c, width))
    _add[grid](x, bias, other, n, c, WIDTH=width, ROWS=_TILE // width)
    return x


def gated(rows: Tensor) -> Tensor:
    """Rows `... 2c`, the first half times GELU of the second: `... c`."""
    c = rows.shape[-1] // 2
    out = rows.new_empty(*rows.shape[:-1], c)
    block = min(1024, triton.next_power_of_2(c))
    _gate[out.numel() // c, triton.cdiv(c, block)](rows, out, c, BLOCK=block)
    return out


@_jit
def _tile(
    x, bias, shift, begin, row, cols, inside, n, c, BIASED: tl.constexpr, SHIFTED: tl.constexpr
):
    """Numbers of a picture with what is added, 0 outside; where they are, and which are inside."""
    inside = (row[:, None] < n) & inside[None, :]
    at = begin + row[:, None].to(tl.int64) * c + cols[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if BIASED:
        v += tl.load(bias + cols, cols < c, 0.0).to(tl.float32)[None, :]
    if SHIFTED:
        v += tl.load(shift + cols, cols < c, 0.0).to(tl.float32)[None, :]
    return tl.where(inside, v, 0.0), at, inside


@_jit
def _silu(y):
    return y / (1 + tl.exp(-y))


@_jit
def _normalise(
    x, out, bias, shift, weight, beta, n, c, size, shifts, stride, eps,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One group of one picture."""
    picture = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, WIDTH)
    cols, mine = tl.program_id(1) * size + col, col < size
    shift += picture % shifts * stride
    begin = picture * n * c
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        v, _, _ = _tile(x, bias, shift, begin, row, cols, mine, n, c, BIASED, SHIFTED)
        total += v
    mean = tl.sum(tl.sum(total, 1), 0) / (n * size)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        v, _, inside = _tile(x, bias, shift, begin, row, cols, mine, n, c, BIASED, SHIFTED)
        v = tl.where(inside, v - mean, 0.0)
        total += v * v
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / (n * size) + eps)
    scale = tl.load(weight + cols, mine, 0.0).to(tl.float32) * rstd
    offset = tl.load(beta + cols, mine, 0.0).to(tl.float32) - mean * scale
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        v, at, inside = _tile(x, bias, shift, begin, row, cols, mine, n, c, BIASED, SHIFTED)
        y = v * scale[None, :] + offset[None, :]
        if SILU:
            y = _silu(y)
        tl.store(out + at, y.to(out.dtype.element_ty), inside)


@_jit
def _sum_up(
    x, sums, bias, shift, n, c, shifts, stride,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of the numbers of some rows, and of their squares, channel by channel."""
    picture, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    total, squares = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    shift += picture % shifts * stride
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        begin = picture * n * c
        v, _, _ = _tile(x, bias, shift, begin, row, cols, cols < c, n, c, BIASED, SHIFTED)
        total += v
        squares += v * v
    place = sums + (picture * 2 * tl.num_programs(1) + chunk) * c + cols
    tl.store(place, tl.sum(total, 0), cols < c)
    tl.store(place + tl.num_programs(1) * c, tl.sum(squares, 0), cols < c)


@_jit
def _factors(
    sums, factors, bias, shift, weight, beta, n, c, size, chunks, shifts, stride, eps,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a group's normalisation comes to, `x * scale + offset`, from the sums."""
    picture = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, WIDTH)
    cols, mine = tl.program_id(1) * size + col, col < size
    shift += picture % shifts * stride
    total, squares = tl.zeros([64, WIDTH], tl.float64), tl.zeros([64, WIDTH], tl.float64)
    for start in range(0, chunks, 64):
        chunk = start + tl.arange(0, 64)
        inside = (chunk[:, None] < chunks) & mine[None, :]
        place = sums + (picture * 2 * chunks + chunk[:, None]) * c + cols[None, :]
        total += tl.load(place, inside, 0.0)
        squares += tl.load(place + chunks * c, inside, 0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / (n * size)
    var = tl.maximum(tl.sum(tl.sum(squares, 1), 0) / (n * size) - mean * mean, 0.0)
    rstd = 1 / tl.sqrt(var + eps)
    scale = tl.load(weight + cols, mine, 0.0).to(tl.float64) * rstd
    offset = tl.load(beta + cols, mine, 0.0).to(tl.float64) - mean * scale
    if BIASED:
        offset += tl.load(bias + cols, mine, 0.0).to(tl.float64) * scale
    if SHIFTED:
        offset += tl.load(shift + cols, mine, 0.0).to(tl.float64) * scale
    tl.store(factors + picture * 2 * c + cols, scale.to(tl.float32), mine)
    tl.store(factors + picture * 2 * c + c + cols, offset.to(tl.float32), mine)


@_jit
def _apply(
    x, out, factors, n, c,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """`x * scale + offset` of some rows, and SiLU."""
    picture, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    scale = tl.load(factors + picture * 2 * c + cols, cols < c, 0.0)
    offset = tl.load(factors + picture * 2 * c + c + cols, cols < c, 0.0)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        inside = (row[:, None] < n) & (cols[None, :] < c)
        place = picture * n * c + row[:, None].to(tl.int64) * c + cols[None, :]
        v = tl.load(x + place, inside, 0.0).to(tl.float32)
        y = v * scale[None, :] + offset[None, :]
        if SILU:
            y = _silu(y)
        tl.store(out + place, y.to(out.dtype.element_ty), inside)


@_jit
def _add(x, bias, other, n, c, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at, inside = row[:, None] * c + cols[None, :], (row[:, None] < n) & (cols[None, :] < c)
    v = tl.load(x + at, inside).to(tl.float32) + tl.load(other + at, inside).to(tl.float32)
    v += tl.load(bias + cols, cols < c).to(tl.float32)[None, :]
    tl.store(x + at, v.to(x.dtype.element_ty), inside)


@_jit
def _gate(rows, out, c, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + row * 2 * c + cols, cols < c).to(tl.float32)
    gate = tl.load(rows + row * 2 * c + c + cols, cols < c).to(tl.float32)
    y = value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * c + cols, y.to(out.dtype.element_ty), cols < c)
