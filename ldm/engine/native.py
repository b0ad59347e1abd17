"""Attention of bfloat16 on a CPU with AVX512-BF16 and without AMX, by attention.c beside this file.

torch's own multiplies there at a quarter of the processor's rate. The C compiler of the system
builds it when it is first wanted, in a second or two; without one, torch's attends.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint.io import atomic_file
from ldm.engine.cache import default_cache, is_private, make_private
from ldm.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.c")
_FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno",
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma",
)  # fmt: skip
_LARGE = 2**25  # multiplications from which it pays to start threads

_Strides = ctypes.c_int64 * 3


class _Work(ctypes.Structure):
    """As `Work` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((f"{name}_strides", _Strides) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("pictures", "heads", "n", "m", "c")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int64),
    ]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, of queries `b heads n c` and keys and values `b heads m c`.

    It has no gradients.
    """
    fits = all(x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (q, k, v))
    large = q.numel() * k.shape[2] >= _LARGE
    if not (fits and large and q.shape[3] % 2 == 0 and (library := native())):
        return F.scaled_dot_product_attention(q, k, v)
    b, heads, n, c = q.shape
    out = q.new_empty(b, n, heads, c).transpose(1, 2)
    tensors = (q, k, v, out)
    work = _Work(
        *(x.data_ptr() for x in tensors),
        *(_Strides(*x.stride()[:3]) for x in tensors),
        *(b, heads, n, k.shape[2], c, c**-0.5, torch.get_num_threads()),
    )
    if library.attention(ctypes.byref(work)):
        raise MemoryError("no memory for the keys and values of attention")
    return out


@cache
def native() -> Any:
    """The library; None where the processor is another, or it cannot be built."""
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError, ConfigError) as error:
        said = getattr(error, "stderr", "") or error
        logger.info("attention by torch, two to three times as slow: %s", said)
        return None


def _build() -> Path:
    """The built library in the cache folder.

    Raises:
        OSError, SubprocessError, ConfigError: it cannot be built there.
    """
    folder = default_cache()
    make_private(folder)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise ConfigError("there is no C compiler; install one (apt install gcc)")
    parts = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), compiler.encode())
    file = folder / f"attention-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    if not (file.exists() and is_private(file)):
        with atomic_file(file) as temporary:
            command = [compiler, *_FLAGS, "-o", str(temporary), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return file
