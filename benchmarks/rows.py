"""``python -m benchmarks.rows``: the CPU's row kernels beside the four products of a step, and beside a copy.

One chunk as `linear_divergence_loss` cuts it: logits of both models, the row kernel, dX and dW, each timed on warm
buffers, in turns; medians. A row kernel reads two tiles and writes one, which is 1.5 times the bytes that a copy of two
tiles would read. The share is the row kernel's of all of them. The committed table is `benchmarks/data/rows_cpu.csv`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sdft_kernels import _native
from sdft_kernels._chunks import Head
from sdft_kernels._gemm import Gemm
from sdft_kernels._head import IDENTITY
from sdft_kernels.cli._bench.report import commit
from sdft_kernels.cli._table import print_table
from sdft_kernels.cli.env import cpu_model
from sdft_kernels.divergence.driver import plan, rows_of
from sdft_kernels.testing import DivergenceInputs, make_divergence_inputs

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The design's three rows (N, H, V, dtype, budget).
CASES = (
    (1024, 576, 49152, "fp32", 128 * MIB),
    (512, 640, 262144, "fp32", 256 * MIB),
    (1024, 576, 49152, "bf16", 128 * MIB),
)
LOSSES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "kl_teacher_student": (("kl_teacher_student",), None),
    "kl_student_teacher": (("kl_student_teacher",), None),
    "jsd": (("jsd",), 0.5),
}


@dataclass(frozen=True)
class Row:
    """One implementation of one loss at one shape; times in ms."""

    impl: str
    loss: str
    dtype: str
    tokens: int
    hidden: int
    vocabulary: int
    chunk: int
    rows_ms: float
    products_ms: float
    share_of_step: float
    gb_per_s: float
    copy_gb_per_s: float
    threads: int
    isa: str
    device: str
    torch_version: str
    commit: str


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@lru_cache(maxsize=1)
def _inputs(tokens: int, vocabulary: int, hidden: int, dtype: str) -> DivergenceInputs:
    return make_divergence_inputs("near", tokens, vocabulary, hidden, dtype=DTYPES[dtype])


def measure(case: tuple[int, int, int, str, int], impl: str, loss: str, repeats: int, stamp: dict[str, Any]) -> Row:
    """The medians of one chunk of `case`."""
    tokens, hidden, vocabulary, dtype, budget = case
    x = _inputs(tokens, vocabulary, hidden, dtype)
    rows, gemm = rows_of(impl), Gemm(DTYPES[dtype], torch.float32, native=impl == "native")
    heads = (
        Head(x.student_input, x.student_weight, None, IDENTITY),
        Head(x.teacher_input, x.teacher_weight, None, IDENTITY),
    )
    count = plan(*heads, None, True, budget, gemm, rows).size
    stride = rows.row_stride(vocabulary)
    student, teacher = _native.on_huge_pages(torch.empty(2, count, stride)).zero_()[:, :, :vocabulary]
    h = x.student_input[:count]
    dx, dw = torch.empty_like(h), _native.on_huge_pages(torch.empty(vocabulary, hidden)).zero_()
    names, alpha = LOSSES[loss]
    weights = {name: torch.ones(count) for name in names}
    numbers, gradients = torch.zeros(8, count), []

    def logits() -> None:
        gemm.project(h, x.student_weight, None, student)
        gemm.project(x.teacher_input[:count], x.teacher_weight, None, teacher)

    def row_kernel() -> None:
        gradients[:] = [
            rows.affine_(
                student, teacher, None, weights, None, None, (IDENTITY,) * 2, alpha, None, numbers, torch.zeros(count),
                gemm.gradient_dtype(h.device),
            )
        ]  # fmt: skip

    def products() -> None:
        gradient = gemm.round_gradient(gradients[0])
        gemm.grad_input(gradient, x.student_weight, dx)
        gemm.grad_weight(gradient, h, dw)

    copied = torch.empty(2, count, stride)
    parts = {"logits": logits, "rows": row_kernel, "products": products}
    times: dict[str, list[float]] = {name: [] for name in (*parts, "copy")}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            taken = _milliseconds(part)
            if repeat:  # the first is a warm-up
                times[name].append(taken)
        times["copy"].append(_milliseconds(lambda: copied[0].copy_(copied[1])))
    took = {name: median(values) for name, values in times.items()}
    tile = 4e-6 * count * vocabulary
    written = tile * gemm.gradient_dtype(h.device).itemsize / 4
    rows_ms, products_ms = took["rows"], took["logits"] + took["products"]
    return Row(
        impl, loss, dtype, tokens, hidden, vocabulary, count, round(rows_ms, 2), round(products_ms, 2),
        share_of_step=round(rows_ms / (rows_ms + products_ms), 4),
        gb_per_s=round((2 * tile + written) / rows_ms, 2),
        copy_gb_per_s=round(2 * 4e-6 * count * stride / took["copy"], 2),
        **stamp,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--impl", nargs="+", default=["native", "torch"], help="default native torch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, metavar="CSV", help="write the table here (replaced)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    stamp = {
        "threads": args.threads, "isa": _native.cpu_isa(), "device": cpu_model()[0],
        "torch_version": torch.__version__, "commit": commit(),
    }  # fmt: skip
    table = [measure(case, impl, loss, args.repeats, stamp) for case in CASES for impl in args.impl for loss in LOSSES]
    names = [field.name for field in fields(Row)][:12]
    print_table(
        "row kernels beside the products of a chunk",
        names,
        [[str(asdict(row)[name]) for name in names] for row in table],
    )
    if args.output is not None:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
