"""``python -m benchmarks.ema``: how far moving averages of three storages drift from fp64, and how fast they move.

Accuracy: 1,000 updates at rate 0.01 towards a bf16 student that stands still at some distance, or walks at random to
it. The error is the distance to the fp64 average of the same students, relative to the distance that average travelled.
Speed: one update of a tensor too large for the caches, beside a copy of the same tensor; the bytes are those that an
update must read and write. The committed table is `benchmarks/data/ema.csv`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdft_kernels._ema import ema_update_, ema_update_hilo_, split_hilo
from sdft_kernels._native import has_native
from sdft_kernels.cli._bench.report import commit
from sdft_kernels.cli._table import print_table
from sdft_kernels.cli.env import cpu_model

TABLE = Path(__file__).resolve().parent / "data" / "ema.csv"
RATE = 0.01
STEPS = 1000
WEIGHT = 0.02  # standard deviation of a transformer's weights
# How far the student goes, relative to its weights. Adam at a learning rate of 2e-5 walks at least 0.03 in 1,000 steps
# (2e-5 * 1000**0.5 / WEIGHT); 0.003 is less than a bf16 ulp (0.004 to 0.008): most of a bf16 student stands still.
MOVED = (0.1, 0.03, 0.003)
BAR = 0.01
STORAGES = ("fp32", "hilo", "bf16")


@dataclass(frozen=True)
class Row:
    """One storage; accuracy rows leave the speed fields empty and the other way round."""

    storage: str
    student: str  # constant, walk or "" (speed)
    student_moved: float | str  # relative to the weights
    error: float | str  # distance to the fp64 average / distance it travelled
    elements: int
    param_dtype: str
    ns_per_element: float | str
    gb_per_s: float | str
    copy_gb_per_s: float | str
    threads: int
    native: bool
    device: str
    torch_version: str
    commit: str


class Average:
    """One storage of an average: `update` moves it, `value` is its fp64 value."""

    def __init__(self, storage: str, start: Tensor) -> None:
        self.storage = storage
        self.tensors = {
            "fp64": lambda: (start.double(),),
            "fp32": lambda: (start.float(),),
            "hilo": lambda: split_hilo(start),
            "bf16": lambda: (start.bfloat16().clone(),),
        }[storage]()

    def update(self, student: Tensor) -> None:
        if self.storage == "fp32":
            ema_update_(*self.tensors, student, RATE)
        elif self.storage == "hilo":
            ema_update_hilo_(*self.tensors, student, RATE)
        else:
            self.tensors[0].lerp_(student.to(self.tensors[0].dtype), RATE)

    def value(self) -> Tensor:
        return torch.stack([tensor.double() for tensor in self.tensors]).sum(0)


def students(kind: str, start: Tensor, moved: float, steps: int) -> Iterator[Tensor]:
    """bf16 students, one per step; a walk is kept in fp32, as master weights are."""
    generator = torch.Generator().manual_seed(1)
    size = moved * WEIGHT
    if kind == "constant":
        student = (start.float() + size * torch.randn(start.shape, generator=generator)).bfloat16()
        yield from (student for _ in range(steps))
        return
    master = start.float()
    for _ in range(steps):
        master = master + size * steps**-0.5 * torch.randn(start.shape, generator=generator)
        yield master.bfloat16()


def errors(kind: str, moved: float, elements: int, steps: int = STEPS) -> dict[str, float]:
    """Storage to its error, all of them fed the same students."""
    start = (WEIGHT * torch.randn(elements, generator=torch.Generator().manual_seed(0))).bfloat16()
    averages = {storage: Average(storage, start) for storage in ("fp64", *STORAGES)}
    for student in students(kind, start, moved, steps):
        for average in averages.values():
            average.update(student)
    exact = averages["fp64"].value()
    travelled = (exact - start.double()).norm()
    return {storage: ((averages[storage].value() - exact).norm() / travelled).item() for storage in STORAGES}


def seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median time of each, interleaved."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _times(averages: Sequence[Average], student: Tensor, repeats: int) -> list[float]:
    """Seconds of an update of each, and last of a copy of as many fp32 elements."""
    source, target = torch.randn(student.shape), torch.empty(student.shape)
    runs: list[Callable[[], object]] = [partial(average.update, student) for average in averages]
    return seconds([*runs, lambda: target.copy_(source)], repeats)


def speed_rows(elements: int, repeats: int, common: dict) -> list[Row]:
    """One row per storage and parameter dtype."""
    rows = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        start, student = torch.randn(elements), torch.randn(elements).to(dtype)
        averages = [Average(storage, start) for storage in STORAGES]
        *taken, copying = _times(averages, student, repeats)
        for average, second in zip(averages, taken, strict=True):
            moved = student.element_size() + 2 * sum(tensor.element_size() for tensor in average.tensors)
            rows.append(
                Row(
                    storage=average.storage, student="", student_moved="", error="", elements=elements,
                    param_dtype=name, ns_per_element=_short(second / elements * 1e9),
                    gb_per_s=_short(moved * elements / second / 1e9),
                    copy_gb_per_s=_short(8 * elements / copying / 1e9), **common,
                )
            )  # fmt: skip
    return rows


def measure(elements: int, timed_elements: int, repeats: int) -> list[Row]:
    common = dict(
        threads=torch.get_num_threads(), native=has_native(), device=cpu_model()[0], torch_version=torch.__version__,
        commit=commit(),
    )  # fmt: skip
    rows = [
        Row(
            storage=storage, student=kind, student_moved=moved, error=_short(error), elements=elements,
            param_dtype="bf16", ns_per_element="", gb_per_s="", copy_gb_per_s="", **common,
        )
        for kind in ("constant", "walk")
        for moved in MOVED
        for storage, error in errors(kind, moved, elements).items()
    ]  # fmt: skip
    return rows + speed_rows(timed_elements, repeats, common)


def failures(rows: Sequence[Row]) -> list[str]:
    """Where the pair of bf16 tensors is further than `BAR` from the fp32 average."""
    by_case = {(row.student, row.student_moved, row.storage): row.error for row in rows if row.student}
    said = []
    for (student, moved, storage), error in by_case.items():
        apart = float(error) - float(by_case[student, moved, "fp32"])
        if storage == "hilo" and not apart <= BAR:
            said.append(
                f"{student}, moved {moved:g}: hilo is {apart:.2%} further off than fp32, at most {BAR:.0%} allowed"
            )
    return said


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def show(rows: Sequence[Row]) -> None:
    accuracy = [row for row in rows if row.student]
    cells = [(row.storage, row.student, f"{row.student_moved:g}", f"{float(row.error):.3%}") for row in accuracy]
    title = f"after {STEPS} updates at rate {RATE:g}, {accuracy[0].elements} elements"
    print_table(title, ("storage", "student", "moved", "error / travelled"), cells)
    speed = [row for row in rows if not row.student]
    numbers = ("ns_per_element", "gb_per_s", "copy_gb_per_s")
    cells = [(row.storage, row.param_dtype, *(f"{getattr(row, name):g}" for name in numbers)) for row in speed]
    title = f"one update of {speed[0].elements} elements, {speed[0].threads} threads, native={speed[0].native}"
    print_table(title, ("storage", "param", "ns/element", "GB/s", "copy GB/s"), cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ema", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="CSV", help=f"write the rows here (committed: {TABLE.name})")
    parser.add_argument("--elements", type=int, default=100_000, help="of the accuracy rows (%(default)s)")
    parser.add_argument("--timed-elements", type=int, default=1 << 25, help="of the speed rows (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed updates of each kind (%(default)s)")
    args = parser.parse_args(argv)
    rows = measure(args.elements, args.timed_elements, args.repeats)
    show(rows)
    if args.output is not None:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    for line in failures(rows):
        print(f"ema: {line}", file=sys.stderr)
    return int(bool(failures(rows)))


if __name__ == "__main__":
    sys.exit(main())
