"""``python -m benchmarks.aot``: compile every Triton kernel for every shipped configuration, without a GPU.

Registers, spills, shared memory and the width of the accesses of each, for sm_80, 90, 100 and 120, as a CSV table. The
committed one is `benchmarks/data/triton_registers.csv`; `tests/test_triton_aot.py` holds the code to it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_kernels.divergence.rows_triton import Configuration

CAPABILITIES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a program may use
TABLE = Path(__file__).resolve().parent / "data" / "triton_registers.csv"
SOURCE = "# sources: "

# Modes that between them compile every line: which weights, and alpha (JSD), target, keep, clip, softcap.
AFFINE = {
    "forward_kl": {"weights": "f"},
    "reverse_kl": {"weights": "r"},
    "jsd": {"weights": "j", "alpha": True},
    "everything": {"weights": "frjlh", "alpha": True, "target": True, "keep": True, "clip": True, "capped": True},
    "forward_kl_no_grad": {"weights": "f", "gradient": None},
}
STATS = {"stats": {}, "stats_everything": {"alpha": True, "target": True, "keep": True, "capped": True}}
PARTIAL = {"everything": {"target": True, "keep": True, "capped": True}}
MIXTURE = {"everything": {"alpha": True, "keep": True, "capped": True}}
GRAD = {
    "forward_kl": {"weights": "f"},
    "everything": {"weights": "frjlh", "alpha": True, "target": True, "keep": True, "capped": True},
}
GRADIENTS = {"fp32": "*fp32", "bf16": "*bf16"}


@dataclass(frozen=True)
class Compiled:
    """One row of the table."""

    kernel: str
    mode: str
    gradient: str
    block: int
    num_warps: int
    max_registers: int
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


@dataclass(frozen=True)
class Job:
    kernel: str
    mode: str
    gradient: str
    configuration: Configuration
    capability: int
    given: tuple[tuple[str, Any], ...]


def jobs() -> Iterator[Job]:
    """Every kernel x mode x gradient dtype x shipped configuration x capability."""
    modes = [("affine_kernel", m, g) for m, o in AFFINE.items() for g in (GRADIENTS if o.get("gradient", 1) else "-")]
    modes += [("stats_kernel", m, "-") for m in STATS]
    modes += [("grad_kernel", m, g) for m in GRAD for g in GRADIENTS]
    modes += [("partial_kernel", m, "-") for m in PARTIAL] + [("mixture_kernel", m, "-") for m in MIXTURE]
    given = {
        "affine_kernel": AFFINE, "stats_kernel": STATS, "grad_kernel": GRAD, "partial_kernel": PARTIAL,
        "mixture_kernel": MIXTURE,
    }  # fmt: skip
    for kernel, mode, gradient in modes:
        for capability in CAPABILITIES:
            for configuration in lines(capability):
                options = tuple(given[kernel][mode].items())
                yield Job(kernel, mode, gradient, configuration, capability, options)


def lines(capability: int) -> tuple[Configuration, ...]:
    """The shipped launch parameters that a device of this capability can get."""
    from sdft_kernels.divergence.rows_triton import choose, configurations

    limits = [line.max_vocabulary or 2**31 for table in configurations().values() for line in table]
    return tuple(dict.fromkeys(choose(limit, capability) for limit in sorted(limits)))


def compile_job(job: Job) -> Compiled:
    """Compile one kernel and read what ptxas and the SASS say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdft_kernels.divergence import kernels_triton

    function = getattr(kernels_triton, job.kernel)
    signature, constants = _signature(function.arg_names, job)
    divisible = [["tt.divisibility", 16]]
    known = {"student", "teacher", "gradient", "stride", "gradient_stride"}
    attributes = {
        (i,): divisible for i, name in enumerate(function.arg_names) if name in known and signature[name] != "constexpr"
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", job.capability, 32)
    c = job.configuration
    compiled = triton.compile(source, target=target, options={"num_warps": c.num_warps, "maxnreg": c.max_registers})
    registers, spilled = _ptxas(compiled.asm["ptx"], job.capability)
    return Compiled(
        job.kernel, job.mode, job.gradient, c.block, c.num_warps, c.max_registers, job.capability,
        registers, spilled, compiled.metadata.shared, *_accesses(compiled.asm["cubin"]),
    )  # fmt: skip


def _signature(names: list[str], job: Job) -> tuple[dict[str, str], dict[str, Any]]:
    given = dict(job.given)
    types = {"target": "*i64", "keep": "*u8", "alpha": "fp32", "clip": "fp32"}
    optional = {"target": "target", "keep": "keep", "alpha": "alpha", "clip": "clip", "old_logprob": "clip"}
    constants: dict[str, Any] = {}
    absent = {"gradient"} if given.get("gradient", 1) is None else set()
    absent |= {name for name, option in optional.items() if not given.get(option)}
    absent |= {name for name in names if name.startswith("w_") and name[2] not in given.get("weights", "")}
    for name in names:
        if name in absent:
            constants[name] = None
        elif name.startswith("CAPPED"):
            constants[name] = bool(given.get("capped"))
    constants["BLOCK"] = job.configuration.block
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name == "gradient":
            signature[name] = GRADIENTS[job.gradient]
        elif name in ("count", "vocabulary", "stride", "gradient_stride"):
            signature[name] = "i32"
        elif name.startswith(("inner", "outer", "slope")):
            signature[name] = "fp32"
        else:
            signature[name] = "*fp32"
    return signature, constants


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled."""
    blackwell = Path(_tool("ptxas-blackwell"))
    tool = str(blackwell) if capability >= 100 and blackwell.exists() else _tool("ptxas")
    target = re.search(r"^\.target (\S+?),?$", ptx, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        name = target.group(1).split(",")[0] if target else f"sm_{capability}"
        command = [tool, "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


def _accesses(cubin: bytes) -> tuple[int, int, int, int]:
    """How many global loads and stores move 16 bytes a thread, and how many move less: (wide, narrow) of each.

    The narrow ones are a token's own: its weights, target, numbers.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True)
    counts = []
    for op in ("LDG", "STG"):
        instructions = re.findall(rf"\b{op}\.\S+", said.stdout)
        wide = sum(".128" in instruction for instruction in instructions)
        counts += [wide, len(instructions) - wide]
    return tuple(counts)  # type: ignore[return-value]


def source_hash() -> str:
    """Of what decides the compiled code."""
    from sdft_kernels import _triton_math
    from sdft_kernels.divergence import kernels_triton, rows_triton

    files = [Path(_triton_math.__file__), Path(kernels_triton.__file__), rows_triton.CONFIGURATIONS, Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def read_table(path: Path = TABLE) -> tuple[str, list[dict[str, str]]]:
    """The hash that a table was made from, and its rows."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    return head.removeprefix(SOURCE), list(csv.DictReader(lines))


def table(workers: int, modes: Sequence[str] | None, capabilities: Sequence[int]) -> list[Compiled]:
    """Compile everything, or only these modes and capabilities, with a progress bar."""
    from tqdm import tqdm

    todo = [job for job in jobs() if (modes is None or job.mode in modes) and job.capability in capabilities]
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(compile_job, todo), total=len(todo), unit="kernel", disable=None))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE, help="CSV to write (default: the committed table)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--modes", nargs="+", help="only these modes (default: all)")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: unset TRITON_INTERPRET: interpreted kernels have nothing to compile", file=sys.stderr)
        return 2
    rows = table(args.workers, args.modes, args.capabilities)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        file.write(f"{SOURCE}{source_hash()}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Compiled)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} kernels, {sum(r.spill_bytes > 0 for r in rows)} spill; written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
