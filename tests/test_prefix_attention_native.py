"""Op 4's compiled kernels: every shape and option beside the reference, in every build; which calls they get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import TREES, Case, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import levels, run_tests

from sdft_kernels import _dispatch, _native
from sdft_kernels.prefix_attention import PrefixTree, api, composition, fused_native, shared_prefix_attention
from sdft_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built")

# fp32 sums of fp32 products of numbers around 1: measured 1e-6. An option that is left out is 0.01 off or more.
TOLERANCE = 1e-5
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "window 1": {"window": 1},
    "window 25": {"window": 25},
    "window 400": {"window": 400},
    "sinks": {"sinks": True},
    "cached prefix": {"prefix": 19},
    "everything": {"prefix": 70, "window": 23, "softcap": 3.0, "sinks": True, "scale": 0.2},
}
# Beside the small ones: segments of several tiles and key blocks, ragged by any vector.
LONG = ([130, 65, 64, 1, 67], [-1, 0, 0, 1, -1])


def assert_is_the_reference(case: Case) -> None:
    """Output, LSE and all gradients of the compiled kernels in fp32 beside the reference in fp64."""
    case = case.to(torch.float32)
    grad, upstream = torch.randn_like(case.query), torch.randn(case.query.shape[:2])
    wide = case.to(torch.float64)
    actual, expected = run(case, "native", grad, upstream), run(wide, "reference", grad, upstream)
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        if name != "grad_sinks":
            assert relative_error(actual[name], value) < TOLERANCE, name
    if wide.sinks is not None:  # a sum over rows, which may cancel: relative to its terms
        terms = (grad * expected["out"]).abs().sum(-1) + upstream.abs()
        scale = (torch.exp(wide.sinks - expected["lse"]) * terms).sum(0)
        assert ((actual["grad_sinks"] - expected["grad_sinks"]).abs() < TOLERANCE * scale).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", [*TREES.values(), LONG], ids=[*TREES, "long"])
def test_trees_and_options(tree, options):
    assert_is_the_reference(make_case(PrefixTree(*tree), **options))


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (9, 3), (4, 4), (7, 1)])
def test_heads_and_sizes(heads, size):
    """Head sizes cut into vectors in every way; groups that fill a tile's vectors and that do not."""
    assert_is_the_reference(make_case(PrefixTree([70, 30, 5], [-1, 0, 0]), heads, size, prefix=7))


def test_more_heads_than_rows_of_a_tile():
    assert_is_the_reference(make_case(PrefixTree([3, 2], [-1, 0]), (fused_native.TILE_ROWS + 8, 1), 16))


@st.composite
def trees(draw: st.DrawFn) -> PrefixTree:
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 100]), max_size=6))
    return PrefixTree(lengths, [draw(st.integers(-1, i - 1)) for i in range(len(lengths))])


