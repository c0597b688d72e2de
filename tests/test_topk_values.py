"""Op 2 against its fp64 reference: every support, tail and alpha; dtypes, masks, bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_cases import EVERY_OPTION, NAMED, SUPPORTS, TAILS, TRAINED, K, draw, logprobs_of_teacher, restrict, run, to

from sdft_kernels import linear_divergence
from sdft_kernels.testing import KINDS, assert_within_budget, on_the_same_ids, relative_error
from sdft_kernels.topk_divergence import linear_topk_divergence

ALPHAS = (0.0, 0.3, 1.0)
GRADS = tuple(f"grad_{name}" for name in TRAINED)
SMALL = 18 * 2**20  # bytes: 16 MiB go to rows of the head, the rest to chunks of a few tokens


def assert_equals_reference(x, options, limit=1e-10, **execution):
    actual, truth = run(x, "torch", **options, **execution), run(x, "reference", **options)
    for name, value in actual.items():
        if name == "ids":
            assert torch.equal(value, truth["ids"])
        else:
            assert relative_error(value, truth[name]) < limit, (name, options)
    return actual


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fp64_matches_autograd(support, tail, alpha):
    """Every mode x support x alpha, with and without mask, bias, softcap, clip; packed or not."""
    for extra in ({}, {"bias": True, "mask": True, "teacher_hidden": 24}):
        for options in ({}, EVERY_OPTION, {"per_entry_clip": 0.002}):
            x, mode = restrict(draw(dtype=torch.float64, vocabulary=203, **extra), support, options)
            mode |= {"tail": tail, "alpha": alpha}
            actual = assert_equals_reference(x, mode)
            assert actual["divergence"].ne(0).any() and actual["grad_student_input"].ne(0).any()
            assert_equals_reference(x, mode, pack=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
def test_fp32_is_within_budget(kind, support, tail):
    """On the ids that the op found: two logits of the search may be closer than fp32 tells apart."""
    for alpha in ALPHAS:
        x, mode = restrict(draw(kind, bias=True, mask=True), support, {"temperature": 0.8})
        mode |= {"tail": tail, "alpha": alpha}
        actual = run(x, "torch", **mode)
        same = on_the_same_ids(mode, actual)
        eager, truth = run(x, "reference", **same), run(to(x, torch.float64), "reference", **same)
        for name in actual.keys() - {"ids"}:
            assert_within_budget(actual[name], eager[name], truth[name], name=f"{name} alpha={alpha}")


@pytest.mark.parametrize("support", NAMED)
def test_ids_are_the_most_likely(support):
    x, mode = restrict(draw(bias=True, teacher_hidden=24), support)
    ids = linear_topk_divergence(**x, **mode).ids
    student = x["student_input"].double() @ x["student_weight"].double().t() + x["student_bias"].double()
    best = [set(z.topk(K).indices[n].tolist()) for z in (student, logprobs_of_teacher(x)) for n in range(37)]
    for n in range(37):
        of_student, of_teacher = best[n], best[37 + n]
        expected = dict(
            student=of_student, teacher=of_teacher,
            union=of_student | of_teacher, intersection=of_student & of_teacher,
        )  # fmt: skip
        found = [i for i in ids[n].tolist() if i != -1]
        assert len(found) == len(set(found)) and set(found) == expected[support]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", ("student", "given", "cached"))
def test_bf16_inputs_get_fp32_logits(tail, support):
    """Numbers as accurate as eager fp32 on the same bits; gradients rounded once, as they leave."""
    x, mode = restrict(draw(dtype=torch.bfloat16, bias=True, vocabulary=503), support)
    mode |= {"tail": tail, "alpha": 0.3}
    actual = run(x, "torch", **mode)
    same = on_the_same_ids(mode, actual)
    wide, truth = (run(to(x, d), "reference", **same) for d in (torch.float32, torch.float64))
    assert actual["divergence"].dtype == torch.float32 and actual["grad_student_weight"].dtype == torch.bfloat16
    assert_within_budget(actual["divergence"], wide["divergence"], truth["divergence"])
    for name in GRADS:
        assert relative_error(actual[name], truth[name]) < 0.004, name
    eager = run(x, "reference", **same)  # bf16 logits, as nearly everyone has them: the control that this can fail
    assert relative_error(eager["grad_student_input"], truth["grad_student_input"]) > 0.02


def test_autocast_rounds_the_operands_and_not_the_logits():
    x, mode = restrict(draw(), "student", {"tail": "bucket"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x, "torch", **mode)
    same, rounded = on_the_same_ids(mode, actual), to(x, torch.bfloat16)
    eager, truth = (run(to(rounded, d), "reference", **same) for d in (torch.float32, torch.float64))
    for name in ("divergence", "grad_student_input", "grad_student_weight"):
        assert actual[name].dtype == torch.float32
        assert_within_budget(actual[name], eager[name], truth[name], name=name)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_vocabulary_is_op_1(alpha, tail):
    """k = V leaves nothing out, whatever becomes of the rest (a bucket holds at least 1e-7 of either side)."""
    x = draw(dtype=torch.float64, vocabulary=53, bias=True)
    full = linear_divergence(**x, jsd_alpha=alpha).jsd
    for support in ("student", "teacher", "union"):
        tokens = linear_topk_divergence(**x, k=53, support=support, tail=tail, alpha=alpha)
        assert relative_error(tokens.divergence, full) < (1e-5 if tail == "bucket" else 1e-11)
        assert tokens.ids[:, :53].sort(-1).values.eq(torch.arange(53)).all() and tokens.ids[:, 53:].eq(-1).all()
    assert relative_error(tokens.student_mass, torch.ones(37).double()) < 1e-12


def test_a_support_of_one_has_nothing_to_tell_apart():
    """Renormalised, one outcome is certain on both sides (a trap of top-k losses at k = 1); a bucket still tells."""
    x = draw(dtype=torch.float64, vocabulary=203)
    flat = run(x, "torch", k=1)
    assert flat["divergence"].eq(0).all() and flat["grad_student_weight"].eq(0).all()
    for tail in ("bucket", "drop"):
        actual = assert_equals_reference(x, {"k": 1, "tail": tail})
        assert actual["divergence"].ne(0).all()


@pytest.mark.parametrize("support", ("given", "cached", "teacher"))
def test_numbers_that_cost_a_projection_come_when_asked_for(support):
    x, mode = restrict(draw(dtype=torch.float64, vocabulary=203, mask=True), support)
    free = linear_topk_divergence(**x, **mode)
    assert free.student_mass is None and free.student_logprob is None
    assert (free.teacher_mass is None) == (support == "given")
    names = ("student_mass", "teacher_mass", "student_logprob")
    actual, truth = (linear_topk_divergence(**x, **mode, outputs=names, impl=i) for i in ("torch", "reference"))
    assert actual.divergence is None and actual.ids is None
    for name in names:
        value = getattr(actual, name)
        assert not value.requires_grad and relative_error(value, getattr(truth, name)) < 1e-12, name


def test_masses_and_ids_have_no_gradient():
    x, mode = restrict(draw(), "student")
    x["student_input"].requires_grad_()
    tokens = linear_topk_divergence(**x, **mode)
    assert [n for n, v in tokens._asdict().items() if v is not None and v.requires_grad] == ["divergence"]
    assert tokens.student_mass is not None and tokens.teacher_mass is None


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", ("renormalize", "bucket"))
def test_frozen_heads_and_frozen_inputs(support, tail):
    x, mode = restrict(draw(dtype=torch.float64, vocabulary=203, bias=True, mask=True), support, {"tail": tail})
    for trained in (("student_input",), ("student_weight",), ("student_bias",), ("student_input", "student_bias")):
        actual = assert_equals_reference(x, mode | {"trained": trained})
        assert {n for n in actual if n.startswith("grad_")} == {f"grad_{n}" for n in trained}


@pytest.mark.parametrize("tail", TAILS)
def test_a_tied_head(tail):
    """The teacher's head is the student's: one stacked product, and the gradient is the student's alone."""
    x = draw(dtype=torch.float64, vocabulary=203)
    x["teacher_weight"] = x["student_weight"]
    truth = run(x, "reference", k=K, support="union", tail=tail)
    tied = to(x, torch.float64)
    tied["teacher_weight"] = tied["student_weight"].requires_grad_()
    linear_topk_divergence(**tied, k=K, support="union", tail=tail).divergence.backward(
        torch.randn(37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    assert relative_error(tied["student_weight"].grad, truth["grad_student_weight"]) < 1e-11


@pytest.mark.parametrize("tail", TAILS)
def test_upstream_gradients_and_retained_graphs(tail):
    """Each token takes its own; a graph kept is not used up; there is no second derivative."""
    x, mode = restrict(draw(dtype=torch.float64, vocabulary=203), "student", {"tail": tail})
    for frozen in (False, True):
        leaves = {n: x[n].clone().requires_grad_() for n in TRAINED[: 1 if frozen else 2]}
        d = linear_topk_divergence(**(x | leaves), **mode).divergence
        one = torch.autograd.grad(d.sum(), list(leaves.values()), retain_graph=True)
        again = torch.autograd.grad(d.sum(), list(leaves.values()), retain_graph=True)
        twice = torch.autograd.grad(2 * d[4:9].sum(), list(leaves.values()), retain_graph=True)
        for a, b in zip(one, again, strict=True):
            assert torch.equal(a, b)
        assert relative_error(twice[0][4:9], 2 * one[0][4:9]) < 1e-14 and twice[0][9:].eq(0).all()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad((scale * d).sum(), leaves["student_input"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_same_bits_twice_and_nearly_the_same_for_any_budget(support, tail):
    x, mode = restrict(draw(tokens=150, bias=True), support, {"tail": tail})
    one, two = run(x, "torch", **mode), run(x, "torch", **mode)
    small = run(x, "torch", **mode, memory_budget=SMALL + 5 * 300_000)
    for name in one:
        assert torch.equal(one[name], two[name]), name
        limit = 1e-4 if name == "divergence" or name.startswith("grad_") else 1e-6  # differences of near logits
        assert relative_error(small[name], one[name]) < limit, name


def test_distinct_ids_in_many_slices(monkeypatch):
    """The rows of the head that a few tokens use need not fit the scratch at once."""
    from sdft_kernels.topk_divergence import rows_sparse

    x, mode = restrict(draw(dtype=torch.float64, tokens=150, vocabulary=203, bias=True), "given")
    whole = run(x, "torch", **mode)
    monkeypatch.setitem(rows_sparse.SCRATCH_BYTES, "cpu", 13 * (2 * 32 + 64) * 8)
    for name, value in run(x, "torch", **mode).items():
        # A KL of 1e-5 is a gap of 4e-3 between logits of 25, squared: it carries 2e-12 of their last bit.
        assert relative_error(value, whole[name]) < 1e-11, name


def test_non_contiguous_views():
    x, mode = restrict(draw(dtype=torch.float64, vocabulary=203), "given")
    truth = run(x, "torch", **mode)
    wide = torch.empty(74, 35, dtype=torch.float64)
    wide[::2, 1:-2] = x["student_input"]
    x |= {"student_input": wide[::2, 1:-2], "teacher_weight": x["teacher_weight"].t().contiguous().t()}
    ids = torch.full((37, 2 * K), -1)
    ids[:, ::2] = mode["support"]
    tokens = linear_topk_divergence(**x, support=ids[:, ::2])
    assert relative_error(tokens.divergence, truth["divergence"]) < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9), vocabulary=st.integers(2, 70), hidden=st.integers(1, 9), k=st.integers(1, 70),
    mask=st.booleans(), bias=st.booleans(), softcap=st.sampled_from((None, 15.0)), tail=st.sampled_from(TAILS),
    support=st.sampled_from(NAMED), alpha=st.sampled_from((0.0, 1e-3, 0.5, 0.9, 1.0)),
)  # fmt: skip
def test_any_shape(tokens, vocabulary, hidden, k, mask, bias, softcap, tail, support, alpha):
    x = draw("flat", tokens=tokens, vocabulary=vocabulary, hidden=hidden, mask=mask, bias=bias, dtype=torch.float64)
    mode = dict(k=min(k, vocabulary), tail=tail, support=support, alpha=alpha, student_softcap=softcap)
    actual, truth = run(x, "torch", **mode), run(x, "reference", **mode)
    for name, value in actual.items():
        if name == "ids":
            assert torch.equal(value, truth[name])
            continue
        # A full vocabulary leaves a bucket of 1e-7, less what rounds: log of it is good to 1e-9.
        assert torch.allclose(value, truth[name], rtol=1e-7, atol=1e-12), name


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("support", "tail"), (("union", "renormalize"), ("cached", "bucket"), ("given", "renormalize"))
)
def test_registered_operators(support, tail):
    from sdft_kernels.topk_divergence.operators import Options, Tensors

    x, mode = restrict(draw(bias=True, mask=True, vocabulary=103), support)
    ids, logprobs = mode.get("teacher_topk", (None, None))
    given = mode["support"] if support == "given" else None
    named = {"teacher_ids": ids, "teacher_logprobs": logprobs, "given": given} | x
    tensors = Tensors(*(named.get(name) for name in Tensors._fields))
    name = {"given": "given", "cached": "teacher"}.get(support, support)
    options = Options(K, name, tail, 0.3, None, 0.7, 1.0, 1.0, 20.0, None, torch.float32, None, True, None)
    operators = torch.ops.sdft_kernels
    arguments = (*tensors, ["divergence", "ids"], tail == "bucket", *options)
    torch.library.opcheck(operators.linear_topk_divergence.default, arguments)
    _, ids, entries, rest, _ = operators.linear_topk_divergence(*arguments)
    saved = (*tensors[:3], tensors.mask, ids, entries, rest)
    torch.library.opcheck(operators.linear_topk_divergence_backward.default, (*saved, True, True, True, *options))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("tail", ("renormalize", "bucket"))
def test_compiles_to_one_graph_with_any_number_of_tokens(tail):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(*tensors):
        tokens = linear_topk_divergence(*tensors, k=K, tail=tail)
        return (tokens.divergence * tokens.student_mass).sum()

    for count in (37, 20):
        x = draw(tokens=count, vocabulary=203)
        rest = [x[n] for n in ("student_weight", "teacher_input", "teacher_weight")]
        leaf, twin = (x["student_input"].clone().requires_grad_() for _ in range(2))
        compiled(leaf, *rest).backward()
        tokens = linear_topk_divergence(twin, *rest, k=K, tail=tail)
        (tokens.divergence * tokens.student_mass).sum().backward()
        assert relative_error(leaf.grad, twin.grad) < 1e-5
