"""Op 4's fused Triton kernels: in fp64 the interpreter shows the formulas, in fp32 and bf16 the arithmetic.

On a GPU the same tests run the kernels as they ship (fp64 tests are skipped there: scalars are passed in fp32).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import TREES, Case, make_case, run

from sdft_kernels import _dispatch
from sdft_kernels.prefix_attention import PrefixTree, api, composition, shared_prefix_attention
from sdft_kernels.testing import assert_within_budget, relative_error

fused_triton = pytest.importorskip("sdft_kernels.prefix_attention.fused_triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, on rows and blocks that see nothing

OPTIONS = {
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "window 1": {"window": 1},
    "window 17": {"window": 17},
    "window beyond int32": {"window": 1 << 40},
    "sinks": {"sinks": True},
    "cached prefix": {"prefix": 19},
    "everything": {"prefix": 19, "window": 23, "softcap": 3.0, "sinks": True, "scale": 0.2},
}
# Tiles that trees of a few tokens already cross, and that differ from each other.
SMALL = {"forward": (16, 32), "grad_query": (32, 16), "grad_key_value": (16, 32)}


@pytest.fixture
def device(interpreted, monkeypatch):
    if interpreted.type == "cuda":
        return interpreted
    from triton.runtime import interpreter

    def choose(kernel, size, capability):
        return fused_triton.Configuration(size, *SMALL[kernel], 4, 1)

    def dot(self, a, b, acc, *_):
        # One product has one value, as on a tensor core, whatever the shape of the tiles. The interpreter's own goes to
        # NumPy's BLAS, whose order of sums depends on the shape and the processor: the logits of a forward and of its
        # backward then differ, by as much as 3.3 times the eager error of dV on an AVX2 processor (1.7 with one value).
        product = (_wide(a) @ _wide(b)).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(fused_triton, "choose", choose)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return interpreted


def _wide(handle):
    """The values in fp64; the interpreter holds bf16 as bit patterns."""
    if str(handle.dtype.scalar) == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


@pytest.fixture
def narrow_dtype(device):
    """What a test runs in that is about neither fp32 nor bf16: on CUDA there is only the latter."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request, device):
    if device.type == "cuda" and request.param == torch.float32:
        pytest.skip("on CUDA the kernels are bf16 only")
    return request.param


@pytest.fixture
def exact(device):
    if device.type == "cuda":
        pytest.skip("fp64 is for the interpreter")
    return device


