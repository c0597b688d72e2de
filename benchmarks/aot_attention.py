"""``python -m benchmarks.aot_attention``: compile every fused attention kernel as it is launched, without a GPU.

Registers, spills, shared memory and tensor-core instructions of each, for sm_80, 90, 100 and 120, as a CSV table. The
committed one is `benchmarks/data/attention_registers.csv`; `tests/test_attention_aot.py` holds the code to it.
Compiling goes through the launcher, with a driver that knows no device: what is compiled is what a GPU would be given.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import aot

TABLE = Path(__file__).resolve().parent / "data" / "attention_registers.csv"
SIZES = (64, 128, 256)
# Which options compile which lines: with a window every block is masked, without one most are not.
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"prefix": 64, "sinks": True, "softcap": 30.0},
    "window": {"prefix": 64, "sinks": True, "softcap": 30.0, "window": 100},
}
KERNELS = {"forward_kernel": "forward", "grad_query_kernel": "grad_query", "grad_key_value_kernel": "grad_key_value"}


@dataclass(frozen=True)
class Job:
    mode: str
    size: int
    capability: int


@dataclass(frozen=True)
class Compiled:
    """One row of the table; `tensor_core` is the instruction that multiplies tiles, "-" if none does."""

    kernel: str
    mode: str
    size: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str


def jobs() -> Iterator[Job]:
    """Every mode x head size x capability; each is a forward and a backward. In bf16, as `_dispatch` has it."""
    for mode in MODES:
        for size in SIZES:
            for capability in aot.CAPABILITIES:
                yield Job(mode, size, capability)


class _NoDevice:
    """What Triton asks its driver for before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def compile_job(job: Job) -> list[Compiled]:
    """Launch a forward and a backward with a launch that only compiles."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sdft_kernels.prefix_attention import PrefixTree, fused_triton
    from sdft_kernels.prefix_attention.call import Inputs, Options
    from sdft_kernels.prefix_attention.parts import Scoring

    found: list[Compiled] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = getattr(self, "__name__", "")
        if name in KERNELS:
            configuration = fused_triton.choose(KERNELS[name], job.size, job.capability)
            found.append(_measure(kernel, name, job, configuration))
        return kernel

    options = MODES[job.mode]
    query = torch.zeros(256, 8, job.size, dtype=torch.bfloat16)
    key = query[:, :2].contiguous()
    cached = key[: options["prefix"]].clone() if "prefix" in options else None
    inputs = Inputs(query, key, key.clone(), torch.zeros(8) if "sinks" in options else None, cached, cached)
    scoring = Scoring(job.size**-0.5, options.get("softcap"))
    given = Options(PrefixTree([128, 64, 64], [-1, 0, 0]), scoring, options.get("window"))
    driver.set_active(_NoDevice(job.capability))
    for name in (*KERNELS, "delta_kernel"):
        # Triton remembers the target of a device: without this, the kernel of the process's last job comes back.
        getattr(fused_triton, name).device_caches.clear()
    JITFunction.run = warm_up
    fused_triton._capability = lambda device: job.capability
    try:
        out, lse = fused_triton.forward(inputs, given)
        fused_triton.backward(inputs, given, out, lse, out, None)
    finally:
        JITFunction.run = run
    return found


def _measure(kernel: Any, name: str, job: Job, configuration: Any) -> Compiled:
    assert kernel.metadata.target.arch == job.capability, kernel.metadata.target
    registers, spilled = aot._ptxas(kernel.asm["ptx"], job.capability)
    return Compiled(
        name, job.mode, job.size, *configuration[1:], job.capability, registers, spilled,
        kernel.metadata.shared, _tensor_core(kernel.asm["cubin"]),
    )  # fmt: skip


def _tensor_core(cubin: bytes) -> str:
    """The matrix instruction in the SASS: HGMMA is wgmma (sm_90), UTC*MMA tcgen05 (sm_100), HMMA mma.sync."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [aot._tool("cuobjdump"), "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = sorted(set(re.findall(r"\b(HGMMA|UTC[A-Z]*MMA|HMMA)\b", said)))
    return "+".join(found) or "-"


def source_hash() -> str:
    """Of what decides the compiled code."""
    from sdft_kernels import _triton_math
    from sdft_kernels.prefix_attention import fused_triton, kernels_triton, kernels_triton_backward

    modules = (_triton_math, kernels_triton, kernels_triton_backward, fused_triton)
    files = [Path(str(module.__file__)) for module in modules] + [fused_triton.CONFIGURATIONS, Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table(todo: Sequence[Job], workers: int) -> list[Compiled]:
    """Compile these, each in a process of a pool (the driver is the process's), with a progress bar."""
    from tqdm import tqdm

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        rows = list(tqdm(pool.imap(compile_job, todo), total=len(todo), unit="job", disable=None))
    return [row for found in rows for row in found]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_attention", description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE, help="CSV to write (default: the committed table)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=tuple(MODES))
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=aot.CAPABILITIES, default=aot.CAPABILITIES)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot_attention: unset TRITON_INTERPRET: interpreted kernels have nothing to compile", file=sys.stderr)
        return 2
    asked = (args.modes, args.sizes, args.capabilities)
    rows = table([job for job in jobs() if all(x in y for x, y in zip(_values(job), asked, strict=True))], args.workers)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        file.write(f"{aot.SOURCE}{source_hash()}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Compiled)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} kernels, {sum(r.spill_bytes > 0 for r in rows)} spill; written: {args.output}")
    return 0


def _values(job: Job) -> tuple[Any, ...]:
    return job.mode, job.size, job.capability


if __name__ == "__main__":
    sys.exit(main())
