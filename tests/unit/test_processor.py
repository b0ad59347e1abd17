"""Which CPUs draw in bfloat16 unless told otherwise."""

import shutil
import subprocess

import pytest
import torch

from ldm import processor
from ldm.processor import half_pays, maker


@pytest.mark.parametrize(
    "amx, wide, made_by, pays",
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),
        (False, True, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
        (False, False, "", False),
    ],
)
def test_half_precision_pays_where_it_was_measured(amx, wide, made_by, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: wide)
    monkeypatch.setattr(processor, "maker", lambda: made_by)
    assert half_pays.__wrapped__() is pays


@pytest.mark.parametrize(
    "info, name, expected",
    [
        ("processor : 0\nvendor_id\t: AuthenticAMD\n", "x86_64", "AuthenticAMD"),
        (None, "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", "AuthenticAMD"),
        (None, "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", "GenuineIntel"),
        ("processor : 0\nCPU implementer : 0x41\n", "aarch64", "aarch64"),
        (None, "", ""),
    ],
    ids=["Linux", "Windows AMD", "Windows Intel", "Arm", "macOS"],
)
def test_the_maker_is_found_where_the_system_tells_it(info, name, expected, monkeypatch, tmp_path):
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "processor", lambda: name)
    assert maker.__wrapped__() == expected


@pytest.mark.skipif(not shutil.which("lscpu"), reason="there is no lscpu to compare with")
def test_the_maker_is_the_one_that_lscpu_names():
    said = subprocess.run(["lscpu"], capture_output=True, text=True, env={"LC_ALL": "C"}).stdout
    if "AuthenticAMD" in said or "GenuineIntel" in said:
        assert f"Vendor ID: {maker()}" in " ".join(said.split())
