"""Op 4: values and gradients against sequences attended one by one; invariance; inputs at the edge."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import TREES, Case, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sdft_kernels import _native
from sdft_kernels.prefix_attention import (
    PrefixTree,
    composition,
    part_dense,
    part_flash,
    parts,
    shared_prefix_attention,
)
from sdft_kernels.testing import assert_within_budget, relative_error

# Windows of 3 and 8 are shorter than most suffixes, 25 is shorter than most prompts, 400 cuts nothing.
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "window 25": {"window": 25},
    "window 400": {"window": 400},
    "window and softcap": {"window": 8, "softcap": 2.0},
    "window 3 and softcap": {"window": 3, "softcap": 2.0},
    "sinks": {"sinks": True},
    "cached prefix": {"prefix": 19},
    "everything": {"prefix": 19, "window": 23, "softcap": 3.0, "sinks": True, "scale": 0.2},
    "sinks and window": {"prefix": 19, "window": 8, "sinks": True},
}
SHAPES = list(itertools.product([(1, 1), (2, 1), (4, 2), (4, 1), (4, 4)], [32, 64, 128, 256]))


native = pytest.param("native", marks=pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built"))
on_cpu = pytest.mark.parametrize("impl", ["composition", native])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that trees of a few tokens already cross, aligned with nothing; some rows see none of their first keys."""
    monkeypatch.setattr(parts, "BAND_ROWS", 7)
    monkeypatch.setattr(composition, "BLOCK_ROWS", 5)
    monkeypatch.setattr(composition, "BLOCK_KEYS", 4)


def assert_equals(case: Case, impl: str, other: str, tolerance: float, grad_lse: bool = False) -> None:
    grad = torch.randn_like(case.query)
    upstream = torch.randn(case.query.shape[:2], dtype=grad.dtype) if grad_lse else None
    actual, expected = run(case, impl, grad, upstream), run(case, other, grad, upstream)
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert actual[name].dtype == value.dtype
        assert relative_error(actual[name], value) < tolerance, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_reference_is_every_sequence_alone(tree, options):
    assert_equals(make_case(PrefixTree(*tree), **options), "reference", "alone", 1e-12, grad_lse=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_composition_is_the_reference(tree, options):
    assert_equals(make_case(PrefixTree(*tree), **options), "composition", "reference", 1e-10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_of_the_lse(options):
    assert_equals(make_case(PrefixTree(*TREES["depth 3"]), **options), "composition", "reference", 1e-10, grad_lse=True)


def test_gradient_of_the_lse_alone():
    case = make_case(PrefixTree(*TREES["depth 3"]), sinks=True)
    leaves = [x.requires_grad_() for x in (case.query, case.key, case.value, case.sinks)]
    grads = []
    for impl in ("reference", "composition"):
        _, lse = shared_prefix_attention(*leaves[:3], case.tree, sinks=case.sinks, return_lse=True, impl=impl)
        grads.append(torch.autograd.grad(lse.square().sum(), leaves, allow_unused=True))
    for i in (0, 1, 3):
        assert relative_error(grads[1][i], grads[0][i]) < 1e-10
    assert not grads[1][2].any()  # the value has no part in it


@pytest.mark.parametrize(("heads", "size"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 2.0}], ids=["flash", "dense"])
def test_heads_and_sizes(heads, size, options):
    case = make_case(PrefixTree(*TREES["two groups"]), heads, size, prefix=7, **options)
    assert_equals(case, "composition", "reference", 1e-10)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 64), ((4, 1), 32), ((4, 2), 128), ((2, 1), 256)])
@pytest.mark.parametrize("name", ["plain", "softcap", "window 25", "everything", "sinks and window"])
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_error_budget(impl, dtype, heads, size, name, sharpness):
    tree = PrefixTree([300, 40, 0, 1, 70, 150], [-1, 0, 0, 0, 1, -1])
    narrow = make_case(tree, heads, size, sharpness=sharpness, **OPTIONS[name]).to(dtype)
    grad = torch.randn_like(narrow.query)
    truth = run(narrow.to(torch.float64), "alone", grad)
    eager = run(narrow, "alone", grad)
    for key, value in run(narrow, impl, grad).items():
        if key != "grad_sinks":  # a sum over rows that cancels to 1/40 of its terms here: luck
            assert_within_budget(value, eager[key], truth[key], name=key)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sinks", "everything", "sinks and window"])
