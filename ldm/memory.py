"""What the C library and the kernel do with large blocks of memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor


@cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # on Windows
        return None


@cache
def keep_large_blocks(size: int = 2**26) -> None:
    """Have the C library keep freed blocks of less than `size` bytes for their next use, for good.

    Activations of many megabytes come and go with every layer; by default the kernel maps and
    clears each anew, page by page.
    """
    if mallopt := getattr(_libc(), "mallopt", None):  # of glibc
        m_trim_threshold, m_mmap_threshold = -1, -3
        if not mallopt(m_mmap_threshold, size):
            mallopt(m_mmap_threshold, 2**25)  # an old glibc takes no more
        mallopt(m_trim_threshold, 2**31 - 1)


def free_blocks() -> None:
    """Give the kernel what the C library keeps, for work whose blocks are of other sizes."""
    if trim := getattr(_libc(), "malloc_trim", None):
        trim(0)


def drop_pages(tensor: Tensor) -> None:
    """Take out of memory what nobody reads again; the tensor's numbers are lost.

    Weights are mapped from a file, whose pages stay while any tensor of the file lives.
    """
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def put_aside(tensor: Tensor) -> None:
    """Have the kernel take out of memory what it reads from its file again, should anybody ask."""
    _advise(tensor, 21 if sys.platform == "linux" else None)  # MADV_PAGEOUT


def _advise(tensor: Tensor, advice: int | None) -> None:
    madvise = getattr(_libc(), "madvise", None) if tensor.device.type == "cpu" else None
    if madvise and advice is not None:
        page = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // page) * page  # only whole pages, which are all its own
        end = (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > begin:
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
