"""``python -m benchmarks.logits_gemm``: the compiled CPU products beside the library's, in pairs, and beside the peak.

`logits`: fp32 logits from fp32 or bf16 operands; the library's product of bf16 rounds its results to bf16.
`few_logits`: the same without packing the weight, as linear layers run while rollouts are sampled.
`weight_grad`: dW from bf16 operands, in fp32 sums; the library's adds to a bf16 total. The peak is that of one core
multiplying and adding in registers (`_native.peak_flops`), measured beside each shape.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sdft_kernels import _native
from sdft_kernels._version import __version__
from sdft_kernels.cli._bench.report import commit, quantile
from sdft_kernels.cli._progress import Progress
from sdft_kernels.cli._table import print_table
from sdft_kernels.cli.env import cpu_model
from sdft_kernels.testing import relative_error

# N, H, V: a short chunk and a usual one of SmolLM2's head, Gemma 3's, Llama 2's at 1B, and one that is long in H.
SHAPES = ((16, 576, 49152), (256, 576, 49152), (128, 640, 262144), (256, 2048, 32768), (256, 4096, 16384))
FEW_SHAPES = ((1, 576, 49152), (8, 576, 49152), (16, 576, 49152))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_ROWS = 512  # of the vocabulary, whose errors are measured


@dataclass(frozen=True)
class Row:
    """One product at one shape. Times are medians, in ms, with their 20 and 80 % quantiles; errors in the 2-norm."""

    product: str
    dtype: str
    threads: int
    tokens: int
    hidden: int
    vocabulary: int
    ours_ms: float
    ours_ms_20: float
    ours_ms_80: float
    library_ms: float
    library_ms_20: float
    library_ms_80: float
    ours_over_library: float  # median over the pairs
    ours_gflops_per_core: float
    library_gflops_per_core: float
    peak_gflops_per_core: float
    ours_share_of_peak: float
    ours_error: float
    library_error: float
    repeats: int
    isa: str
    device: str
    torch_version: str
    version: str
    commit: str
    timestamp: str


@dataclass(frozen=True)
class Pair:
    """Both products of one kind, and the relative errors of their latest results."""

    ours: Callable[[], object]
    library: Callable[[], object]
    errors: Callable[[], tuple[float, float]]


def _operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, hidden, vocabulary = shape
    g = torch.Generator().manual_seed(0)
    state = torch.randn(tokens, hidden, generator=g).to(dtype)
    return state, (torch.randn(vocabulary, hidden, generator=g) / hidden**0.5).to(dtype)


def logits(shape: tuple[int, int, int], dtype: torch.dtype, few: bool = False) -> Pair:
    state, weight = _operands(shape, dtype)
    out = torch.empty(shape[0], shape[2])
    library = torch.empty(shape[0], shape[2], dtype=dtype)

    def errors() -> tuple[float, float]:
        exact = state.double() @ weight[-CHECKED_ROWS:].double().t()
        ours, theirs = (relative_error(t[:, -CHECKED_ROWS:], exact) for t in (out, library))
        return ours, theirs

    return Pair(
        lambda: _native.logits_gemm(state, weight, out, few=few),
        lambda: torch.mm(state, weight.t(), out=library),
        errors,
    )


def few_logits(shape: tuple[int, int, int], dtype: torch.dtype) -> Pair:
    return logits(shape, dtype, few=True)


def weight_grad(shape: tuple[int, int, int], dtype: torch.dtype) -> Pair:
    """The gradient lies as the row kernels leave it: bf16 in the first half of each row of an fp32 tile."""
    state, _ = _operands(shape, dtype)
    tile = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    grad = tile.view(dtype)[:, : shape[2]]
    grad.copy_(tile.clone())
    total, library = torch.zeros(shape[2], shape[1]), torch.zeros(shape[2], shape[1], dtype=dtype)

    def errors() -> tuple[float, float]:
        exact = grad[:, -CHECKED_ROWS:].double().t() @ state.double()
        found = []
        for sums, add in ((total, _native.weight_grad_gemm), (library, lambda g, h, t: t.addmm_(g.t(), h))):
            sums.zero_()
            add(grad, state, sums)
            found.append(relative_error(sums[-CHECKED_ROWS:], exact))
        return found[0], found[1]

    return Pair(lambda: _native.weight_grad_gemm(grad, state, total), lambda: library.addmm_(grad.t(), state), errors)


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure_one(
    product: str, dtype: str, shape: tuple[int, int, int], threads: int, repeats: int, stamp: dict[str, str]
) -> Row:
    """One warm-up of each, then `repeats` interleaved pairs."""
    torch.set_num_threads(threads)
    make = {"logits": logits, "few_logits": few_logits, "weight_grad": weight_grad}[product]
    pair = make(shape, DTYPES[dtype])
    pair.ours(), pair.library()
    times = [(_milliseconds(pair.ours), _milliseconds(pair.library)) for _ in range(repeats)]
    ours, library = ([t[i] for t in times] for i in (0, 1))
    peak_as = dtype if _native.cpu_isa() == "avx512_bf16" else "fp32"  # without VDPBF16PS bf16 is widened
    peak = _native.peak_flops(peak_as) / 1e9
    tokens, hidden, vocabulary = shape
    gflop_ms = 2e-6 * tokens * hidden * vocabulary / threads
    errors = pair.errors()
    return Row(
        product, dtype, threads, tokens, hidden, vocabulary,
        *(_short(quantile(t, q)) for t in (ours, library) for q in (0.5, 0.2, 0.8)),
        ours_over_library=_short(median(a / b for a, b in times)),
        ours_gflops_per_core=_short(gflop_ms / median(ours)),
        library_gflops_per_core=_short(gflop_ms / median(library)),
        peak_gflops_per_core=_short(peak),
        ours_share_of_peak=_short(gflop_ms / median(ours) / peak),
        ours_error=_short(errors[0]),
        library_error=_short(errors[1]),
        repeats=repeats,
        isa=_native.cpu_isa(),
        **stamp,
    )  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def cases(threads: Sequence[int]) -> list[tuple[str, str, tuple[int, int, int], int]]:
    """What there is to measure on this processor: dW only where it multiplies bf16."""
    products = [("logits", "fp32"), ("logits", "bf16")]
    if _native.cpu_isa() == "avx512_bf16":
        products.append(("weight_grad", "bf16"))
    shaped = [(*product, shape) for product in products for shape in SHAPES]
    shaped += [("few_logits", "fp32", shape) for shape in FEW_SHAPES]
    return [(*case, n) for case in shaped for n in threads]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` to `path`, replacing it only once the new file is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(partial, path)


def show(rows: Sequence[Row]) -> None:
    columns = ("product", "N, H, V", "threads", "GFLOP/s/core", "library's", "of peak", "time over library", "error")
    body = [
        (
            f"{row.product} {row.dtype}",
            f"{row.tokens}, {row.hidden}, {row.vocabulary}",
            str(row.threads),
            f"{row.ours_gflops_per_core:.0f}",
            f"{row.library_gflops_per_core:.0f}",
            f"{row.ours_share_of_peak:.0%}",
            f"{row.ours_over_library:.2f}",
            f"{row.ours_error:.1e} ({row.library_error:.1e})",
        )
        for row in rows
    ]
    print_table(f"{rows[0].device}, {rows[0].isa}, torch {rows[0].torch_version}", columns, body)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits_gemm", description=__doc__)
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="write the rows here (committed: logits_gemm_cpu.csv)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    if not _native.has_native():
        print(f"logits_gemm: {_native.why_not()}", file=sys.stderr)
        return 1
    stamp = {
        "device": cpu_model()[0],
        "torch_version": torch.__version__,
        "version": __version__,
        "commit": commit(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
    }
    rows, todo = [], cases(args.threads)
    with Progress(len(todo), "logits_gemm") as progress:
        for product, dtype, shape, threads in todo:
            rows.append(measure_one(product, dtype, shape, threads, args.repeats, stamp))
            progress.step(f"{product} {dtype} {shape} on {threads}")
    show(rows)
    if args.output is not None:
        write_table(args.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