@settings(max_examples=60, deadline=None)
@given(
    tree=trees(),
    prefix=st.sampled_from([0, 1, 64, 65]),
    window=st.none() | st.integers(1, 130),
    softcap=st.none() | st.just(1.5),
    sinks=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
    tile_rows=st.sampled_from([1, 16, 48, 192]),
)
def test_any_tree(tree, prefix, window, softcap, sinks, heads, tile_rows):
    if not tree.tokens:
        return
    torch.manual_seed(0)  # a failing example must fail again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_native, "TILE_ROWS", tile_rows)
        assert_is_the_reference(make_case(tree, heads, 16, prefix, sinks, window=window, softcap=softcap))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_threads_but_for_sums_over_parts(threads):
    case = make_case(PrefixTree(*LONG), (6, 2), 64, sinks=True, window=90).to(torch.float32)
    grad, before = torch.randn_like(case.query), torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            results.append(run(case, "native", grad))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], results[2][name]), name
        if name in ("grad_key", "grad_value"):
            assert relative_error(results[1][name], value) < 1e-6
        else:
            assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize(
    ("heads", "threads", "tiles", "parts"),
    [
        ((9, 3), 2, 50, 2),
        ((9, 3), 1, 50, 1),
        ((9, 3), 16, 50, 5),
        ((4, 1), 2, 50, 2),
        ((4, 1), 16, 4, 4),  # no more than tiles
        ((4, 1), 64, 50, 8),  # four times the query
        ((1, 1), 64, 50, 2),
        ((32, 8), 2, 50, 1),
        ((9, 9), 2, 50, 1),
    ],
)
def test_parts_of_a_backward_pass(heads, threads, tiles, parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert fused_native._parts(*heads, tiles) == parts


def test_strides():
    """Views of fused projections, and rows that lie apart with NaN between them."""
    case = make_case(PrefixTree(*TREES["depth 3"]), (4, 2), 32, prefix=9).to(torch.float32)
    grad = torch.randn_like(case.query)

    def spaced(x):
        whole = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 5), torch.nan)
        whole[:, : x.shape[1], : x.shape[2]] = x
        return whole[:, : x.shape[1], : x.shape[2]]

    apart = Case(case.tree, *map(spaced, (case.query, case.key, case.value)), None, tuple(map(spaced, case.prefix_kv)))
    results = []
    for each in (case, apart):
        leaves = [x.detach().requires_grad_() for x in (each.query, each.key, each.value)]
        out = shared_prefix_attention(*leaves, each.tree, prefix_kv=each.prefix_kv, impl="native")
        results.append((out, *torch.autograd.grad((out * grad).sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_of_one_number_for_all():
    """`sum` gives a gradient without strides."""
    case = make_case(PrefixTree(*TREES["two groups"])).to(torch.float32)
    query = case.query.requires_grad_()
    grads = []
    for impl in ("native", "reference"):
        out = shared_prefix_attention(query, case.key, case.value, case.tree, impl=impl)
        grads.append(torch.autograd.grad(out.sum(), query)[0])
    assert relative_error(*grads) < TOLERANCE


def test_gradients_do_not_keep_the_parts_of_others(monkeypatch):
    monkeypatch.setattr(fused_native, "_parts", lambda *_: 3)
    case = make_case(PrefixTree(*LONG)).to(torch.float32)
    leaves = [x.requires_grad_() for x in (case.query, case.key, case.value)]
    shared_prefix_attention(*leaves, case.tree, impl="native").sum().backward()
    assert case.key.grad.untyped_storage().nbytes() <= 2 * case.key.nbytes


def test_default_dtype_is_not_taken():
    case = make_case(PrefixTree(*TREES["two groups"])).to(torch.float32)
    grad = torch.randn_like(case.query)
    wanted = run(case, "native", grad)
    torch.set_default_dtype(torch.float64)
    try:
        got = run(case, "native", grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in wanted.items())


def test_which_calls_they_get(monkeypatch):
    """By name they run or say why not; "auto" takes the composition where they cannot."""
    narrow = make_case(PrefixTree([4, 2], [-1, 0])).to(torch.float32)
    for case in (narrow, narrow.to(torch.bfloat16)):
        assert api._kernels("auto", case.query) is api._kernels("native", case.query) is fused_native
    odd, wide = make_case(narrow.tree, size=24).to(torch.float32), narrow.to(torch.float64)
    for case, why in ((odd, "multiple of 16, got 24"), (wide, "not enough for fp64")):
        assert api._kernels("auto", case.query) is composition
        with pytest.raises(RuntimeError, match=rf"shared_prefix_attention\(impl='native'\) cannot run: .*{why}"):
            api._kernels("native", case.query)
    assert "on CPU, not on cuda" in _dispatch.why_not("native", "shared_prefix_attention", "cuda:0")
    with monkeypatch.context() as patch:
        patch.setattr(_dispatch, "_WHY_NOT_NATIVE", "not built")
        assert api._kernels("auto", narrow.query) is composition
        with pytest.raises(RuntimeError, match="cannot run: the compiled operators are not built"):
            api._kernels("native", narrow.query)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert api._kernels("auto", narrow.query) is composition


def test_operators_refuse_what_does_not_fit():
    """Whoever calls them: nothing outside the tensors is read or written."""
    case = make_case(PrefixTree([40, 9], [-1, 0])).to(torch.float32)
    tree, tokens = case.tree, case.tree.tokens
    tiles = tree.tile_table(16)
    good = _native.PrefixOperands(
        case.query, case.key, case.value, None, None, tiles, tree.segments, *tree.ancestors, 0.1, 0.0, tokens
    )
    out, lse = torch.empty(tokens, 4, 32), torch.empty(tokens, 4)
    _native.prefix_attention(good, None, out, lse)
    beyond, negative, of_another = tiles.clone(), tiles.clone(), tiles.clone()
    beyond[-1, 2] += 1
    negative[0, 1] = -1
    of_another[0, 0] = 2
    long, before = tree.segments.clone(), tree.segments.clone()
    long[1, 1] += 1
    before[1, 0] = -1
    bad = [
        ({"tiles": x}, "tables") for x in (beyond, negative, of_another)
    ] + [
        ({"segments": long}, "tables"),
        ({"segments": before}, "tables"),
        ({"ancestors": torch.tensor([0, 0, 7])}, "tables"),
        ({"ancestor_offsets": torch.tensor([0, 2, 1])}, "tables"),
        ({"segments": tree.segments.int()}, "segments must be int64"),
        ({"key": case.key[1:]}, "key has another shape"),
        ({"key": case.key.double()}, "key must be fp32"),
        ({"value": case.value.mT.contiguous().mT}, "value must have stride 1"),
        ({"query": case.query[:, :3]}, "2 key heads must divide 3"),
        ({"cached_key": case.key}, "a cached key needs its value"),
    ]  # fmt: skip
    for changed, message in bad:
        with pytest.raises(RuntimeError, match=message):
            _native.prefix_attention(good._replace(**changed), None, out, lse)
    for wrong, message in ((out[1:], "out has another shape"), (out.mT.contiguous().mT, "out must be contiguous")):
        with pytest.raises(RuntimeError, match=message):
            _native.prefix_attention(good, None, wrong, lse)
    with pytest.raises(RuntimeError, match="partial must be"):
        _native.prefix_attention_backward(good, out, lse, out, None, lse.clone(), out.clone(), torch.empty(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value"), levels("ATEN_CPU_CAPABILITY"))
def test_other_builds(variable, value):
    """This file, and what others say of these kernels, by the code for older processors."""
    tests = Path(__file__).resolve().parent
    files = [tests / "test_prefix_attention_native.py", tests / "test_prefix_attention.py"]
    run_tests(variable, value, files, "native and not other_builds")
