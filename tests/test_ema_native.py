"""Moving averages: the compiled loops, their twins in PyTorch, and what a pair of bf16 tensors can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import why_not

from benchmarks import ema as benchmark
from sdft_kernels import _ema, _native

ROOT = Path(__file__).resolve().parent.parent
native = pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built")
RATES = (0.0, 0.01, 0.5, 0.9, 1.0)
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, 1.17549435e-38, 1.00390625)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, any NaN being as good as any other."""
    integer = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def values(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers over 60 binary orders of magnitude, with the special ones at random places."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-30, 30, (count,), generator=generator)
    out = torch.ldexp(torch.randn(count, generator=generator), exponent)
    special = torch.rand(count, generator=generator) < 0.1
    choice = torch.randint(len(SPECIAL), (count,), generator=generator)
    return torch.where(special, torch.tensor(SPECIAL)[choice], out).to(dtype)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", RATES)
def test_native_ema_equals_its_twin(dtype: torch.dtype, rate: float) -> None:
    ema, param = torch.randn(3, 40_001), torch.randn(3, 40_001).to(dtype)
    expected = ema.clone()
    _ema._ema_update_torch(expected, param, rate)
    version = ema._version
    assert _ema._fits_native(ema, param)
    assert _ema.ema_update_(ema, param, rate) is ema
    assert ema._version > version
    torch.testing.assert_close(ema, expected, rtol=1e-6, atol=1e-6)
    if rate == 1.0:
        assert torch.equal(ema, param.float())


@native
def test_native_ema_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.sdft_kernels.ema_update_.default, (torch.randn(7), torch.randn(7), 0.1))


@native
def test_native_ema_refuses_what_it_cannot_do() -> None:
    op = torch.ops.sdft_kernels.ema_update_
    with pytest.raises(RuntimeError, match="ema must be fp32"):
        op(torch.randn(3).double(), torch.randn(3), 0.1)
    with pytest.raises(RuntimeError, match="dimension 0 ema has size 3, param has size 4"):
        op(torch.randn(3), torch.randn(4), 0.1)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(torch.randn(3, 4).t(), torch.randn(4, 3), 0.1)


@pytest.mark.parametrize("strided", [False, True])
def test_ema_without_native_code(monkeypatch: pytest.MonkeyPatch, strided: bool) -> None:
    monkeypatch.setattr(_ema, "has_native", lambda: False)
    ema, param = torch.zeros(4, 6), torch.ones(4, 6, requires_grad=True)
    view = ema.t() if strided else ema
    for _ in range(10):
        _ema.ema_update_(view, param.t() if strided else param, 0.1)
    torch.testing.assert_close(ema, torch.full((4, 6), 1 - 0.9**10))
    assert not ema.requires_grad


