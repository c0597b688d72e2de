"""The one call for a rented GPU: its dry run passes through every stage, its summary tells what failed."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import gpu_summary
from sdft_kernels.cli._bench.case import VARIANT_NEEDS, parse_shape
from sdft_kernels.cli._bench.report import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
STAGES = [
    "env", "wheels", "build", "tests", "check", "kernels", "memcheck", "racecheck", "numerics",
    "bench_ours", "bench_peers", "bench_native", "bench_torch",
]  # fmt: skip
MAX_FILES = 8  # that come back from a rented machine

# Stands in for compute-sanitizer: refuses options that it does not know, and runs the program.
SANITIZER = """#!/usr/bin/env bash
[[ $1 == --tool && $3 == --error-exitcode && $5 == --print-limit ]] || exit 3
tool=$2
[[ $PYTORCH_NO_CUDA_MEMORY_CACHING == 1 ]] || exit 4
shift 6
"$@" || exit 9
echo "========= ${tool^^} SUMMARY: 0 errors"
"""


def bash(*arguments, **options):
    return subprocess.run(["bash", *arguments], capture_output=True, text=True, **options)


def test_script_parses():
    assert bash("-n", str(SCRIPT)).stderr == ""
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("arguments", ([], ["--dry-run"], ["--help"], ["a", "b"]))
def test_wrong_usage(arguments, tmp_path):
    done = bash(str(SCRIPT), *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "benchmarks/gpu_run.sh [--dry-run] RESULTS_DIR" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_shape_and_variant_of_the_real_run_exists():
    """The dry run takes fewer, so a typo here would cost the first hour of a GPU."""
    text = SCRIPT.read_text(encoding="utf-8")
    real = text.split("device=cuda", 1)[1].split("\nfi", 1)[0]
    variants = [name for line in re.findall(r'(?:ours|peers)="(.*)"', real) for name in line.split()]
    assert {"sdft", "sdft_tokens", "trl_kernel", "liger_triton", "liger_chunked", "plain"} <= set(variants)
    for name in variants:
        module, _, function = name.partition(":")
        assert name in VARIANT_NEEDS or callable(getattr(importlib.import_module(module), function))
    assert set(gpu_summary.BARS) <= set(variants)
    shapes = [parse_shape(shape) for shape in re.findall(r"\d+,\d+,\d+", real)]
    assert shapes == [(8192, 4096, 151936), (4096, 2048, 128256)]
    assert (str(shapes[0][0]), *shapes[0][1:]) == gpu_summary.BAR_SHAPE
    for file in re.findall(r"tests/\w+\.py", text):
        assert (ROOT / file).is_file(), file


@pytest.fixture
def work(tmp_path):
    """A folder as the script leaves it, half way: one stage failed, one ran out of time, one was skipped."""
    folder = tmp_path / "work"
    folder.mkdir()
    stages = [
        ("env", "0", "3", "python -m sdft_kernels env"),
        ("tests", "1", "60", "python -m pytest"),
        ("bench_ours", "124", "190", "python -m sdft_kernels bench"),
        ("memcheck", "skipped", "0", "compute-sanitizer is not installed"),
    ]
    (folder / "stages.tsv").write_text("".join("\t".join(stage) + "\n" for stage in stages))
    (folder / "env.out").write_text(json.dumps({"gpu": {"devices": [{"name": "NVIDIA H100 80GB HBM3"}]}}))
    (folder / "tests.out").write_text(
        "...F\nFAILED tests/test_gpu.py::test_x - assert 1\n==== 1 failed, 3 passed ====\n"
    )
    (folder / "tests.err").write_text("a warning\n")
    (folder / "bench_ours.out").write_text("N=8192 table\n")
    return folder


def loss_row(provider, ratio, memory, metric="ratio_to_gemm4"):
    config = {"H": 4096, "V": 151936, "impl": "auto"}
    row = dict.fromkeys(COLUMNS, "") | {
        "kernel_provider": provider, "metric_name": metric, "x_value": "8192", "y_value_50": str(ratio),
        "device_memory_peak": str(memory), "extra_benchmark_config_str": json.dumps(config),
    }  # fmt: skip
    return row


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_summary_says_what_failed_and_why(work, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    assert gpu_summary.main([str(work), str(results)]) == 1
    out = capsys.readouterr().out
    assert out.rstrip("\n") == (results / "summary.txt").read_text()
    for line in (
        r"env +3  ok", r"tests +60  FAILED, status 1", r"bench_ours +190  OUT OF TIME",
        r"memcheck +0  skipped: compute-sanitizer is not installed", r"FAILED tests/test_gpu.py::test_x - assert 1",
        r"tests: 1 failed, 3 passed", r"check: no output", r"N=8192 table", r"bars: not measured",
    ):  # fmt: skip
        assert re.search(f"^{line}$", out, re.MULTILINE), line
    assert "a warning" in (results / "log.txt").read_text()
    assert "1 failed" in (results / "gpu_tests.txt").read_text()


def test_summary_merges_tables_and_holds_the_bars(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SDFT_COMMIT", "0123abcd")
    accumulator = 4 * 4096 * 151936 / 2**20
    rows = [
        loss_row("sdft", 1.08, accumulator + 1500),
        loss_row("sdft", 80.0, accumulator + 1500, "speed"),
        loss_row("benchmarks.variants:sdft_callable", 1.30, accumulator + 1500),
        loss_row("benchmarks.variants:sdft_jsd", 1.20, accumulator + 1600),
    ]
    write_rows(work / "bench_ours.csv", rows)
    write_rows(work / "bench_peers.csv", [loss_row("plain", 3.0, 30000.0) | {"commit": "kept"}])
    gpu_summary.main([str(work), str(tmp_path)])
    out = capsys.readouterr().out
    assert "\nsdft: 1.080 x gemm4 (bar 1.1), 1500 MiB (bar 1536): met" in out
    assert "\nsdft_callable: 1.300 x gemm4 (bar 1.18), 1500 MiB (bar 1536): MISSED" in out
    assert "\nsdft_jsd: 1.200 x gemm4 (bar 1.25), 1600 MiB (bar 1536): MISSED" in out
    with (tmp_path / "loss_NVIDIA_H100_80GB_HBM3.csv").open(newline="") as file:
        merged = list(csv.DictReader(file))
    assert [row["commit"] for row in merged] == ["0123abcd"] * 4 + ["kept"]


def test_summary_of_nothing(tmp_path, capsys):
    """A run that dies at once still has a summary."""
    assert gpu_summary.main([str(tmp_path), str(tmp_path)]) == 0
    assert "tests: no output" in capsys.readouterr().out


def test_every_stage_runs_however_many_fail(tmp_path):
    """A Python that can do nothing but sum up: each failure is recorded, and the exit status says that there were."""
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\n[ "$2" = benchmarks.gpu_summary ] && exec {sys.executable} "$@"\nexit 3\n')
    broken.chmod(0o755)
    environment = os.environ | {"PYTHON": str(broken), "WHEELS": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = bash(str(SCRIPT), "--dry-run", str(tmp_path / "results"), env=environment)
    verdicts = dict(re.findall(r"^(\w+) +\d+  (.+)$", done.stdout, re.MULTILINE))
    assert done.returncode == 1 and sorted(verdicts) == sorted(STAGES)
    failed = {name for name, verdict in verdicts.items() if verdict == "FAILED, status 3"}
    assert failed >= {
        "env",
        "build",
        "tests",
        "check",
        "kernels",
        "bench_ours",
        "bench_peers",
        "bench_native",
        "bench_torch",
    }
    assert "skipped: no wheels in" in verdicts["wheels"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"summary.txt", "log.txt"}


def make_wheel(folder, name):
    """The smallest wheel that pip installs."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.mark.slow