def test_error_budget_of_the_sinks(impl, dtype, name):
    narrow = make_case(PrefixTree([300, 40, 0, 1, 70, 150], [-1, 0, 0, 0, 1, -1]), **OPTIONS[name]).to(dtype)
    wide = narrow.to(torch.float64)
    grad = run(wide, "alone", torch.randn_like(wide.query))["out"].to(dtype)  # so that all terms have one sign
    truth, eager, actual = (
        run(case, by, grad)["grad_sinks"] for case, by in ((wide, "alone"), (narrow, "alone"), (narrow, impl))
    )
    assert_within_budget(actual, eager, truth)


@on_cpu
def test_bf16_key_gradients_do_not_grow_with_rows_and_heads(impl):
    # The CPU kernel's own bf16 sums of dK and dV are off twice as much as plain PyTorch.
    narrow = make_case(PrefixTree([64, 2000], [-1, 0]), (8, 1), 32).to(torch.bfloat16)
    grad = torch.randn_like(narrow.query)
    truth, eager = run(narrow.to(torch.float64), "reference", grad), run(narrow, "alone", grad)
    actual = run(narrow, impl, grad)
    for name in ("grad_query", "grad_key", "grad_value"):
        assert relative_error(actual[name], truth[name]) < relative_error(eager[name], truth[name]), name


@on_cpu
def test_bf16_outputs_do_not_grow_with_depth(impl):
    # A running output kept in bf16 is off 1.5 times as much as plain PyTorch.
    tree = PrefixTree([8] * 40, range(-1, 39))
    narrow = make_case(tree, size=64).to(torch.bfloat16)
    grad = torch.randn_like(narrow.query)
    truth, eager, actual = (
        run(case, by, grad)["out"]
        for case, by in ((narrow.to(torch.float64), "alone"), (narrow, "alone"), (narrow, impl))
    )
    assert relative_error(actual, truth) < relative_error(eager, truth)


def test_dropping_the_gradient_through_the_lse_is_seen(monkeypatch):
    # A part's backward with its own output and LSE instead of the merged ones: what autograd over flash calls gives.
    def own_backward(merged, query, key, value, part, scoring):
        out, lse = part_flash.forward(query, key, value, part, scoring)
        weight = torch.exp(lse - merged.lse)[..., None]
        return backward(merged._replace(grad=merged.grad * weight, out=out, lse=lse), query, key, value, part, scoring)

    backward = part_flash.backward
    monkeypatch.setattr(part_flash, "backward", own_backward)
    case = make_case(PrefixTree([64, 16, 16], [-1, 0, 0]))
    grad = torch.randn_like(case.query)
    wrong, truth = run(case, "composition", grad), run(case, "reference", grad)
    assert relative_error(wrong["out"], truth["out"]) < 1e-12
    assert relative_error(wrong["grad_value"], truth["grad_value"]) < 1e-12
    assert relative_error(wrong["grad_key"], truth["grad_key"]) > 0.03


def test_gradcheck():
    case = make_case(PrefixTree([3, 2, 0, 2], [-1, 0, 0, 1]), (2, 1), 4, prefix=2, sinks=True)
    leaves = [x.requires_grad_() for x in (case.query, case.key, case.value, case.sinks)]

    def op(query, key, value, sinks):
        return shared_prefix_attention(
            query, key, value, case.tree, sinks=sinks, window=4, prefix_kv=case.prefix_kv, return_lse=True
        )

    assert torch.autograd.gradcheck(op, leaves)


