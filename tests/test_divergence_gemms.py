"""GEMM counts and the largest tensor, seen beneath the operator; each check has a negative control that must fail.

`TorchDispatchMode` and `FlopCounterMode` do not look inside a registered operator, so the driver is called with
products that count, under a dispatch mode of its own.
"""

import pytest
import torch
from counting import LargestTensor, counting_gemm

from sdft_kernels import AffineTokenLoss, _dispatch, linear_divergence, linear_divergence_loss
from sdft_kernels._chunks import Need
from sdft_kernels._gemm import Gemm
from sdft_kernels.divergence import driver, operators, rows_native, rows_torch
from sdft_kernels.testing import make_divergence_inputs

N, V, H = 512, 4099, 16
SCRATCH = rows_torch.scratch_bytes(N, V, 4)


def budget(rows, native=False):
    """Of 32 tokens a chunk: N is 16 chunks."""
    products = Gemm(torch.float32, torch.float32, native).scratch_bytes(torch.device("cpu"), torch.empty(V, H))
    return products + rows.scratch_bytes(N, V, 4) + 32 * (2 * 4 * rows.row_stride(V) + 12 * 2 * H)


ROWS = {"torch": rows_torch, "native": rows_native}
BUDGET = budget(rows_torch)


@pytest.fixture
def count(monkeypatch):
    gemm = counting_gemm(N, V, H)
    monkeypatch.setattr(operators, "Gemm", gemm)
    return gemm.done


def drawn(**options):
    """Every target is present: a mean would leave the token out, and its products."""
    x = make_divergence_inputs(tokens=N, vocabulary=V, hidden=H, **options)
    return x.replace(target=x.target.clamp(min=0)).tensors()


def arguments(frozen=False):
    x = drawn()
    x["student_input"].requires_grad_()
    x["student_weight"].requires_grad_(not frozen)
    return x


def callable_loss(tokens, index):
    return tokens.kl_teacher_student * tokens.student_entropy


@pytest.mark.parametrize("loss", (None, AffineTokenLoss(jsd=1.0, alpha=0.5, student_entropy=0.1), callable_loss))
@pytest.mark.parametrize(("frozen", "grad", "expected"), [(False, True, 4), (True, True, 3), (False, False, 2)])
@pytest.mark.parametrize("impl", ROWS)
def test_loss_gemms(count, impl, loss, frozen, grad, expected):
    if why := _dispatch.why_not(impl, "linear_divergence", "cpu"):
        pytest.skip(why)
    options = {"token_loss": loss, "memory_budget": budget(ROWS[impl], impl == "native"), "impl": impl}
    with torch.set_grad_enabled(grad):
        value, _ = linear_divergence_loss(**arguments(frozen), **options)
    if grad:
        value.backward()
    assert sum(count) == pytest.approx(expected)
    assert len(count) == 16 * expected  # as many chunks as planned


@pytest.mark.parametrize(
    ("frozen", "grad", "outputs", "expected"),
    [
        (False, True, None, 6),
        (True, True, None, 5),
        (True, True, ("kl_teacher_student",), 3),
        (True, True, ("student_entropy", "teacher_entropy"), 3),
        (False, True, ("kl_teacher_student",), 6),
        (False, False, None, 2),
    ],
)
def test_token_gemms(count, frozen, grad, outputs, expected):
    with torch.set_grad_enabled(grad):
        tokens = linear_divergence(**arguments(frozen), outputs=outputs, memory_budget=BUDGET)
    if grad:
        sum(t.sum() for t in tokens if t is not None).backward()
    assert sum(count) == pytest.approx(expected)


def test_masked_tokens_are_not_projected(count):
    x = arguments()
    x["mask"] = torch.arange(N) % 4 == 0
    linear_divergence_loss(**x)[0].backward()
    assert sum(count) == pytest.approx(1.0)  # a quarter of four


def test_a_shared_head_is_read_once(count):
    x = arguments()
    x["teacher_weight"] = x["student_weight"]
    linear_divergence_loss(**x, memory_budget=BUDGET, impl="torch")[0].backward()
    assert sum(count) == pytest.approx(4)
    assert len(count) == 3 * 16  # one stacked product in place of two


def test_negative_control_a_wasteful_product_is_counted(count, monkeypatch):
    """Were the driver to project the student twice, the count would say so."""
    plain = driver._Call._project

    def twice(self, h_s, h_t):
        plain(self, h_s, h_t)
        return plain(self, h_s, h_t)

    monkeypatch.setattr(driver._Call, "_project", twice)
    linear_divergence_loss(**arguments(), memory_budget=BUDGET)[0].backward()
    assert sum(count) == pytest.approx(6)


def largest(x, token_loss):
    """The largest tensor that the driver makes, the weight's gradient apart (V*H < N*V/16 here)."""
    tensors = operators.Tensors(*(x.get(name) for name in operators.Tensors._fields))
    options = operators.Options(0.5, 1.0, 1.0, 1.0, None, None, torch.float32, BUDGET, True, None, "torch", None)
    with LargestTensor() as seen:
        operators.drive(tensors, options, token_loss, Need(True, True, False))
    return seen.numel


@pytest.mark.parametrize("loss", ("affine", "callable"))
def test_no_tensor_of_tokens_times_vocabulary(loss):
    x = drawn(mask=True)
    affine = driver.Affine({"kl_teacher_student": torch.ones(N), "jsd": torch.ones(N)})
    assert largest(x, affine if loss == "affine" else callable_loss) <= SCRATCH // 4 < N * V


def test_negative_control_the_reference_makes_one():
    x = drawn()
    with LargestTensor() as seen:
        linear_divergence(**x, impl="reference")
    assert seen.numel >= N * V


def test_negative_control_the_registered_operator_hides_its_tensors():
    """Why the mode sits beneath the operator: from outside nothing shows."""
    x = drawn()
    with LargestTensor() as seen, torch.no_grad():
        linear_divergence_loss(**x, memory_budget=BUDGET)
    assert seen.numel < 32 * V
