"""``python -m benchmarks.step_table``: what `bench step` measured, as the table of the README and as a plot.

    python -m sdft_kernels bench step --variants packed --shape 128,1,64 … --output step.csv
    python -m benchmarks.step_table step.csv --plot step.png

Cells: speed-up of computing prompts once over repeating them (median of pairs), beside the predicted one.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data" / "step_shared_cpu.csv"


class Cell(NamedTuple):
    """Speed-ups of one shape."""

    measured: float
    predicted: float
    ms: float
    peak_mib: float


Table = dict[int, dict[int, Cell]]  # prompt tokens, completions


def read_table(path: Path, variant: str = "packed") -> Table:
    """The cells of `variant` in a file of `bench step`.

    Raises:
        ValueError: the file has none.
    """
    numbers: dict[tuple[int, int], dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kernel_name"] == "shared_prefix_step" and row["kernel_provider"] == variant:
                case = json.loads(row["extra_benchmark_config_str"])
                shape = numbers.setdefault((case["prompt"], case["completions"]), {})
                shape[row["metric_name"]] = float(row["y_value_50"])
    if not numbers:
        raise ValueError(f"{path} has no row of bench step's variant {variant!r}")
    table: Table = {}
    for (prompt, completions), found in sorted(numbers.items()):
        cell = Cell(found["speedup"], found["predicted_speedup"], found["speed"], found.get("memory", float("nan")))
        table.setdefault(prompt, {})[completions] = cell
    return table


def markdown(table: Table) -> list[str]:
    """The lines of the table: a row for each prompt, "measured (predicted)" for each number of completions."""
    counts = sorted({count for row in table.values() for count in row})
    lines = ["| | " + " | ".join(f"R = {count}" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for prompt, row in table.items():
        cells = [f"{row[n].measured:.2f} ({row[n].predicted:.2f})" if n in row else "–" for n in counts]
        lines.append(f"| {prompt:,} tokens | " + " | ".join(cells) + " |")
    return lines


def draw(table: Table, path: Path) -> None:
    """Measured speed-ups as points on the predicted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")  # not pyplot: no display, no global state
    axis = figure.subplots()
    for i, (prompt, row) in enumerate(table.items()):
        counts = sorted(row)
        axis.plot(counts, [row[n].predicted for n in counts], "--", color=f"C{i}", linewidth=1)
        axis.plot(counts, [row[n].measured for n in counts], "o-", color=f"C{i}", label=f"prompt of {prompt:,} tokens")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("completions per prompt, R")
    axis.set_ylabel("speed-up of the step (dashed: predicted by FLOPs)")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, nargs="?", default=DATA, help="of `bench step` (default the committed one)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it (matplotlib)")
    args = parser.parse_args(argv)
    table = read_table(args.file)
    print("\n".join(markdown(table)))
    if args.plot is not None:
        draw(table, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
