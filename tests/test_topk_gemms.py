"""GEMM counts of op 2 and its largest tensor, seen beneath the operators; each check has a control that must fail."""

import pytest
import torch
from counting import LargestTensor, counting_gemm
from topk_cases import TAILS, draw, restrict

from sdft_kernels._chunks import Need
from sdft_kernels.topk_divergence import driver, linear_topk_divergence, operators, rows_sparse, rows_torch

N, V, H, K = 512, 4099, 16, 4
SCRATCH = rows_torch.scratch_bytes(N, V, 4) + rows_sparse.SCRATCH_BYTES["cpu"]
BUDGET = SCRATCH + 32 * (2 * 4 * V + 12 * 2 * H + driver.SUPPORT_COPIES * 8 * 2 * K)  # 32 tokens and more a chunk


@pytest.fixture
def count(monkeypatch):
    gemm = counting_gemm(N, V, H)
    monkeypatch.setattr(operators, "Gemm", gemm)
    return gemm


def arguments(support, frozen=False, **options):
    x, mode = restrict(draw(tokens=N, vocabulary=V, hidden=H), support, options, k=K)
    x["student_input"].requires_grad_()
    x["student_weight"].requires_grad_(not frozen)
    return x | mode | {"memory_budget": BUDGET}


# support -> GEMMs of a call on the whole head: (renormalised, with a dense gradient: trainable, frozen, without grad)
COST = {
    "student": (1, 5, 3, 2),
    "teacher": (1, 5, 3, 2),
    "union": (2, 5, 3, 2),
    "intersection": (2, 5, 3, 2),
    "given": (0, 5, 3, 2),
    "cached": (0, 4, 2, 1),
    "cached-intersection": (1, 4, 2, 1),
}


@pytest.mark.parametrize(("support", "cost"), COST.items())
@pytest.mark.parametrize("tail", TAILS)
def test_gemms(count, support, cost, tail):
    for frozen, grad, dense in ((False, True, cost[1]), (True, True, cost[2]), (False, False, cost[3])):
        count.done.clear()
        count.sparse.clear()
        with torch.set_grad_enabled(grad):
            value = linear_topk_divergence(**arguments(support, frozen, tail=tail)).divergence
        if grad:
            value.sum().backward()
        assert sum(count.done) == pytest.approx(cost[0] if tail == "renormalize" else dense), (frozen, grad)
        # At most two gathered logits and two gradients, each on the distinct ids of 64 tokens.
        width = 2 * K if support == "union" else K
        assert sum(count.sparse) <= 4 * rows_sparse.TOKENS["cpu"] * width / V
        assert tail == "renormalize" or not count.sparse


def test_upstream_gradients_per_token_cost_nothing_more(count):
    value = linear_topk_divergence(**arguments("student")).divergence
    (value * torch.randn(N)).sum().backward(retain_graph=True)
    (value * torch.randn(N)).sum().backward()
    assert sum(count.done) == pytest.approx(1)


def test_masses_of_given_ids_cost_a_projection_each_when_asked_for(count):
    for outputs, expected in ((None, 0), (("student_mass",), 1), (("student_mass", "teacher_mass"), 2)):
        count.done.clear()
        linear_topk_divergence(**arguments("given"), outputs=outputs)
        assert sum(count.done) == pytest.approx(expected)


def test_masked_tokens_are_not_projected(count):
    x = arguments("student", tail="bucket")
    linear_topk_divergence(**(x | {"mask": torch.arange(N) % 4 == 0})).divergence.sum().backward()
    assert sum(count.done) == pytest.approx(5 / 4)


def test_a_shared_head_is_read_once(count):
    x = arguments("union")
    x["teacher_weight"] = x["student_weight"]
    with torch.no_grad():
        linear_topk_divergence(**x)
    stacked, parts = len(count.done), sum(count.done)
    assert parts == pytest.approx(2)
    count.done.clear()
    with torch.no_grad():
        linear_topk_divergence(**(x | {"teacher_weight": x["student_weight"].clone()}))
    assert len(count.done) == 2 * stacked


def test_negative_control_a_wasteful_product_is_counted(count, monkeypatch):
    plain = driver._Forward._project

    def twice(self, *args):
        plain(self, *args)
        return plain(self, *args)

    monkeypatch.setattr(driver._Forward, "_project", twice)
    linear_topk_divergence(**arguments("student")).divergence.sum().backward()
    assert sum(count.done) == pytest.approx(2)


@pytest.mark.parametrize("support", COST)
@pytest.mark.parametrize("tail", TAILS)
def test_no_tensor_of_tokens_times_vocabulary(support, tail):
    x = arguments(support, tail=tail)
    ids, logprobs = x.get("teacher_topk", (None, None))
    given = x["support"] if support == "given" else None
    named = {"teacher_ids": ids, "teacher_logprobs": logprobs, "given": given} | x
    tensors = operators.Tensors(*(named.get(name) for name in operators.Tensors._fields))
    name = {"cached": "teacher", "cached-intersection": "intersection"}.get(support, support)
    o = operators.Options(K, name, tail, 0.5, None, 1.0, 1.0, 1.0, None, None, torch.float32, BUDGET, True, None)
    with LargestTensor() as seen:
        result = operators.drive(tensors, ("divergence",), False, o)
        operators._backward(*tensors[:3], None, result.ids, result.entries, result.rest, *Need(True, True, False), *o)
    assert seen.numel * 4 <= BUDGET - rows_sparse.SCRATCH_BYTES["cpu"]
    assert seen.numel < N * V // 2


def test_negative_control_the_reference_makes_one():
    with LargestTensor() as seen:
        linear_topk_divergence(**arguments("student"), impl="reference")
    assert seen.numel >= N * V
