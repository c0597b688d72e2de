"""What a benchmark leaves behind: a CSV in Liger's columns, a table on the terminal, a plot."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sdft_kernels._version import __version__
from sdft_kernels.cli._bench.case import MIB, Case, Request
from sdft_kernels.cli._bench.protocol import Result
from sdft_kernels.cli._table import print_table
from sdft_kernels.cli.env import package_version

# The first fifteen are Liger's, so that tools which read its files read ours.
COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "version",
    "torch_version",
    "triton_version",
    "commit",
    "device_memory_peak",
    "ratio_to_gemm4",
)

_DISTRIBUTIONS = {
    "trl_full": "trl",
    "trl_kernel": "trl",
    "liger_chunked": "liger-kernel",
    "liger_triton": "liger-kernel",
}


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the linearly interpolated quantile of `values` (at least one)."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def commit() -> str:
    """Return the commit of this package's source, with ``-dirty`` if it was edited; empty outside a checkout."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        # An installed package may lie inside someone else's repository: ask only about files that are tracked there.
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "_version.py")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def csv_rows(results: Sequence[Result[Request]]) -> list[dict[str, str]]:
    """Return one row per metric of every variant that was timed: ms, ratio, MiB and the errors against fp64."""
    made = stamp()
    return [row | made for result in results if result.seconds for row in _loss_rows(result)]


def stamp() -> dict[str, str]:
    """When, and with which versions, rows were made."""
    return {
        "timestamp": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        "version": __version__,
        "torch_version": package_version("torch") or "",
        "triton_version": package_version("triton") or "",
        "commit": commit(),
    }


def metric_rows(common: dict[str, str], metrics: Sequence[tuple[str, str, Sequence[float]]]) -> list[dict[str, str]]:
    """One row per (name, unit, values): `common` and the values' quantiles."""
    return [
        common
        | {"metric_name": name, "metric_unit": unit}
        | {f"y_value_{q}": f"{quantile(values, q / 100):.6g}" for q in (50, 20, 80)}
        for name, unit, values in metrics
    ]


def _loss_rows(result: Result[Request]) -> list[dict[str, str]]:
    request, case = result.request, result.request.case
    config = {
        "H": case.shape[1],
        "V": case.shape[2],
        "dtype": case.dtype,
        "device": case.device,
        "threads": case.threads,
        "repeats": case.repeats,
        "seed": case.seed,
    }
    if request.variant in _DISTRIBUTIONS:
        config["provider_version"] = package_version(_DISTRIBUTIONS[request.variant])
    if request.variant.startswith("sdft"):
        config |= {
            "memory_budget": request.memory_budget,
            "impl": "torch" if request.variant == "sdft_torch" else case.impl,
        }
    peak = None if result.peak_bytes is None else result.peak_bytes / MIB
    common = {
        "kernel_name": "linear_divergence_loss",
        "kernel_provider": request.label,
        "kernel_operation_mode": "full",
        "x_name": "N",
        "x_label": "tokens",
        "x_value": str(case.shape[0]),
        "extra_benchmark_config_str": json.dumps(config),
        "gpu_name": result.device_name,
        "device_memory_peak": "" if peak is None else f"{peak:.1f}",
        "ratio_to_gemm4": f"{result.median_ratio:.4f}",
    }
    metrics: list[tuple[str, str, list[float]]] = [
        ("speed", "ms", [1e3 * seconds for seconds in result.seconds]),
        ("ratio_to_gemm4", "x", result.ratios),
    ]
    metrics += [("memory", "MiB", [peak])] if peak is not None else []
    metrics += [(name, "relative", [value]) for name, value in result.errors.items()]
    return metric_rows(common, metrics)


