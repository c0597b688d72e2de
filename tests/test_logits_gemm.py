"""The compiled matrix products against fp64: logits in fp32 from fp32 or bf16, dW in fp32 from bf16; in every build."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from counting import LargestTensor
from instruction_sets import levels, run_tests

from sdft_kernels import _native
from sdft_kernels._gemm import Gemm

pytestmark = pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built")

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16)
ISA = _native.cpu_isa()
needs_bf16 = pytest.mark.skipif(ISA != "avx512_bf16", reason=f"VDPBF16PS is not there or not allowed: {ISA}")
# Of ATEN_CPU_CAPABILITY. A processor may have less.
BUILDS = ("portable", "avx2", "avx512", "avx512_bf16")
ALLOWED = {"default": BUILDS[:1], "avx2": BUILDS[:2], "avx512": BUILDS[:3], "": BUILDS}

TOKENS = (0, 1, 5, 6, 7, 8, 13, 64)
SIZES = (0, 1, 2, 15, 16, 17, 64, 65, 577)
VOCABULARIES = (1, 15, 47, 48, 49, 63, 64, 65, 200, 300)
# fp32 sums of fp32 products, relative to |h| |w|: measured 2e-7.
TOLERANCE = 1e-6


@pytest.fixture(params=[False, True], ids=["packed", "few"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels of the logits product, on any number of tokens."""
    monkeypatch.setattr(_native, "logits_gemm", partial(_native.logits_gemm, few=request.param))


both_ways = pytest.mark.usefixtures("each_way")


def spaced(rows: int, columns: int, dtype: torch.dtype, gap: int = 3) -> torch.Tensor:
    """Random numbers whose rows are `gap` NaNs apart: nobody may read between them."""
    whole = torch.full((rows, columns + gap), torch.nan, dtype=dtype)
    view = whole[:, :columns]
    view.copy_(torch.randn(rows, columns))
    return view


