"""`check` finds what is wrong: a wrong value, a wrong gradient, a NaN, a missing number, a raise."""

import pytest
import torch

import sdft_kernels.testing
from sdft_kernels import _dispatch, _ema, _native
from sdft_kernels.cli import __main__ as cli
from sdft_kernels.cli import _check_ops, check, env
from sdft_kernels.divergence import rows_torch
from sdft_kernels.topk_divergence import rows_sparse


@pytest.fixture(scope="module")
def report():
    """Every row of a check of this machine as it is."""
    return [job() for job in check.check_jobs("cpu", ("fp32", "bf16"))]


def test_every_op_implementation_dtype_and_scenario_is_checked_and_ok(report):
    assert [row.cells() for row in report if not row.ok] == []
    names = {scenario.name for scenario in check.scenarios()}
    for op, dispatched in env.OPS.items():
        if op == "shared_prefix_attention":  # has no LM head, hence cases of its own
            continue
        available = [n for n, why in _dispatch.available(dispatched).items() if why == "available"]
        assert "torch" in available
        for impl in (n for n in available if n != "reference"):
            for dtype in ("fp32", "bf16"):
                assert {r.case for r in report if (r.op, r.impl, r.dtype) == (op, impl, dtype)} == names
    assert {row.op for row in report} == {*env.OPS, env.EMA}
    attention = {(row.impl, row.dtype, row.case) for row in report if row.op == "shared_prefix_attention"}
    available = [n for n, why in _dispatch.available("shared_prefix_attention").items() if why == "available"]
    for impl in (name.replace("torch", "composition") for name in available if name != "reference"):
        for dtype in ("fp32", "bf16"):
            assert {(impl, dtype, case) for case in _check_ops.ATTENTION_CASES} <= attention
    implementations = {row.impl for row in report if row.op == "ema_update_"}
    assert implementations == ({"torch", "native"} if _native.has_native() else {"torch"})


def test_no_op_is_left_out():
    """An op that is added to the public names or to the table of implementations must be in `check` and `env`."""
    public = {name for name in sdft_kernels.__all__ if name.startswith(("linear_", "shared_"))}
    assert public == set(env.OPS)
    assert set(env.OPS.values()) == set(_dispatch._WRITTEN)
    assert set(env.OPS) == {*_check_ops.RUNS, "shared_prefix_attention"}
    assert set(env.implementation_report()) == {*env.OPS, env.EMA}


def test_wrong_attention_fails(monkeypatch):
    right = _check_ops.attention

    def wrong(*arguments):
        actual, *others = right(*arguments)
        return actual | {"grad_key": actual["grad_key"] * 1.01}, *others

    monkeypatch.setattr(_check_ops, "attention", wrong)
    rows = [job() for job in check._attention_jobs("cpu", ("fp32", "bf16"))]
    assert rows and not any(row.ok for row in rows) and {row.quantity for row in rows} == {"grad_key"}


@pytest.fixture
def few(monkeypatch):
    """Two scenarios are enough to see that a failure is seen."""
    some = check.scenarios()[:2]
    monkeypatch.setattr(check, "scenarios", lambda: some)


def run_check(capsys):
    status = cli.main(["check", "--device", "cpu", "--dtype", "fp32"])
    return status, capsys.readouterr().out


def test_status_and_table(few, capsys):
    status, out = run_check(capsys)
    lines = out.splitlines()
    assert status == 0 and "FAILED" not in out
    assert lines[1].split() == ["op", "impl", "dtype", "case", "worst", "error", "eager", "error", "limit"]
    assert any("impl triton: not checked" in line for line in lines)
    ok = sum(line.endswith(" ok") for line in lines[3:-1])
    assert lines[-1] == f"{ok} of {ok} ok"


@pytest.mark.parametrize(
    ("quantity", "spoil"),
    [
        ("grad_student_weight", lambda value: value * (1 + 1e-3)),
        ("kl_teacher_student", lambda value: torch.cat([value[:-1], value[-1:] * 1.01])),
        ("student_entropy", lambda value: value.index_fill(0, torch.tensor([0]), float("nan"))),
    ],
)
def test_a_wrong_number_of_one_implementation_fails(quantity, spoil, few, monkeypatch, capsys):
    right = sdft_kernels.testing.run_divergence

    def wrong(inputs, impl, upstream, **options):
        numbers = right(inputs, impl, upstream, **options)
        return numbers | {quantity: spoil(numbers[quantity])} if impl == "torch" else numbers

    monkeypatch.setattr(sdft_kernels.testing, "run_divergence", wrong)
    status, out = run_check(capsys)
    failed = [line for line in out.splitlines() if line.endswith("FAILED")]
    assert status == 1 and failed
    assert all(line.startswith("linear_divergence  ") for line in failed if not line[0].isdigit())
    assert any(quantity in line for line in failed)


def test_a_wrong_row_kernel_fails(few, monkeypatch, capsys):
    """The negative control beneath the operator: the row kernel's gradient of the logits, off by 0.1 %."""
    right = rows_torch.affine_

    def wrong(student, *arguments, **options):
        answer = right(student, *arguments, **options)
        student.mul_(1.001)
        return answer

    monkeypatch.setattr(rows_torch, "affine_", wrong)
    status, out = run_check(capsys)
    assert status == 1 and "grad_student" in out


def test_a_wrong_row_kernel_of_the_sparse_gradient_fails(few, monkeypatch, capsys):
    """Its modes are told apart: a dense tail takes another path and stays right."""
    right = rows_sparse.gradients_

    def wrong(*arguments, **options):
        answer = right(*arguments, **options)
        return answer if answer is None else answer * 1.02

    monkeypatch.setattr(rows_sparse, "gradients_", wrong)
    status, out = run_check(capsys)
    failed = [line for line in out.splitlines() if line.endswith("FAILED")]
    assert status == 1 and failed
    assert all(line.startswith("linear_topk_divergence") for line in failed if not line[0].isdigit())
    assert any("/renormalize grad_student_input" in line for line in failed)


def test_modes_of_op_2_take_every_support_and_tail_and_alpha_regime():
    supports, tails, alphas = zip(*_check_ops.TOPK_MODES, strict=True)
    assert {"student", "union", "cached", "given"} <= set(supports)
    assert set(tails) == {"renormalize", "bucket", "drop"}
    assert {0.0, 1.0} < set(alphas)


def test_a_raise_is_a_row_and_does_not_end_the_check(few, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("cannot launch\nsecond line")

    monkeypatch.setattr(_ema, "ema_update_", broken)
    status, out = run_check(capsys)
    assert status == 1
    assert "raised RuntimeError: cannot launch second line" in out
    # Both dtypes of every op and implementation; op 1, which stands there twice, has native rows too.
    # Attention, with cases of its own, has as many; its fused kernels and those of op 1 stand beside PyTorch's.
    rows = len(env.OPS) + 3 * _native.has_native()
    assert sum(line.endswith(" ok") for line in out.splitlines()) == 2 * rows


def test_a_missing_number_fails():
    row = check.Row("op", "impl", "fp32", "case")
    worst = check._worst(row, {}, {"kl": torch.ones(2)}, {"kl": torch.ones(2)})
    assert not worst.ok and "nothing for kl" in worst.cells()[4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys):
    assert cli.main(["check", "--device", "cuda"]) == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().err