@on_cpu
@pytest.mark.parametrize("options", [{}, {"window": 150}, {"softcap": 5.0}, {"sinks": True, "prefix": 33}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_segment_has_the_same_bits_among_any_neighbours(impl, dtype, options):
    tree = PrefixTree([17, 333, 41, 200, 0, 7, 64], [-1, -1, 0, 1, 1, 1, 3])
    case = make_case(tree, (4, 2), 64, **options).to(dtype)
    grad = torch.randn_like(case.query)
    whole = run(case, impl, grad)
    for segment, path in enumerate(tree.paths):
        rows = torch.cat([torch.arange(tree.offsets[i], tree.offsets[i + 1]) for i in path])
        alone = Case(
            PrefixTree([tree.lengths[i] for i in path], range(-1, len(path) - 1)),
            *(x[rows].clone() for x in (case.query, case.key, case.value)),
            case.sinks,
            case.prefix_kv,
            case.options,
        )
        single = run(alone, impl, grad[rows])
        for name in ("out", "lse"):
            assert torch.equal(single[name], whole[name][rows]), (segment, name)


@st.composite
def trees(draw: st.DrawFn) -> PrefixTree:
    lengths = draw(st.lists(st.integers(0, 6), max_size=7))
    return PrefixTree(lengths, [draw(st.integers(-1, i - 1)) for i in range(len(lengths))])


@settings(max_examples=60, deadline=None)
@given(
    tree=trees(),
    prefix=st.integers(0, 5),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(1.5),
    sinks=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    band_rows=st.sampled_from([2, 5]),  # 5: rows that see nothing of their first block of 2 keys
)
def test_any_tree(tree, prefix, window, softcap, sinks, heads, band_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BAND_ROWS", band_rows)
        patch.setattr(composition, "BLOCK_ROWS", 3)
        patch.setattr(composition, "BLOCK_KEYS", 2)
        case = make_case(tree, heads, 4, prefix=prefix, sinks=sinks, window=window, softcap=softcap)
        assert_equals(case, "composition", "alone", 1e-10)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("impl", ["composition", "reference", native])
def test_no_tokens(lengths, impl):
    tree = PrefixTree(lengths, range(-1, len(lengths) - 1))
    case = make_case(tree, prefix=3, sinks=True).to(torch.float32)
    result = run(case, impl, torch.zeros(0, 4, 32))
    assert result["out"].shape == (0, 4, 32)
    assert result["lse"].shape == (0, 4)
    assert not result["grad_sinks"].any()


def test_no_part_has_a_row_that_sees_nothing_or_no_length():
    for lengths, parents in TREES.values():
        tree = PrefixTree(lengths, parents)
        for window, segment in itertools.product([None, 1, 3, 8, 25, 200], range(len(tree))):
            for part in parts.segment_parts(tree, segment, 11, window):
                assert min(part.size) > 0
                assert part_dense.band_mask(part, torch.device("cpu")).any(1).all()
                if part.kind == parts.FULL:
                    assert part_dense.band_mask(part, torch.device("cpu")).all()


def test_parts_outside_the_window_are_not_called():
    tree = PrefixTree([5000, 10, 20], [-1, 0, 1])
    seen = {part.keys.start for part in parts.segment_parts(tree, 2, 1000, 15)}
    assert min(seen) >= 5000 - 4  # the middle segment, and of the root the last keys that its first rows reach
    assert len(list(parts.segment_parts(tree, 2, 1000, None))) == 4


def test_non_contiguous_views():
    case = make_case(PrefixTree(*TREES["depth 3"]), window=9, sinks=True)
    grad = torch.randn(*case.query.shape[:2], 1, dtype=torch.float64).expand_as(case.query)
    views = Case(
        case.tree,
        case.query.transpose(0, 1).contiguous().transpose(0, 1),
        case.key.mT.contiguous().mT,
        torch.cat([case.value, case.value], -1)[..., ::2].clone().repeat_interleave(2, -1)[..., ::2],
        case.sinks,
        options=case.options,
    )
    assert not any(x.is_contiguous() for x in (views.query, views.key, views.value))
    leaves = [x.requires_grad_() for x in (views.query, views.key, views.value)]
    out = shared_prefix_attention(*leaves, views.tree, window=9, sinks=views.sinks)
    grads = torch.autograd.grad((out * grad).sum(), leaves)
    copies = [x.detach().contiguous().requires_grad_() for x in leaves]
    truth = shared_prefix_attention(*copies, views.tree, window=9, sinks=views.sinks, impl="reference")
    expected = torch.autograd.grad((truth * grad).sum(), copies)
    for actual, wanted in zip((out, *grads), (truth, *expected), strict=True):
        assert relative_error(actual, wanted) < 1e-12


@on_cpu
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_logits(impl, softcap):
    case = make_case(PrefixTree(*TREES["two groups"]), sharpness=3000.0, softcap=softcap).to(torch.float32)
    grad = torch.randn_like(case.query)
    truth, result = run(case.to(torch.float64), "alone", grad), run(case, impl, grad)
    assert truth["lse"].abs().max() > (1000 if softcap is None else 40)
    # An ulp of an fp32 lse of 10000 is 0.001, and weights and probabilities are exp(logit - lse).
    assert relative_error(result["lse"], truth["lse"]) < 1e-6
    assert relative_error(result["out"], truth["out"]) < 1e-5
    assert all(value.isfinite().all() for value in result.values())


@on_cpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_inf_stay_in_the_sequences_that_see_them(impl, which, bad, softcap):
    tree = PrefixTree([30, 20, 25, 10], [-1, 0, 0, 1])
    case = make_case(tree, softcap=softcap).to(torch.float32)
    getattr(case, which)[35] = bad  # in segment 1
    out = run(case, impl, torch.randn_like(case.query))["out"]
    hit = torch.zeros(tree.tokens, dtype=torch.bool)
    hit[35 : 36 if which == "query" else 50] = True
    hit[75:] = which != "query"
    may_be_hit = hit.clone()
    may_be_hit[30:35] = which == "value"  # earlier rows of a block multiply a masked value by 0, as everywhere
    assert out[~may_be_hit].isfinite().all()
    if not (softcap and bad == float("inf") and which != "value"):  # a capped logit of inf is finite
        assert not out[hit].isfinite().all(-1).all(-1).any()


def test_no_gradient_is_computed_or_kept_without_grad():
    case = make_case(PrefixTree(*TREES["two groups"]))
    with torch.no_grad():
        out = shared_prefix_attention(case.query.requires_grad_(), case.key, case.value, case.tree)
    assert not out.requires_grad


def test_autocast_rounds_as_sdpa_does():
    case = make_case(PrefixTree(*TREES["two groups"]), softcap=3.0).to(torch.float32)
    leaves = [x.requires_grad_() for x in (case.query, case.key, case.value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shared_prefix_attention(*leaves, case.tree, softcap=3.0)
    narrow = case.to(torch.bfloat16)
    expected = shared_prefix_attention(narrow.query, narrow.key, narrow.value, case.tree, softcap=3.0)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    case = make_case(PrefixTree(*TREES["depth 3"]), window=20).to(torch.float32)
    grads = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
        leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
        wrap(lambda q, k, v: shared_prefix_attention(q, k, v, case.tree, window=20), *leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("options", [{}, {"window": 7, "softcap": 2.0}], ids=["flash", "dense"])
def test_compiles_without_a_graph_break(options):
    torch.compiler.reset()
    case = make_case(PrefixTree(*TREES["two completions"]), size=8, sinks=True, **options).to(torch.float32)

    def step(query, key, value, sinks):
        return shared_prefix_attention(2 * query, key, value, case.tree, sinks=sinks, **options).square().sum()

    grads = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.value, case.sinks)]
        call(*leaves).backward()
        grads.append([x.grad for x in leaves])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def test_a_window_of_the_cache_is_enough():
    # A sliding-window cache keeps the last window - 1 keys.
    case = make_case(PrefixTree(*TREES["two groups"]), prefix=50, window=12)
    last = tuple(x[-11:] for x in case.prefix_kv)
    whole, short = (
        shared_prefix_attention(case.query, case.key, case.value, case.tree, window=12, prefix_kv=kv)
        for kv in (case.prefix_kv, last)
    )
    assert relative_error(short, whole) < 1e-12


def test_the_backward_of_adjoining_rows_over_one_prompt_is_one_call():
    """Two prompts' trees with levels: rows of siblings and of their children see all of the same keys."""
    prompt, other = list(range(100, 140)), list(range(200, 230))
    tails = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [7, 8], [9]]
    tree, _ = PrefixTree.from_sequences([*([*prompt, *t] for t in tails), *([*other, *t] for t in tails[2:])])
    calls = [(part_flash, part) for segment in range(len(tree)) for part in parts.segment_parts(tree, segment, 0, None)]
    joined = [part for kernel, part in composition._joined(iter(calls)) if part.kind == parts.FULL]
    pairs = lambda found: sorted(  # noqa: E731
        (row, key)
        for part in found
        for row in range(part.rows.start, part.rows.stop)
        for key in range(part.keys.start, part.keys.stop)
    )
    before = [part for _, part in calls if part.kind == parts.FULL]
    assert pairs(joined) == pairs(before) and len(before) == 7
    # Segments lie level by level: the first prompt's children, the other's, and the child of [1, 2, 3] after them.
    found = sorted((part.size, part.keys.start) for part in joined)
    assert found == [((3, 3), 70), ((3, 30), 40), ((3, 40), 0), ((6, 40), 0)]


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["flash", "dense"])
def test_global_matmul_precision_is_ignored_and_restored(options, monkeypatch):
    """Forward and backward: where "medium" means bf16 products (AVX-512) gradients would be 4e-3 off."""
    asked = []
    for part in (part_flash, part_dense):
        for name in ("forward", "backward"):
            kernel = getattr(part, name)

            def watched(*args, kernel=kernel, name=name):
                backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
                asked.append((name, *(backend.fp32_precision for backend in backends)))
                return kernel(*args)

            monkeypatch.setattr(part, name, watched)
    case = make_case(PrefixTree([9, 4, 3], [-1, 0, 0]), **options).to(torch.float32)
    grad = torch.randn_like(case.query)
    want = run(case, "composition", grad)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # what the products would ask for
        asked.clear()
        got = run(case, "composition", grad)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(asked) == {("forward", "ieee", "ieee"), ("backward", "ieee", "ieee")}
    for name in want:
        assert torch.equal(got[name], want[name]), name