def test_dry_run_passes_every_stage(tmp_path):
    if not list(metadata.distributions(name="pip")):  # looking for the module would switch off setuptools' distutils
        pytest.skip("no pip")
    results, tools = tmp_path / "results", tmp_path / "tools"
    tools.mkdir()
    make_wheel(tmp_path, "probe_peer")
    make_wheel(tmp_path, "another_peer")
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "WHEELS": str(tmp_path),
        "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = bash(str(SCRIPT), "--dry-run", str(results), env=environment, cwd=tmp_path)
    told = done.stdout + done.stderr + ((results / "log.txt").read_text() if results.is_dir() else "")
    verdicts = dict(re.findall(r"^(\w+) +\d+  (.+)$", done.stdout, re.MULTILINE))
    # Without a compiler there is nothing to build; everything else must pass.
    assert {name: v for name, v in verdicts.items() if v != "ok" and name != "build"} == {}, told
    assert sorted(verdicts) == sorted(STAGES)
    files = sorted(path.name for path in results.iterdir())
    assert len(files) <= MAX_FILES and all(re.fullmatch(r"[\w.-]+", name) for name in files), files
    assert {"summary.txt", "env.json", "gpu_tests.txt", "check.txt", "sanitizer.txt", "log.txt"} <= set(files)
    assert (results / "summary.txt").read_text() == done.stdout.rstrip("\n")
    assert json.loads((results / "env.json").read_text())["gpu"]["devices"] == []
    assert "FAILED" not in (results / "check.txt").read_text()
    assert "all calls agree with fp64" in done.stdout and "RACECHECK SUMMARY: 0 errors" in done.stdout
    (table,) = results.glob("loss_*.csv")
    with table.open(newline="") as file:
        measured = [(row["kernel_provider"], row["metric_name"]) for row in csv.DictReader(file)]
    for provider in ("sdft", "benchmarks.variants:sdft_jsd", "plain"):
        assert (provider, "ratio_to_gemm4") in measured
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp.")] == []  # cleaned up
