"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, spills, shared memory, access widths.

The committed table holds every kernel x mode x shipped configuration x capability. It is as fresh as the sources it was
made from, and the worst mode of each kernel is compiled again here for sm_90.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PINNED = "3.7.1"


def committed():
    return [aot.Compiled(**{f.name: _value(row[f.name]) for f in fields(aot.Compiled)}) for row in aot.read_table()[1]]


def _value(text):
    return int(text) if text.lstrip("-").isdigit() else text


def key(row):
    return row.kernel, row.mode, row.gradient, row.block, row.num_warps, row.max_registers, row.capability


def assert_fits(row):
    """What holds for every compiled kernel."""
    assert row.spill_bytes == 0, row
    assert row.registers <= row.max_registers, row
    assert row.shared_bytes <= aot.SHARED_LIMIT[row.capability] * 1024, row
    # Two models' blocks, read once for the numbers, once for a JSD, once for the gradient: 16 bytes at a time.
    reads = {"affine_kernel": 1 + (row.gradient != "-")}.get(row.kernel, 1)
    reads += row.kernel in ("affine_kernel", "stats_kernel") and row.mode in ("jsd", "everything", "stats_everything")
    per_thread = row.block // (32 * row.num_warps * 4)
    assert row.wide_loads == 2 * per_thread * reads, row
    assert row.narrow_loads <= 15, row  # a token's own: five weights, target, logits of the target, state
    if row.gradient != "-":
        assert row.wide_stores >= 1, row
    assert row.narrow_stores <= 15, row  # a token's own: eight numbers, loss, or seven of the state


def test_the_table_is_complete_and_every_kernel_fits():
    rows = committed()
    assert Counter(map(key, rows)) == Counter(
        (j.kernel, j.mode, j.gradient, *j.configuration[1:], j.capability) for j in aot.jobs()
    )
    for row in rows:
        assert_fits(row)
    assert aot.read_table()[0] == aot.source_hash(), "the kernels changed: run python -m benchmarks.aot"


@pytest.mark.slow
@pytest.mark.skipif(
    pytest.importorskip("triton").__version__ != PINNED, reason="registers are those of the pinned compiler"
)
def test_the_worst_modes_compile_to_what_the_table_says(tmp_path):
    """In a process of its own: here kernels are interpreted."""
    output = tmp_path / "table.csv"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.aot",
        "--modes",
        "everything",
        "stats_everything",
        "--capabilities",
        "90",
    ]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled, table = aot.read_table(output)[1], aot.read_table()[1]
    assert compiled and all(row in table for row in compiled)


def test_negative_control_a_kernel_that_spills_is_seen():
    row = next(row for row in committed() if row.kernel == "affine_kernel" and row.mode == "jsd")
    for change in ({"spill_bytes": 8}, {"wide_loads": 0}, {"narrow_loads": 40}, {"shared_bytes": 2**20}):
        with pytest.raises(AssertionError):
            assert_fits(aot.Compiled(**(row.__dict__ | change)))


@pytest.mark.slow
def test_the_launcher_compiles_once_per_configuration(tmp_path):
    """The whole way to the launch, for real: no new N and no new V compiles anything."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "triton_launches.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    others = {"stats_kernel": 1, "grad_kernel": 1, "partial_kernel": 1, "mixture_kernel": 1}
    assert said["launched"] == {"affine_kernel": 13} | others
    assert said["compiled"] == said["lengths"] == 2  # three vocabularies, four N