def test_ema_of_a_bf16_parameter_keeps_what_bf16_would_round_away() -> None:
    ema, param = torch.ones(64), torch.full((64,), 1.0078125, dtype=torch.bfloat16)
    for _ in range(100):
        _ema.ema_update_(ema, param, 0.01)
    torch.testing.assert_close(ema, torch.full((64,), 1 + 0.0078125 * (1 - 0.99**100)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("ema", "param", "rate", "message"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3), 0.1, "ema must be torch.float32, got torch.bfloat16"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), 0.1, "param must have a floating dtype, got torch.int64"),
        (torch.zeros(3), torch.zeros(4), 0.1, r"param must have ema's shape \(3,\), got \(4,\)"),
        (torch.zeros(3), torch.zeros(3), 1.5, r"rate must be in \[0, 1\], got 1.5"),
        (torch.zeros(3), torch.zeros(3), float("nan"), r"rate must be in \[0, 1\], got nan"),
    ],
)
def test_ema_refuses_bad_input(ema: torch.Tensor, param: torch.Tensor, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ema.ema_update_(ema, param, rate)


@pytest.mark.parametrize("native_code", [pytest.param(True, marks=native), False])
@pytest.mark.parametrize("param", [float("inf"), float("nan"), 2.0])
def test_rate_zero_and_one_are_exact_for_every_value(
    monkeypatch: pytest.MonkeyPatch, native_code: bool, param: float
) -> None:
    if not native_code:
        monkeypatch.setattr(_ema, "has_native", lambda: False)
    for rate, expected in ((0.0, 1.5), (1.0, param)):
        ema = _ema.ema_update_(torch.full((33,), 1.5), torch.full((33,), param), rate)
        high, low = _ema.split_hilo(torch.full((33,), 1.5))
        _ema.ema_update_hilo_(high, low, torch.full((33,), param), rate)
        for result in (ema, high.float() + low.float()):
            assert torch.equal(result.nan_to_num(nan=7.0), torch.full((33,), expected).nan_to_num(nan=7.0))


@given(seed=st.integers(0, 2**31), count=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_split_rounds_to_nearest_and_keeps_the_rest(seed: int, count: int) -> None:
    value = values(seed, count, torch.float32)
    high, low = _ema.split_hilo(value)
    assert same_bits(high, value.bfloat16())
    assert torch.equal(low[~high.isfinite()], torch.zeros_like(low[~high.isfinite()]))
    finite = high.isfinite()
    total = high[finite].float() + low[finite].float()
    assert ((total - value[finite]).abs() <= value[finite].abs() * 2.0**-17 + 1e-40).all()
    # The sum is exact, so that nothing is lost between updates.
    assert torch.equal(total.double(), high[finite].double() + low[finite].double())


@native
@given(seed=st.integers(0, 2**31), count=st.integers(0, 150), rate=st.sampled_from(RATES), wide=st.booleans())
@settings(max_examples=150, deadline=None)
def test_native_hilo_has_the_bits_of_its_twin(seed: int, count: int, rate: float, wide: bool) -> None:
    param = values(seed, count, torch.float32 if wide else torch.bfloat16)
    pair = _ema.split_hilo(values(seed + 1, count, torch.float32))
    twin = tuple(part.clone() for part in pair)
    _ema._ema_update_hilo_torch(*twin, param, rate)
    version = pair[0]._version, pair[1]._version
    result = _ema.ema_update_hilo_(*pair, param, rate)
    assert result[0] is pair[0] and result[1] is pair[1]
    assert pair[0]._version > version[0] and pair[1]._version > version[1]
    assert same_bits(pair[0], twin[0]) and same_bits(pair[1], twin[1])


@native
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", RATES[1:])
def test_an_element_does_not_depend_on_its_place(param_dtype: torch.dtype, rate: float) -> None:
    """Whole vectors, tails and threads: the same bits wherever an element stands."""
    count = 70_001  # over two threads' grain, and odd
    start, param = values(1, count, torch.float32), values(2, count, param_dtype)
    torch.set_num_threads(2)
    pair, ema = _ema.split_hilo(start), start.clone()
    _ema.ema_update_hilo_(*pair, param, rate)
    _ema.ema_update_(ema, param, rate)
    for begin, end in ((0, 1), (1, 16), (3, 40), (count - 17, count), (32_760, 32_775)):
        part = _ema.split_hilo(start[begin:end])
        alone = start[begin:end].clone()
        _ema.ema_update_hilo_(*part, param[begin:end].clone(), rate)
        _ema.ema_update_(alone, param[begin:end].clone(), rate)
        assert same_bits(part[0], pair[0][begin:end]) and same_bits(part[1], pair[1][begin:end])
        assert same_bits(alone, ema[begin:end])


BITS = """
import hashlib, numpy, torch
from sdft_kernels import _ema, _native
assert _native.has_native(), _native.why_not()
draw = numpy.random.default_rng(0).standard_normal  # torch.randn's bits depend on the instruction set
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    for rate in (0.01, 0.7):
        start, param = torch.tensor(draw((2, 5003)), dtype=torch.float32)
        param = param.to(dtype)
        pair, ema = _ema.split_hilo(start), start.clone()
        param[7], param[11] = float("inf"), float("nan")
        _ema.ema_update_hilo_(*pair, param, rate)
        _ema.ema_update_(ema, param, rate)
        for tensor in (*pair, ema):
            digest.update(tensor.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


@native
def test_every_instruction_set_gives_the_same_bits() -> None:
    digests = {}
    for capability in ("default", "avx2", "avx512"):
        if why_not("ATEN_CPU_CAPABILITY", capability):
            continue
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", BITS], env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        digests[capability] = done.stdout.strip()
    assert len(digests["default"]) == 2 * hashlib.sha256().digest_size
    assert len(set(digests.values())) == 1, digests


@native
def test_multiplication_and_addition_round_one_by_one() -> None:
    """What the bits above rest on; the control shows that a fused multiply-add would be seen on these numbers."""
    start, param = torch.randn(5000), torch.randn(5000)
    expected = start.numpy() + np.float32(0.01) * (param.numpy() - start.numpy())
    gap = (param.numpy() - start.numpy()).astype(np.float64)
    fused = (start.numpy().astype(np.float64) + np.float64(np.float32(0.01)) * gap).astype(np.float32)
    assert (fused != expected).sum() > 50
    assert np.array_equal(_ema.ema_update_(start.clone(), param, 0.01).numpy(), expected)


@native
def test_native_hilo_passes_opcheck() -> None:
    arguments = (*_ema.split_hilo(torch.randn(7)), torch.randn(7), 0.1)
    torch.library.opcheck(torch.ops.sdft_kernels.ema_update_hilo_.default, arguments)


@native
def test_native_hilo_refuses_what_it_cannot_do() -> None:
    op = torch.ops.sdft_kernels.ema_update_hilo_
    half = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="high and low must be bf16"):
        op(half, torch.zeros(3), torch.zeros(3), 0.1)
    with pytest.raises(RuntimeError, match="param must be fp32 or bf16"):
        op(half, half.clone(), torch.zeros(3).double(), 0.1)
    with pytest.raises(RuntimeError, match="dimension 0 low has size 4, param has size 3"):
        op(half, torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3), 0.1)
    with pytest.raises(RuntimeError, match="low must be contiguous"):
        op(half, torch.zeros(6, dtype=torch.bfloat16)[::2], torch.zeros(3), 0.1)
    with pytest.raises(RuntimeError, match=r"rate must be in \[0, 1\], got 2"):
        op(half, half.clone(), torch.zeros(3), 2.0)


def test_hilo_of_strided_and_of_other_parameters_takes_the_twin() -> None:
    start, param = torch.randn(5, 7), torch.randn(7, 5, dtype=torch.float64)
    high, low = (part.t().contiguous().t() for part in _ema.split_hilo(start))
    assert not _ema._fits_native(high, low, param.t())
    _ema.ema_update_hilo_(high, low, param.t(), 0.25)
    expected = start + 0.25 * (param.t().float() - start)
    torch.testing.assert_close(high.float() + low.float(), expected, rtol=2.0**-16, atol=2.0**-20)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(high=torch.zeros(3)), "high must be torch.bfloat16, got torch.float32"),
        (dict(low=torch.zeros(3)), "low must be torch.bfloat16, got torch.float32"),
        (dict(low=torch.zeros(4, dtype=torch.bfloat16)), r"param must have low's shape \(4,\), got \(3,\)"),
        (dict(param=torch.zeros(3, dtype=torch.int32)), "param must have a floating dtype, got torch.int32"),
        (dict(rate=-0.5), r"rate must be in \[0, 1\], got -0.5"),
    ],
)
def test_hilo_refuses_bad_input(changed: dict, message: str) -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    given_ = dict(high=half, low=half.clone(), param=torch.zeros(3), rate=0.1) | changed
    with pytest.raises(ValueError, match=message):
        _ema.ema_update_hilo_(**given_)


@pytest.mark.parametrize("student", ["constant", "walk"])
def test_benchmark_tells_storages_apart(student: str) -> None:
    errors = benchmark.errors(student, 0.03, elements=2000, steps=200)
    common = dict.fromkeys((field.name for field in dataclasses.fields(benchmark.Row)), "")
    rows = {
        s: benchmark.Row(**common | dict(storage=s, student=student, student_moved=0.03, error=e))
        for s, e in errors.items()
    }
    assert not benchmark.failures([rows["fp32"], rows["hilo"]])
    stuck = dataclasses.replace(rows["hilo"], error=errors["bf16"])
    assert benchmark.failures([rows["fp32"], stuck]), "plain bf16 in the pair's place must be reported"


def test_hilo_follows_where_plain_bf16_stands_still() -> None:
    """A student 1 % away: after 250 updates at rate 0.01 the fp32 average has closed 92 % of the gap."""
    start = (0.02 * torch.randn(20_000)).bfloat16()
    student = (start.float() * (1 + 0.01 * torch.randn(20_000))).bfloat16()
    gap = student.float() - start.float()
    ema, (high, low), plain = start.float(), _ema.split_hilo(start), start.clone()
    for _ in range(250):
        _ema.ema_update_(ema, student, 0.01)
        _ema.ema_update_hilo_(high, low, student, 0.01)
        plain.lerp_(student, 0.01)
    closed = [
        ((t.float() - start.float()) @ gap / (gap @ gap)).item() for t in (ema, high.float() + low.float(), plain)
    ]
    assert closed[0] == pytest.approx(1 - 0.99**250, abs=1e-3)
    assert closed[1] == pytest.approx(closed[0], rel=0.01)
    assert closed[2] < 0.1
