"""The benchmark of the compiled products, at a size that takes no time: what it measures and what it writes."""

import csv
from dataclasses import fields

import pytest
import torch

from benchmarks import logits_gemm
from sdft_kernels import _native

pytestmark = pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built")
STAMP = {"device": "d", "torch_version": torch.__version__, "version": "0", "commit": "c", "timestamp": "t"}


def test_rows_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(logits_gemm, "SHAPES", ((3, 40, 1500),))
    monkeypatch.setattr(logits_gemm, "FEW_SHAPES", ((3, 40, 1500),))
    cases = logits_gemm.cases([1])
    assert ("weight_grad" in {case[0] for case in cases}) == (_native.cpu_isa() == "avx512_bf16")
    assert "few_logits" in {case[0] for case in cases}
    rows = [logits_gemm.measure_one(*case, repeats=3, stamp=STAMP) for case in cases]
    for row in rows:
        assert 0 < row.ours_share_of_peak < 1
        assert row.ours_error < 1e-6
        assert row.ours_gflops_per_core == pytest.approx(2e-6 * 3 * 40 * 1500 / row.ours_ms, rel=1e-3)
        if row.dtype == "bf16":
            assert row.library_error > 1e-4, "control: the library rounds to bf16"
    logits_gemm.show(rows)
    path = tmp_path / "table.csv"
    logits_gemm.write_table(path, rows)
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == [f.name for f in fields(logits_gemm.Row)]
    assert [line["product"] for line in written] == [row.product for row in rows]
    assert not list(tmp_path.glob("*.partial"))


def test_peak_refuses_an_unknown_dtype():
    with pytest.raises(RuntimeError, match="dtype must be fp32 or bf16, is fp64"):
        _native.peak_flops("fp64")