def logits(hidden: torch.Tensor, weight: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """Into NaN, so that an element that is not written shows; what lies between the rows must stay."""
    whole = torch.full((hidden.shape[0], weight.shape[0] + gap), torch.nan)
    out = whole[:, : weight.shape[0]]
    _native.logits_gemm(hidden, weight, out)
    assert whole[:, weight.shape[0] :].isnan().all()
    return out


def assert_exact_to(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """out = left right^T to `tolerance` of the norms of the rows multiplied."""
    left, right = left.double(), right.double()
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    worst = ((out.double() - left @ right.t()).abs() - tolerance * scale).amax() if out.numel() else torch.tensor(0.0)
    assert worst <= 0, (out.shape, left.shape[1], worst)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_logits_of_ragged_shapes(dtype: torch.dtype, size: int) -> None:
    for tokens in TOKENS:
        for vocabulary in VOCABULARIES:
            hidden, weight = spaced(tokens, size, dtype), spaced(vocabulary, size, dtype)
            assert_exact_to(logits(hidden, weight, gap=5), hidden, weight)
            assert_exact_to(logits(hidden.contiguous(), weight.contiguous()), hidden, weight)


def test_negative_control_the_bar_sees_one_missing_product() -> None:
    hidden, weight = torch.randn(7, 577), torch.randn(65, 577)
    with pytest.raises(AssertionError):
        assert_exact_to(logits(hidden[:, :-1], weight[:, :-1]), hidden, weight)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [511, 512, 513, 1024, 1025, 4096])
def test_long_sums(dtype: torch.dtype, size: int) -> None:
    """K blocks; sums that only grow, where the error is largest."""
    hidden, weight = torch.rand(9, size).to(dtype), torch.rand(250, size).to(dtype)
    assert_exact_to(logits(hidden, weight), hidden, weight)


@both_ways
def test_bf16_products_are_exact() -> None:
    """255 * 255 needs 16 bits and 64 such products 22: fp32 holds both, so that any sum in it gives the same bits."""
    hidden, weight = (torch.randint(-255, 256, (n, 64)).to(BF16) for n in (13, 200))
    exact = hidden.double() @ weight.double().t()
    assert torch.equal(logits(hidden, weight).double(), exact)
    assert not torch.equal((hidden @ weight.t()).double(), exact), "control: the library's product rounds to bf16"


@both_ways
def test_an_infinite_bf16_survives_its_pair() -> None:
    """Two bf16 read as one fp32 may be a signalling NaN, which a careless move would quiet: inf to NaN."""
    hidden, weight = torch.zeros(3, 2, dtype=BF16), torch.ones(5, 2, dtype=BF16)
    hidden[1] = torch.tensor([1.0, torch.inf])
    assert torch.equal(logits(hidden, weight)[1], torch.full((5,), torch.inf))
    assert torch.equal(logits(weight, hidden)[:, 1], torch.full((5,), torch.inf))


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (17, 64))
def test_nan_and_inf_stay_in_their_row_and_column(dtype: torch.dtype, size: int) -> None:
    hidden, weight = torch.randn(13, size).to(dtype), torch.rand(100, size).to(dtype) + 0.5
    clean = logits(hidden, weight)
    hidden[3, -1], hidden[7, 0], weight[50, 1] = torch.nan, -torch.inf, torch.nan
    out = logits(hidden, weight)
    assert out[3].isnan().all() and out[:, 50].isnan().all()
    rest = torch.arange(100) != 50
    assert (out[7, rest] == -torch.inf).all()
    for token in (2, 4, 6, 8, 12):
        assert torch.equal(out[token, rest], clean[token, rest])


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (65, 1100))
def test_a_logit_does_not_depend_on_its_neighbours(dtype: torch.dtype, size: int) -> None:
    hidden, weight = torch.randn(64, size).to(dtype), torch.randn(500, size).to(dtype)
    whole = logits(hidden, weight)
    for tokens in range(1, 18):
        assert torch.equal(logits(hidden[5 : 5 + tokens], weight), whole[5 : 5 + tokens]), tokens
    for begin, end in ((0, 1), (3, 52), (100, 341), (499, 500)):
        assert torch.equal(logits(hidden, weight[begin:end]), whole[:, begin:end])


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(64, 576).to(dtype), torch.randn(1003, 576).to(dtype)
    one = logits(hidden, weight)
    torch.set_num_threads(3)  # the fixture of conftest.py puts it back
    assert torch.equal(logits(hidden, weight), one)