def assert_equals(case: Case, other: str = "reference", grad_lse: bool = True, tolerance: float = 1e-10) -> None:
    grad = torch.randn_like(case.query)
    upstream = torch.randn(case.query.shape[:2], dtype=grad.dtype) if grad_lse else None
    actual, expected = run(case, "triton", grad, upstream), run(case, other, grad, upstream)
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype
        assert relative_error(actual[name], value) < tolerance, name


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.usefixtures("exact")
def test_trees(tree):
    assert_equals(make_case(PrefixTree(*tree), (2, 1)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.usefixtures("exact")
def test_options(options):
    assert_equals(make_case(PrefixTree(*TREES["depth 3"]), (2, 1), **options))


@pytest.mark.parametrize("window", [1, 16, 17, 32])
@pytest.mark.usefixtures("exact")
def test_a_window_that_ends_at_a_tiles_edge(window):
    """The last row that sees a key tile is the first, or the last, of a tile of rows."""
    assert_equals(make_case(PrefixTree([33, 33], [-1, 0]), (1, 1), 16, window=window))


@pytest.mark.parametrize(("heads", "size"), [((1, 1), 16), ((4, 2), 8), ((4, 1), 24), ((2, 2), 64), ((2, 1), 256)])
@pytest.mark.usefixtures("exact")
def test_heads_and_sizes(heads, size):
    """Groups of 1, 2 and 4; sizes below a tile's least, that fill it, and that do not."""
    assert_equals(make_case(PrefixTree([21, 9, 5], [-1, 0, 0]), heads, size, prefix=5), "composition")


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(narrow_dtype, device, lengths):
    tree = PrefixTree(lengths, range(-1, len(lengths) - 1))
    result = run(
        make_case(tree, prefix=3, sinks=True).to(narrow_dtype).to(device),
        "triton",
        torch.zeros(0, 4, 32, device=device),
    )
    assert result["out"].shape == (0, 4, 32) and not result["grad_sinks"].any()


@pytest.mark.parametrize("name", ["scale", "everything"])
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_error_budget(device, dtype, name, sharpness):
    tree = PrefixTree([80, 20, 0, 1, 33], [-1, 0, 0, 0, 1])
    narrow = make_case(tree, (2, 1), 32, sharpness=sharpness, **OPTIONS[name]).to(dtype).to(device)
    grad = torch.randn_like(narrow.query)
    truth, eager = run(narrow.to(torch.float64), "alone", grad), run(narrow, "alone", grad)
    for key, value in run(narrow, "triton", grad).items():
        if key != "grad_sinks":  # a sum over rows that cancels: luck
            assert_within_budget(value, eager[key], truth[key], name=key)


@pytest.mark.parametrize("options", [{}, {"window": 40, "prefix": 33, "sinks": True}], ids=["plain", "window"])
def test_a_segment_has_the_same_bits_among_any_neighbours(device, dtype, options):
    tree = PrefixTree([17, 53, 41, 0, 7, 35], [-1, -1, 0, 1, 1, 2])
    case = make_case(tree, (2, 1), 32, **options).to(dtype).to(device)
    whole = _forward(case)
    for segment, path in enumerate(tree.paths):
        rows = torch.cat([torch.arange(tree.offsets[i], tree.offsets[i + 1]) for i in path]).to(device)
        alone = replace(
            case,
            tree=PrefixTree([tree.lengths[i] for i in path], range(-1, len(path) - 1)),
            **{name: getattr(case, name)[rows].clone() for name in ("query", "key", "value")},
        )
        for single, packed in zip(_forward(alone), whole, strict=True):
            assert torch.equal(single, packed[rows]), segment


def _forward(case: Case):
    with torch.no_grad():
        return shared_prefix_attention(
            case.query, case.key, case.value, case.tree, prefix_kv=case.prefix_kv, sinks=case.sinks, return_lse=True,
            impl="triton", **case.options,
        )  # fmt: skip


def test_control_blocks_that_start_elsewhere_have_other_bits(device, monkeypatch):
    """What the test above would see: the order of a sum over keys does reach the bits."""
    if device.type == "cuda":
        pytest.skip("blocks of 16 keys are not shipped")
    case = make_case(PrefixTree([65], [-1]), (2, 1), 32).to(torch.float32)
    before = _forward(case)[0]
    monkeypatch.setitem(SMALL, "forward", (16, 16))
    assert not torch.equal(before, _forward(case)[0])


def test_same_bits_twice(device, narrow_dtype):
    case = make_case(PrefixTree(*TREES["depth 3"]), (4, 2), 32).to(narrow_dtype).to(device)
    grad = torch.randn_like(case.query)
    first, second = run(case, "triton", grad), run(case, "triton", grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_views(device, narrow_dtype):
    """Strides other than a packed tensor's: heads first, and columns of one projection."""
    case = make_case(PrefixTree(*TREES["depth 3"]), (2, 2), 32).to(narrow_dtype).to(device)
    joint = torch.cat([case.key, case.value], -1)
    views = replace(
        case,
        query=case.query.transpose(0, 1).contiguous().transpose(0, 1),
        key=joint[..., :32],
        value=joint[..., 32:],
    )
    assert not any(x.is_contiguous() for x in (views.query, views.key, views.value))
    grad = torch.randn_like(case.query[..., :1]).expand_as(case.query)
    results = []
    for own in (case, views):
        leaves = [x.requires_grad_() for x in (own.query, own.key, own.value)]
        out = shared_prefix_attention(*leaves, own.tree, impl="triton")
        results.append((out, *torch.autograd.grad((out * grad).sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_inf_stay_in_the_sequences_that_see_them(device, narrow_dtype, which, bad):
    tree = PrefixTree([30, 20, 25, 10], [-1, 0, 0, 1])
    case = make_case(tree, (2, 1)).to(narrow_dtype).to(device)
    getattr(case, which)[35] = bad  # in segment 1
    out = _forward(case)[0].cpu()
    hit = torch.zeros(tree.tokens, dtype=torch.bool)
    hit[35 : 36 if which == "query" else 50] = True
    hit[75:] = which != "query"
    may_be_hit = hit.clone()
    may_be_hit[30:35] = which == "value"  # earlier rows of a block multiply a masked value by 0, as everywhere
    assert out[~may_be_hit].isfinite().all()
    assert not out[hit].isfinite().all(-1).all(-1).any()


def test_blocks_that_a_window_hides_are_not_read(device, narrow_dtype):
    """NaN beyond every window: a block that was read would bring it in as 0 * NaN."""
    case = make_case(PrefixTree([100, 40], [-1, 0]), (2, 1), prefix=256, window=10).to(narrow_dtype).to(device)
    case.prefix_kv[0][:128], case.prefix_kv[1][:128] = float("nan"), float("nan")
    assert all(x.isfinite().all() for x in _forward(case))
    case.prefix_kv[1][252] = float("nan")  # control: the first rows see this one
    assert not _forward(case)[0].isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_dispatch(monkeypatch):
    """By name it runs or says why not; "auto" is the composition on the CPU, and where dtype or device do not fit."""
    case = make_case(PrefixTree([4, 2], [-1, 0])).to(torch.float32)
    with pytest.raises(RuntimeError, match="run on CUDA, not on cpu"):
        _forward(case)
    assert _dispatch.available("shared_prefix_attention")["torch"] == "available"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    assert _dispatch.why_not("triton", "shared_prefix_attention", "cuda:0", torch.bfloat16) is None
    assert "bf16 only" in _dispatch.why_not("triton", "shared_prefix_attention", "cuda:0", torch.float32)
    assert "fp64" in _dispatch.why_not("triton", "shared_prefix_attention", "cuda:0", torch.float64)
    narrow, wide = (SimpleNamespace(device=torch.device("cuda:0"), dtype=x) for x in (torch.bfloat16, torch.float32))
    assert api._kernels("auto", narrow) is api._kernels("triton", narrow) is fused_triton
    assert api._kernels("auto", wide) is api._kernels("composition", narrow) is composition
    with pytest.raises(RuntimeError, match="bf16 only"):
        api._kernels("triton", wide)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert api._kernels("auto", narrow) is composition
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused_triton, "forward", lambda *_: pytest.fail("auto took the interpreter"))
    shared_prefix_attention(case.query, case.key, case.value, case.tree)


def test_shipped_lines():
    """Tiles that Triton accepts, every head size served, newer devices by the instruction they have."""
    for kernel, by_instruction in fused_triton.configurations().items():
        assert set(by_instruction) == {"mma", "wgmma", "tcgen05"} and kernel in SMALL
        for lines in by_instruction.values():
            assert [line.head_size for line in lines] == [64, 128, 256]
            for line in lines:
                assert all(n >= 16 and n & (n - 1) == 0 for n in (line.block_m, line.block_n))
        for capability, instruction in ((80, "mma"), (89, "mma"), (90, "wgmma"), (103, "tcgen05"), (121, "mma")):
            assert fused_triton.choose(kernel, 96, capability) == by_instruction[instruction][1]
