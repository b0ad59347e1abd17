"""Attention and group normalisation of bfloat16 in C, on a CPU with AVX512-BF16.

torch's attention multiplies there at a quarter of the processor's rate, where there is no AMX; its
normalisation goes through memory five times instead of twice. The C compiler of the system builds
both when they are first wanted, in two or three seconds; without one, torch's do it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.io import atomic_file
from ldm.engine.cache import default_cache, is_private, make_private
from ldm.errors import ConfigError

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_LOCK = Lock()
SOURCES = (_HERE / "attention.c", _HERE / "group_norm.c")
_FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno",
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma",
)  # fmt: skip
_LARGE = 2**18  # multiplications of all q k^T of a call, from which attention pays


class _Rows(ctypes.Structure):
    """As `Rows` in attention.c."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class _Work(ctypes.Structure):
    """As `Work` in attention.c."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pictures", "heads", "n", "m", "c")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int64),
    ]


class _Norm(ctypes.Structure):
    """As `Norm` in group_norm.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("pictures", "pixels", "channels", "groups")),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int),
        ("threads", ctypes.c_int64),
    ]


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, inplace: bool = False) -> Tensor:
    """`norm` of pictures `b c h w`, and SiLU; natively where they are bfloat16, channels last.

    With `inplace` the result may be written over `x`. It has no gradients.
    """
    if not _normalises(x, norm):
        out = norm(x)
        return F.silu(out, inplace=True) if silu else out
    b, c, h, w = x.shape
    out = x if inplace else torch.empty_like(x)
    pointers = (t.data_ptr() for t in (x, norm.weight, norm.bias, out))
    threads = torch.get_num_threads()
    work = _Norm(*pointers, b, h * w, c, norm.num_groups, norm.eps, silu, threads)
    if native().group_norm(ctypes.byref(work)):
        raise MemoryError("no memory for the sums of group normalisation")
    return out


def _normalises(x: Tensor, norm: nn.GroupNorm) -> bool:
    weight, bias, channels = norm.weight, norm.bias, x.shape[1]
    return (
        x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        and x.is_cpu
        and weight.is_cpu
        and bias.is_cpu
        and weight.shape == bias.shape == (channels,)
        and weight.is_contiguous()
        and bias.is_contiguous()
        and channels % 16 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and native() is not None
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, of queries `b heads n c` and keys and values `b heads m c`.

    By torch's where the native one does not fit or does not pay. It has no gradients.
    """
    if not fits(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    out = _like(q)
    _call("attention", q=q, k=k, v=v, out=out)
    return out


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether native attention can take these, and they are large enough for it to pay."""
    (b, heads, _, c), m = q.shape, k.shape[2]
    return (
        all(x.is_cpu and x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (q, k, v))
        and k.shape == v.shape == (b, heads, m, c)
        and q.numel() * m >= _LARGE
        and c % 2 == 0
        and not torch.cpu._is_amx_tile_supported()  # by which torch's is faster
        and native() is not None
    )


def attend_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` gives of tensors that fit, and what its gradients want besides, `b heads n`."""
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("attention", q=q, k=k, v=v, out=out, lse=lse)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of what `attend_forward` gave."""
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    dq, dk, dv = _like(q), _like(k), _like(v)
    tensors = {"q": q, "k": k, "v": v, "out": out, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
    _call("attention_backward", **tensors, lse=lse.contiguous())
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    """An empty tensor of the same shape `b heads n c`, whose heads lie beside each other."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _call(function: str, *, lse: Tensor | None = None, **tensors: Tensor) -> None:
    work = _Work(lse=lse.data_ptr() if lse is not None else None)
    for name, x in tensors.items():
        setattr(work, name, _Rows(x.data_ptr(), x.stride()[:3]))
    work.pictures, work.heads, work.n, work.c = tensors["q"].shape
    work.m, work.scale = tensors["k"].shape[2], work.c**-0.5
    work.threads = torch.get_num_threads()
    if getattr(native(), function)(ctypes.byref(work)):
        raise MemoryError("no memory for the keys and values of attention")


def native() -> Any:
    """The library; None where the processor is another, or it cannot be built."""
    with _LOCK:  # or threads would build it at once
        return _library()


@cache
def _library() -> Any:
    if sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError, ConfigError) as error:
        said = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            said = next((line for line in error.stderr.splitlines() if "error" in line), said)
        logger.warning("bfloat16 is slower here than it could be: %s", said)
        return None


def _build() -> Path:
    """The built library in the cache folder.

    Raises:
        OSError, RuntimeError, SubprocessError, ConfigError: it cannot be built there.
    """
    folder = default_cache()
    make_private(folder)
    name = os.environ.get("CC", "").strip() or "cc"
    try:
        compiler = shlex.split(name)
    except ValueError as error:
        raise ConfigError(f"CC={name}: {error}; set it to a C compiler") from None
    if shutil.which(compiler[0]) is None:
        raise ConfigError(
            f"there is no C compiler {name}; install one (apt install gcc), or set CC"
        )
    code = [file.read_bytes() for file in (*SOURCES, _HERE / "native.h")]
    parts = (*code, " ".join((*compiler, *_FLAGS)).encode())
    file = folder / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    if not (file.exists() and is_private(file)):
        with atomic_file(file) as temporary:
            command = [*compiler, *_FLAGS, "-o", str(temporary), *map(str, SOURCES), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return file
