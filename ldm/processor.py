"""What this CPU is good at."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@cache
def half_pays() -> bool:
    """Whether products of bfloat16 take less time on this CPU than those of float32.

    With AMX a seventh. Where there is AVX512-BF16 alone, the maker decides: on AMD's Zen 4 they
    take half the time, on a Xeon 1.7 times as long.
    """
    amx, wide = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return amx or (wide and maker() == "AuthenticAMD")


@cache
def maker() -> str:
    """Who has made this CPU, by the name that CPUID gives on x86."""
    return cpuinfo("vendor_id") or platform.processor().rpartition(" ")[2]  # Windows' last word


def cpuinfo(*names: str) -> str:
    """What Linux says of the CPU under the first of these names; empty where it does not."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith(names)), "")
