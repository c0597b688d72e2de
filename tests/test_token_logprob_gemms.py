"""GEMM counts of op 3 and its largest tensor, seen beneath the operator; each check has a control that must fail."""

import pytest
import torch
from counting import LargestTensor, counting_gemm

from sdft_kernels._chunks import Need
from sdft_kernels.testing import make_divergence_inputs
from sdft_kernels.token_logprob import driver, linear_token_logprob, operators, rows_torch

N, V, H = 512, 4099, 16
SCRATCH = rows_torch.scratch_bytes(N, V, 4)
BUDGET = SCRATCH + 32 * (4 * V + 12 * H)  # 32 tokens a chunk: N is 16 chunks


@pytest.fixture
def count(monkeypatch):
    gemm = counting_gemm(N, V, H)
    monkeypatch.setattr(operators, "Gemm", gemm)
    return gemm.done


def arguments(frozen=False, mask=None):
    x = make_divergence_inputs(tokens=N, vocabulary=V, hidden=H)
    x.student_input.requires_grad_()
    x.student_weight.requires_grad_(not frozen)
    return dict(input=x.student_input, weight=x.student_weight, target=x.target, mask=mask, memory_budget=BUDGET)


@pytest.mark.parametrize(
    ("frozen", "grad", "outputs", "expected"),
    [
        (False, True, None, 4),
        (True, True, None, 3),
        (True, True, ("logprob",), 2),
        (True, True, ("logprob", "lse"), 3),
        (False, True, ("logprob",), 4),
        (False, False, None, 1),
    ],
)
def test_gemms(count, frozen, grad, outputs, expected):
    with torch.set_grad_enabled(grad):
        tokens = linear_token_logprob(**arguments(frozen), outputs=outputs)
    if grad:
        sum(t.sum() for t in tokens if t is not None).backward()
    assert sum(count) == pytest.approx(expected)
    assert len(count) == 16 * expected  # as many chunks as planned


def test_masked_tokens_are_not_projected(count):
    linear_token_logprob(**arguments(mask=torch.arange(N) % 4 == 0)).logprob.sum().backward()
    assert sum(count) == pytest.approx(1.0)  # a quarter of four


def test_negative_control_a_wasteful_product_is_counted(count, monkeypatch):
    plain = driver._Call.run

    def twice(self, *args):
        plain(self, *args)
        plain(self, *args)

    monkeypatch.setattr(driver._Call, "run", twice)
    with torch.no_grad():
        linear_token_logprob(**arguments())
    assert sum(count) == pytest.approx(2)


def test_no_tensor_of_tokens_times_vocabulary():
    x = arguments()
    tensors = operators.Tensors(x["input"], x["weight"], None, x["target"], None)
    options = operators.Options(1.0, 1.0, None, torch.float32, BUDGET, True, None)
    with LargestTensor() as seen:
        operators.drive(tensors, ("logprob", "entropy", "lse"), torch.ones(3, N), Need(True, True, False), options)
    assert seen.numel <= max(SCRATCH // 4, 32 * V) < N * V


def test_negative_control_the_reference_makes_one():
    with LargestTensor() as seen:
        linear_token_logprob(**(arguments() | {"memory_budget": None}), impl="reference")
    assert seen.numel >= N * V
