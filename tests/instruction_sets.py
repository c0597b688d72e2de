"""The instruction sets that PyTorch, oneDNN and the compiled kernels can be held to, and which this processor has.

PyTorch believes `ATEN_CPU_CAPABILITY`, so that a level which the processor lacks ends the process with SIGILL; oneDNN
and the compiled kernels take a level as an upper bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import HANG_SECONDS

CPUINFO = Path("/proc/cpuinfo")
AVX2 = ("avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
VNNI = (*AVX512, "avx512_vnni")
BF16 = (*VNNI, "avx512_bf16")
AMX = (*BF16, "amx_tile", "amx_int8", "amx_bf16")
# (variable, value) -> the flags of Linux's cpuinfo without which it is not run.
LEVELS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("ATEN_CPU_CAPABILITY", "default"): (),
    ("ATEN_CPU_CAPABILITY", "avx2"): AVX2,
    ("ATEN_CPU_CAPABILITY", "avx512"): AVX512,
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): AVX2,
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): AVX512,
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"): BF16,
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"): AMX,
}


def processor_flags() -> frozenset[str]:
    """The flags of the first processor in Linux's cpuinfo; none where it cannot be read."""
    if not CPUINFO.exists():
        return frozenset()
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return frozenset(next((value for key, _, value in lines if key.strip() == "flags"), "").split())


def why_not(variable: str, value: str, flags: frozenset[str] | None = None) -> str | None:
    """Why this processor (or one with `flags`) cannot run a level, or None."""
    present = processor_flags() if flags is None else flags
    missing = [flag for flag in LEVELS[variable, value] if flag not in present]
    return f"{variable}={value}: this processor has no {', '.join(missing)}" if missing else None


def levels(*variables: str) -> list[Any]:
    """Parameters (variable, value) for `pytest.mark.parametrize`; those that the processor lacks are skipped."""
    found = []
    for variable, value in LEVELS:
        if variable in variables:
            reason = why_not(variable, value)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            found.append(pytest.param(variable, value, id=f"{variable}={value}", marks=marks))
    return found


def run_tests(variable: str, value: str, files: list[Path], keyword: str) -> None:
    """Run the tests of `files` that `keyword` selects in a process under a level; all must pass, one at least."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), "-k", keyword]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=os.environ | {variable: value, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout, done.stdout
