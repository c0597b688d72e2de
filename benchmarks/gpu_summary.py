"""``python -m benchmarks.gpu_summary WORK RESULTS``: turn what `gpu_run.sh` has so far into its result files.

WORK holds ``stages.tsv`` (name, exit status, seconds, command), and NAME.out, NAME.err and NAME.csv of each stage.
Called after every group of stages, so that a run that is killed leaves what it had. Needs no package beyond the
standard library.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Result file -> the stages whose standard output it holds. Every other output, and all of stderr, goes to log.txt.
OUTPUTS = {
    "env.json": ("env",),
    "gpu_tests.txt": ("tests",),
    "check.txt": ("check",),
    "sanitizer.txt": ("kernels", "memcheck", "racecheck"),
}
TABLES = {"loss": ("bench_ours", "bench_peers", "bench_native", "bench_torch"), "numerics": ("numerics",)}
# A stage that ran out of time, by what `timeout` answers: its signal was enough, or it had to kill.
TIMED_OUT = ("124", "137")
# One H100, N=8192 H=4096 V=151936: time over the four GEMMs, and MiB beyond inputs, gradients and an fp32 accumulator.
BARS = {"sdft": 1.10, "benchmarks.variants:sdft_callable": 1.18, "benchmarks.variants:sdft_jsd": 1.25}
BAR_SHAPE = ("8192", 4096, 151936)
BAR_MIB = 1536


@dataclass(frozen=True)
class Stage:
    """One line of stages.tsv; `status` is a number, or ``skipped``."""

    name: str
    status: str
    seconds: str
    command: str

    @property
    def failed(self) -> bool:
        return self.status not in ("0", "skipped")

    @property
    def verdict(self) -> str:
        if self.status == "skipped":
            return f"skipped: {self.command}"
        if self.status == "0":
            return "ok"
        return "OUT OF TIME" if self.status in TIMED_OUT else f"FAILED, status {self.status}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the summary; 1 if a stage failed."""
    work, results = (Path(argument) for argument in (sys.argv[1:] if argv is None else argv))
    stages = read_stages(work)
    for name, of_stages in OUTPUTS.items():
        texts = [text for stage in of_stages if (text := read(work / f"{stage}.out"))]
        if texts:
            (results / name).write_text("\n".join(texts), encoding="utf-8")
    card = card_name(results / "env.json")
    for table, of_stages in TABLES.items():
        merge_tables([work / f"{stage}.csv" for stage in of_stages], results / f"{table}_{card}.csv")
    (results / "log.txt").write_text(log(work, stages), encoding="utf-8")
    text = summary(work, stages, results / f"loss_{card}.csv")
    (results / "summary.txt").write_text(text, encoding="utf-8")
    print(text)
    return int(any(stage.failed for stage in stages))


def read(path: Path) -> str:
    """The text of a file, empty if there is none; compilers and kernels print what they like."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_stages(work: Path) -> list[Stage]:
    """The stages that have ended, in that order."""
    return [Stage(*line.split("\t", 3)) for line in read(work / "stages.tsv").splitlines()]


def card_name(env: Path) -> str:
    """The GPU's name (the CPU's without one) in letters, digits, dots and underscores."""
    try:
        report = json.loads(read(env))
    except json.JSONDecodeError:
        return "unknown"
    devices = report["gpu"]["devices"]
    name = devices[0]["name"] if devices else report["cpu"]["name"]
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_") or "unknown"


def merge_tables(parts: Sequence[Path], target: Path) -> None:
    """The rows of CSV files of one format; the commit from $SDFT_COMMIT where the run had no repository to ask."""
    rows: list[dict[str, str]] = []
    for part in parts:
        if part.is_file():
            with part.open(newline="", encoding="utf-8") as file:
                rows += csv.DictReader(file)
    if not rows:
        return
    for row in rows:
        if row.get("commit") == "":
            row["commit"] = os.environ.get("SDFT_COMMIT", "")
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def log(work: Path, stages: Sequence[Stage]) -> str:
    """Commands, what they wrote to stderr, and the standard output that no other file holds."""
    elsewhere = {stage for names in OUTPUTS.values() for stage in names}
    parts = []
    for stage in stages:
        parts.append(f"===== {stage.name}: {stage.verdict}, {stage.seconds} s\n{stage.command}")
        parts += [] if stage.name in elsewhere else [read(work / f"{stage.name}.out")]
        parts.append(read(work / f"{stage.name}.err"))
    return "\n".join(part for part in parts if part)


def summary(work: Path, stages: Sequence[Stage], losses: Path) -> str:
    """A table of the stages, what each found in a line or a table, and the bars."""
    lines = ["stage         seconds  verdict"]
    lines += [f"{stage.name:13} {stage.seconds:>7}  {stage.verdict}" for stage in stages]
    tests = read(work / "tests.out")
    lines += ["", *re.findall(r"^(?:FAILED|ERROR) .*", tests, re.MULTILINE)[:40], f"tests: {last_line(tests)}"]
    checked = read(work / "check.out")
    lines += [*re.findall(r"^.*FAILED$", checked, re.MULTILINE), f"check: {last_line(checked)}"]
    for stage in OUTPUTS["sanitizer.txt"]:
        text = read(work / f"{stage}.out")
        found = re.findall(r"^.*SUMMARY.*$", text, re.MULTILINE)
        lines.append(f"{stage}: {' '.join(found) or last_line(text)}")
    for stage in (*TABLES["numerics"], *TABLES["loss"]):
        if text := read(work / f"{stage}.out").strip():
            lines += ["", f"{stage}:", text]
    lines += ["", *bars(losses)]
    return "\n".join(lines)


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "no output"


def bars(losses: Path) -> list[str]:
    """The design's bars beside what was measured with the kernels that `auto` chose."""
    lines = []
    with losses.open(newline="", encoding="utf-8") if losses.is_file() else open(os.devnull, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            bar = BARS.get(row["kernel_provider"])
            config = json.loads(row["extra_benchmark_config_str"])
            shape = (row["x_value"], config["H"], config["V"])
            if (
                bar is None
                or row["metric_name"] != "ratio_to_gemm4"
                or shape != BAR_SHAPE
                or config.get("impl") == "torch"
            ):
                continue
            ratio = float(row["y_value_50"])
            # dW is accumulated in fp32 beside a bf16 gradient, outside memory_budget.
            memory = float(row["device_memory_peak"]) - 4 * config["V"] * config["H"] / 2**20
            met = "met" if ratio <= bar and memory <= BAR_MIB else "MISSED"
            name = row["kernel_provider"].rpartition(":")[2]
            lines.append(f"{name}: {ratio:.3f} x gemm4 (bar {bar}), {memory:.0f} MiB (bar {BAR_MIB}): {met}")
    return lines or ["bars: not measured"]


if __name__ == "__main__":
    raise SystemExit(main())