def test_logits_gemm_refuses_what_it_cannot_do() -> None:
    op, h, w, out = torch.ops.sdft_kernels.logits_gemm, torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
    for arguments, message in (
        ((h.double(), w, out), "hidden must be fp32 or bf16"),
        ((h, w.to(BF16), out), "weight must have hidden's dtype"),
        ((h, w, out.to(BF16)), "out must be fp32"),
        ((h[0], w, out), "hidden must have 2 dimensions, has 1"),
        ((h, w[:, :2], out), "hidden has 3 columns, weight has 2"),
        ((h, w, out[:, :3]), r"out must be \(2, 4\), is \(2, 3\)"),
        ((h, w.t().contiguous().t(), out), "weight must have column stride 1, has 4"),
        ((h, w, torch.ones(4).expand(2, 4)), "rows of out overlap"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_products_pass_opcheck() -> None:
    h, w = torch.randn(3, 5), torch.randn(7, 5)
    torch.library.opcheck(torch.ops.sdft_kernels.logits_gemm.default, (h, w, torch.zeros(3, 7)))
    if ISA == "avx512_bf16":
        arguments = (torch.randn(3, 7).to(BF16), h.to(BF16), torch.zeros(7, 5))
        torch.library.opcheck(torch.ops.sdft_kernels.weight_grad_gemm.default, arguments)


def in_place_gradient(tokens: int, vocabulary: int) -> torch.Tensor:
    """bf16 written over the first half of each row of an fp32 tile; the other half holds NaN."""
    tile = torch.full((tokens, vocabulary), torch.nan)
    grad = tile.view(BF16)[:, :vocabulary]
    grad.copy_(torch.randn(tokens, vocabulary))
    return grad


@needs_bf16
@pytest.mark.parametrize("vocabulary", (1, 7, 15, 16, 191, 193, 400))
@pytest.mark.parametrize("size", (1, 15, 47, 48, 49, 100))
def test_weight_grad_of_ragged_shapes(vocabulary: int, size: int) -> None:
    """Several chunks, added up."""
    total = torch.zeros(vocabulary, size + 2)[:, :size]
    grads, states = [], []
    for tokens in (1, 0, 2, 17, 64, 511, 513):
        grads.append(in_place_gradient(tokens, vocabulary))
        states.append(spaced(tokens, size, BF16))
        _native.weight_grad_gemm(grads[-1], states[-1], total)
    assert_exact_to(total, torch.cat(grads).t(), torch.cat(states).t())


@needs_bf16
def test_weight_grad_sums_in_fp32() -> None:
    """32 chunks: the library's product into a bf16 total, which it replaces, fails the bar."""
    grads, states = torch.randn(32, 16, 64).to(BF16), torch.randn(32, 16, 48).to(BF16)
    total, library = torch.zeros(64, 48), torch.zeros(64, 48, dtype=BF16)
    for grad, hidden in zip(grads, states, strict=True):
        _native.weight_grad_gemm(grad, hidden, total)
        library.addmm_(grad.t(), hidden)
    left, right = grads.flatten(0, 1).t(), states.flatten(0, 1).t()
    assert_exact_to(total, left, right)
    with pytest.raises(AssertionError):
        assert_exact_to(library, left, right, tolerance=1e-4)


@needs_bf16
def test_weight_grad_propagates_nan_and_does_not_depend_on_threads() -> None:
    grad, hidden = torch.randn(33, 1003).to(BF16), torch.randn(33, 577).to(BF16)
    grad[32, 5], hidden[31, 6] = torch.nan, torch.inf
    total = torch.zeros(1003, 577)
    _native.weight_grad_gemm(grad, hidden, total)
    expected = torch.zeros(1003, 577, dtype=torch.bool)
    expected[5], expected[:, 6] = True, True
    assert torch.equal(~total.isfinite(), expected)
    torch.set_num_threads(3)
    again = torch.zeros(1003, 577)
    _native.weight_grad_gemm(grad, hidden, again)
    assert torch.equal(again.nan_to_num(7), total.nan_to_num(7))


def test_weight_grad_gemm_refuses_what_it_cannot_do() -> None:
    op = torch.ops.sdft_kernels.weight_grad_gemm
    grad, hidden, total = torch.ones(2, 4, dtype=BF16), torch.ones(2, 3, dtype=BF16), torch.ones(4, 3)
    for arguments, message in (
        ((grad.float(), hidden, total), "grad must be bf16"),
        ((grad, hidden.float(), total), "hidden must be bf16"),
        ((grad, hidden, total.to(BF16)), "total must be fp32"),
        ((grad, hidden[:1], total), "grad has 2 rows, hidden has 1"),
        ((grad, hidden, total[:3]), r"total must be \(4, 3\), is \(3, 3\)"),
        ((grad.t().contiguous().t(), hidden, total), "grad must have column stride 1, has 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    if ISA != "avx512_bf16":
        with pytest.raises(RuntimeError, match=f"needs a processor with AVX512_BF16, this one runs {ISA}"):
            op(grad, hidden, total)


def test_the_build_is_the_one_allowed() -> None:
    assert ISA in ALLOWED.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ALLOWED[""])


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value"), levels("ATEN_CPU_CAPABILITY"))
def test_other_builds(variable: str, value: str) -> None:
    """This file once more, by the code for older processors."""
    run_tests(variable, value, [Path(__file__)], "not other_builds")


GEMMS = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(BF16, BF16, id="bf16"),
    pytest.param(BF16, torch.float32, id="autocast"),
]


@pytest.mark.parametrize(("operand", "dtype"), GEMMS)
def test_gemm_uses_the_compiled_products(
    monkeypatch: pytest.MonkeyPatch, operand: torch.dtype, dtype: torch.dtype
) -> None:
    calls: list[str] = []

    def counted(name: str, run: Callable[..., None], *args: torch.Tensor) -> None:
        calls.append(name)
        run(*args)

    for name in ("logits_gemm", "weight_grad_gemm"):
        monkeypatch.setattr(_native, name, partial(counted, name, getattr(_native, name)))
    gemm, cpu = Gemm(operand, torch.float32, native=True), torch.device("cpu")
    hidden, weight, bias = torch.randn(13, 40).to(dtype), torch.randn(300, 40).to(dtype), torch.randn(300).to(dtype)
    out = torch.full((13, 300), torch.nan)
    gemm.project(hidden, weight, bias, out)
    assert_exact_to(out - bias.float(), hidden.to(operand), weight.to(operand), tolerance=2e-6)  # the bias is rounded
    assert calls == ([] if ISA == "portable" else ["logits_gemm"])

    wide = torch.randn(13, 300)
    grad = gemm.round_gradient(wide)
    native = operand == BF16 and ISA == "avx512_bf16"
    assert grad.dtype == gemm.gradient_dtype(cpu) == (BF16 if native else torch.float32)
    assert gemm.bytes_per_logit(cpu) == (2 if native else 0)
    state = torch.full((13, 40), torch.nan, dtype=dtype)
    gemm.grad_input(grad, weight, state)
    assert_exact_to(state, grad, weight.to(operand).t(), tolerance=2**-8 if dtype == BF16 else TOLERANCE)
    total = torch.ones(300, 40)
    gemm.grad_weight(grad, hidden, total)
    assert_exact_to(total - 1, grad.t(), hidden.to(operand).t(), tolerance=2e-6)  # 1 + x - 1 is rounded
    assert calls.count("weight_grad_gemm") == native


def test_gemm_rounds_a_shards_gradient_only_once() -> None:
    """An fp32 `out` for a bf16 head: a rank's part of dX, summed over the ranks before it is rounded."""
    gemm = Gemm(BF16, torch.float32, native=True)
    weight, grad = torch.randn(300, 40).to(BF16), gemm.round_gradient(torch.randn(13, 300))
    out = torch.empty(13, 40)
    gemm.grad_input(grad, weight, out)
    assert_exact_to(out, grad, weight.t())


def test_gemm_of_the_portable_build_leaves_it_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cpu_isa", lambda: "portable")
    monkeypatch.setattr(_native, "logits_gemm", lambda *args: pytest.fail("slower here than the library"))
    gemm, hidden, weight = Gemm(BF16, torch.float32, native=True), torch.randn(3, 8).to(BF16), torch.randn(9, 8)
    assert gemm.gradient_dtype(torch.device("cpu")) == torch.float32
    gemm.project(hidden, weight.to(BF16), None, torch.empty(3, 9))


@pytest.mark.skipif(ISA == "portable", reason="the library's product")
def test_compiled_logits_never_cast_the_weight() -> None:
    hidden, weight, out = torch.randn(2, 64).to(BF16), torch.randn(1000, 64).to(BF16), torch.empty(2, 1000)
    with LargestTensor() as ours:
        Gemm(BF16, torch.float32, native=True).project(hidden, weight, None, out)
    with LargestTensor() as upcast:
        Gemm(BF16, torch.float32).project(hidden, weight, None, out)
    assert ours.numel <= out.numel() < upcast.numel == weight.numel()


def test_a_transposed_head_goes_to_the_library() -> None:
    weight, hidden, out = torch.randn(8, 9).t(), torch.randn(3, 8), torch.empty(3, 9)
    Gemm(torch.float32, torch.float32, native=True).project(hidden, weight, None, out)
    assert_exact_to(out, hidden, weight)
