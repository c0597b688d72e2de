"""What `bench attention` and `bench step` leave behind: measured speed beside the predicted one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median

from sdft_kernels.cli._bench.case import MIB
from sdft_kernels.cli._bench.prefix_case import FLOOR, PrefixCase, PrefixRequest
from sdft_kernels.cli._bench.protocol import Result
from sdft_kernels.cli._bench.report import COLUMNS, metric_rows, note, quantile, stamp
from sdft_kernels.cli._table import print_table

# Those of `bench loss`, but that the last one names the floor of its ratio.
PREFIX_COLUMNS = (*COLUMNS[:-1], f"ratio_to_{FLOOR}")


def csv_rows(results: Sequence[Result[PrefixRequest]]) -> list[dict[str, str]]:
    """Return one row per metric of every variant that was timed: ms, speed-up measured and predicted, MiB, errors."""
    made = stamp()
    return [row | made for result in results if result.seconds for row in _rows(result)]


def _rows(result: Result[PrefixRequest]) -> list[dict[str, str]]:
    case = result.request.case
    peak = None if result.peak_bytes is None else result.peak_bytes / MIB
    common = {
        "kernel_name": f"shared_prefix_{case.kind}",
        "kernel_provider": result.request.label,
        "kernel_operation_mode": "full",
        "x_name": "P",
        "x_label": "prompt tokens",
        "x_value": str(case.prompt),
        "extra_benchmark_config_str": json.dumps(case.config),
        "gpu_name": result.device_name,
        "device_memory_peak": "" if peak is None else f"{peak:.1f}",
        PREFIX_COLUMNS[-1]: f"{result.median_ratio:.4f}",
    }
    metrics: list[tuple[str, str, list[float]]] = [
        ("speed", "ms", [1e3 * seconds for seconds in result.seconds]),
        ("speedup", "x", _speedups(result)),
    ]
    metrics += [(name, _unit(name), [value]) for name, value in result.predictions.items()]
    metrics += [("memory", "MiB", [peak])] if peak is not None else []
    metrics += [(name, "relative", [value]) for name, value in result.errors.items()]
    return metric_rows(common, metrics)


def print_results(case: PrefixCase, results: Sequence[Result[PrefixRequest]]) -> None:
    """Print one line per variant; a variant without numbers says why."""
    parts = [name for name in ("body", "attention", "head") if any(_gflop(result, name) for result in results)]
    columns = ("variant", "ms", "speed-up", "20-80 %", "predicted", *(f"{name} GFLOP" for name in parts))
    title = f"{case.title}, {results[0].device_name}, {case.repeats} pairs"
    rows = [_table_row(result, parts) for result in results]
    print()
    print_table(title, (*columns, "peak MiB", "largest error", "note"), rows)


def _table_row(result: Result[PrefixRequest], parts: Sequence[str]) -> tuple[str, ...]:
    timed, ratios = bool(result.seconds), _speedups(result)
    predicted = result.predictions.get("predicted_speedup")
    return (
        result.request.label,
        f"{1e3 * median(result.seconds):.4g}" if timed else "",
        f"{median(ratios):.2f}" if timed else "",
        f"{quantile(ratios, 0.2):.2f}-{quantile(ratios, 0.8):.2f}" if timed else "",
        "" if predicted is None else f"{predicted:.2f}",
        *(_gflop(result, name) for name in parts),
        "" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.0f}",
        f"{max(result.errors.values()):.1e}" if result.errors else "",
        note(result),
    )


def _speedups(result: Result[PrefixRequest]) -> list[float]:
    return [1 / ratio for ratio in result.ratios]


def _gflop(result: Result[PrefixRequest], name: str) -> str:
    value = result.predictions.get(f"predicted_{name}_gflop")
    return "" if value is None else f"{value:.4g}"


def _unit(name: str) -> str:
    return "GFLOP" if name.endswith("_gflop") else "tokens" if name.endswith("_tokens") else "x"
