"""Ahead-of-time compilation of the fused attention, without a GPU: registers, spills, shared memory, tensor cores.

The committed table holds every kernel x mode x head size x capability and is as fresh as the sources it was made from;
one mode is compiled again here for sm_90.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot, aot_attention  # noqa: E402
from sdft_kernels.prefix_attention import fused_triton  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PINNED = "3.7.1"
INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# 32 rows are too few for wgmma and tcgen05, and more spill: the JSON says how much.
TOO_SMALL = {("grad_query_kernel", 256), ("grad_key_value_kernel", 256)}


def _value(text):
    return int(text) if text.isdigit() else text


def committed():
    return [
        aot_attention.Compiled(**{f.name: _value(row[f.name]) for f in fields(aot_attention.Compiled)})
        for row in aot.read_table(aot_attention.TABLE)[1]
    ]


def assert_fits(row):
    assert row.spill_bytes == 0, row
    assert row.registers * 32 * row.num_warps <= 65536, row
    assert row.shared_bytes <= aot.SHARED_LIMIT[row.capability] * 1024, row
    small = (row.kernel, row.size) in TOO_SMALL
    assert row.tensor_core == ("HMMA" if small else INSTRUCTION[row.capability]), row


def test_the_table_is_complete_and_every_kernel_fits():
    rows = committed()
    expected = Counter()
    for job in aot_attention.jobs():
        for kernel, name in aot_attention.KERNELS.items():
            line = fused_triton.choose(name, job.size, job.capability)
            expected[(kernel, job.mode, job.size, *line[1:], job.capability)] += 1
    found = Counter(
        (r.kernel, r.mode, r.size, r.block_m, r.block_n, r.num_warps, r.num_stages, r.capability) for r in rows
    )
    assert found == expected
    for row in rows:
        assert_fits(row)
    said = aot.read_table(aot_attention.TABLE)[0]
    assert said == aot_attention.source_hash(), "the kernels changed: run python -m benchmarks.aot_attention"


def test_negative_control_a_kernel_that_does_not_fit_is_seen():
    row = next(row for row in committed() if row.capability == 90 and row.size == 128)
    for change in ({"spill_bytes": 8}, {"shared_bytes": 2**20}, {"tensor_core": "HMMA"}, {"registers": 400}):
        with pytest.raises(AssertionError):
            assert_fits(aot_attention.Compiled(**(row.__dict__ | change)))


@pytest.mark.slow
@pytest.mark.skipif(
    pytest.importorskip("triton").__version__ != PINNED, reason="registers are those of the pinned compiler"
)
def test_kernels_compile_to_what_the_table_says(tmp_path):
    """In a process of its own: here kernels are interpreted."""
    output = tmp_path / "table.csv"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    options = ["--modes", "cached", "--sizes", "128", "--capabilities", "90", "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.aot_attention", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled, table = (aot.read_table(path)[1] for path in (output, aot_attention.TABLE))
    assert len(compiled) == 3 and all(row in table for row in compiled)