def write_csv(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Write `rows` to `path`, replacing it only once the new file is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def print_results(case: Case, results: Sequence[Result[Request]]) -> None:
    """Print one line per variant; a variant without numbers says why."""
    tokens, hidden, vocabulary = case.shape
    title = f"N={tokens} H={hidden} V={vocabulary} {case.dtype}, {results[0].device_name}, {case.repeats} pairs"
    columns = ("variant", "ms", "over gemm4", "20-80 %", "peak MiB", "loss error", "dH error", "dW error", "note")
    print()
    print_table(title, columns, [_table_row(result) for result in results])


def _table_row(result: Result[Request]) -> tuple[str, ...]:
    error = {name: f"{value:.1e}" for name, value in result.errors.items()}
    timed = bool(result.seconds)
    spread = f"{quantile(result.ratios, 0.2):.2f}-{quantile(result.ratios, 0.8):.2f}" if timed else ""
    return (
        result.request.label,
        f"{1e3 * median(result.seconds):.4g}" if timed else "",
        f"{result.median_ratio:.2f}" if timed else "",
        spread,
        "" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.0f}",
        error.get("loss_error", ""),
        error.get("input_gradient_error", ""),
        error.get("weight_gradient_error", ""),
        note(result),
    )


def note(result: Result[Any]) -> str:
    """Why a variant has no numbers, for the table."""
    return f"{'FAILED' if result.failed else 'skipped'}: {result.note}" if result.note else ""


_CURVE_BUDGETS = 3  # that one variant ran with: time and peak are then drawn against the budget


def _peak_mib(result: Result[Request]) -> float:
    return 0.0 if result.peak_bytes is None else result.peak_bytes / MIB


def _draw_bars(time_axis: Any, memory_axis: Any, timed: Sequence[Result[Request]]) -> None:
    labels = [result.request.label for result in timed]
    ratios = time_axis.barh(labels, [result.median_ratio for result in timed], color="tab:blue")
    time_axis.bar_label(ratios, fmt="%.2f", padding=3)
    time_axis.axvline(1.0, color="black", linewidth=0.8)
    time_axis.set_xlabel("time over the four GEMMs")
    memory_axis.bar_label(
        memory_axis.barh(labels, list(map(_peak_mib, timed)), color="tab:orange"), fmt="%.0f", padding=3
    )
    memory_axis.set_xlabel("peak beyond inputs and gradients, MiB")
    for axis in (time_axis, memory_axis):
        axis.margins(x=0.15)


def _draw_curve(time_axis: Any, memory_axis: Any, timed: Sequence[Result[Request]]) -> None:
    """Of every variant that ran with budgets; variants without one are lines across."""
    for variant in dict.fromkeys(result.request.variant for result in timed if result.request.memory_budget):
        runs = [result for result in timed if result.request.variant == variant and result.request.memory_budget]
        runs.sort(key=lambda result: result.request.memory_budget or 0)
        budgets = [(result.request.memory_budget or 0) / MIB for result in runs]
        time_axis.plot(budgets, [result.median_ratio for result in runs], "o-", label=variant)
        memory_axis.plot(budgets, list(map(_peak_mib, runs)), "o-", label=variant)
    others = [result for result in timed if not result.request.memory_budget]
    for i, result in enumerate(others):
        time_axis.axhline(result.median_ratio, color=f"C{i + 4}", linewidth=0.9, label=result.request.label)
    time_axis.set_ylabel("time over the four GEMMs")
    memory_axis.set_ylabel("peak beyond inputs and gradients, MiB")
    for axis in (time_axis, memory_axis):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("memory_budget, MiB")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)


def plot(path: Path, cases: Sequence[tuple[Case, Sequence[Result[Request]]]]) -> None:
    """Draw time over ``gemm4`` and peak memory, one row of panels per case, as an image at `path`."""
    from matplotlib.figure import Figure

    # Figure, not pyplot: no display, no global state.
    figure = Figure(figsize=(11, 1 + 2.6 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for (case, results), (time_axis, memory_axis) in zip(cases, axes, strict=True):
        timed = [result for result in results if result.seconds][::-1]
        time_axis.set_title("N={} H={} V={} {}".format(*case.shape, case.dtype))
        if len({result.request.memory_budget for result in timed} - {None}) >= _CURVE_BUDGETS:
            _draw_curve(time_axis, memory_axis, timed)
        else:
            _draw_bars(time_axis, memory_axis, timed)
    source = commit() or f"version {__version__}"
    figure.suptitle(f"loss + backward, {cases[0][1][0].device_name}, {source}", fontsize=10)
    figure.savefig(path, dpi=150)
