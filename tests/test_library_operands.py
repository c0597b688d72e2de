"""No library product is handed memory that nobody wrote: AMX reads bf16 rows in tiles of 64 bytes, and 0 * NaN is NaN.

oneDNN's product is right in every result on a processor without AMX, so the operands are looked at, not the results.
"""

from __future__ import annotations

import pytest
import torch
from handed_over import TILE_BYTES, HandedOver, fault
from rows_cases import draw, tile

from sdft_kernels import (
    PrefixTree,
    _native,
    linear_divergence,
    linear_divergence_loss,
    linear_token_logprob,
    linear_topk_divergence,
    shared_prefix_attention,
)
from sdft_kernels._head import IDENTITY
from sdft_kernels._rows import whole_rows
from sdft_kernels.divergence import rows_native
from sdft_kernels.models.decode_attention import decode_attention, read_keys
from sdft_kernels.models.decode_cache import DecodeLayer

TOKENS, HIDDEN = 3, 8
VOCABULARIES = (203, 1001, 4097, 4098, 4112, 32001)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
DIVERGENCES = ("loss", "callable", "divergence")
OPS = (*DIVERGENCES, "token_logprob", "topk", "topk, dense")
LAYOUTS = ("dense", "padded", "transposed")
NAN = float("nan")


def laid_out(matrix, layout):
    """The matrix in fresh memory; "padded" and "transposed" are views of a larger one, of NaN."""
    if layout == "dense":
        return matrix.clone()
    rows, columns = matrix.shape
    if layout == "padded":
        return matrix.new_full((rows, columns + 5), NAN)[:, :columns].copy_(matrix)
    return matrix.new_full((columns, rows + 3), NAN).t()[:rows].copy_(matrix)


def operands(vocabulary, dtype, layout="dense"):
    g = torch.Generator().manual_seed(vocabulary)
    shapes = {
        "student_input": TOKENS,
        "student_weight": vocabulary,
        "teacher_input": TOKENS,
        "teacher_weight": vocabulary,
    }
    drawn = {name: torch.randn(rows, HIDDEN, generator=g).to(dtype) for name, rows in shapes.items()}
    made = {name: laid_out(x, layout) for name, x in drawn.items()}
    for name in ("student_input", "student_weight"):
        made[name].requires_grad_()
    return made, torch.randint(vocabulary, (TOKENS,), generator=g), torch.tensor([True, False, True])


def run(op, vocabulary, dtype, layout, **options):
    """The op forward and backward; its gradients."""
    x, target, mask = operands(vocabulary, DTYPES[dtype], layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        if op == "loss":
            total, _ = linear_divergence_loss(*x.values(), target, mask=mask, **options)
        elif op == "callable":
            total, _ = linear_divergence_loss(
                *x.values(), target, mask=mask, token_loss=lambda t, _: t.kl_teacher_student, **options
            )
        elif op == "divergence":
            total = linear_divergence(*x.values(), target, mask=mask, **options).kl_student_teacher.sum()
        elif op == "token_logprob":
            total = linear_token_logprob(x["student_input"], x["student_weight"], target, mask=mask, **options)[0].sum()
        else:
            tail = "bucket" if op == "topk, dense" else "renormalize"
            total = linear_topk_divergence(*x.values(), k=5, tail=tail, mask=mask, **options).divergence.sum()
    total.backward()
    return x["student_input"].grad, x["student_weight"].grad


@pytest.fixture
def bf16_gradients(monkeypatch):
    """As far as our choices go a processor with VDPBF16PS, on which gradients enter the last two products in bf16."""
    if not _native.has_native():
        pytest.skip(_native.why_not())

    def weight_grad_gemm(grad, hidden, total):
        total.add_(grad.float().t().contiguous() @ hidden.float())

    monkeypatch.setattr(_native, "cpu_isa", lambda: "avx512_bf16")
    monkeypatch.setattr(_native, "weight_grad_gemm", weight_grad_gemm)


def check(op, vocabulary, dtype, layouts, **options):
    """No operand is at fault, and no layout changes what comes out."""
    dense = None
    for layout in layouts:
        with HandedOver() as seen:
            grads = run(op, vocabulary, dtype, layout, **options)
        assert seen.faults == [], (options, layout)
        assert seen.products >= 1
        dense = grads if dense is None else dense
        for grad, expected in zip(grads, dense, strict=True):
            assert torch.allclose(grad.float(), expected.float(), rtol=1e-2, atol=1e-6), (options, layout)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_operand_of_a_head_op(op, dtype, vocabulary):
    native = ("native",) if op in DIVERGENCES and _native.has_native() else ()
    layouts = LAYOUTS if vocabulary < 1000 else LAYOUTS[:2]
    for impl in ("torch", "reference", *native):
        for pack in (True, False) if vocabulary < 4097 else (True,):
            check(op, vocabulary, dtype, layouts, impl=impl, pack=pack)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", ("bf16", "autocast"))
@pytest.mark.parametrize("op", DIVERGENCES)
def test_every_operand_where_gradients_are_bf16(op, dtype, vocabulary, bf16_gradients):
    for pack in (True, False):
        check(op, vocabulary, dtype, LAYOUTS[:2], impl="native", pack=pack)


def test_a_gradient_among_old_logits_is_seen(bf16_gradients, monkeypatch):
    """Control: the gradient as a view of the fp32 tile, with nothing written between its rows."""
    monkeypatch.setattr(rows_native, "whole_rows", lambda tile, dtype: whole_rows(tile, dtype)[:, : tile.shape[1]])
    with HandedOver() as seen:
        run("loss", 203, "bf16", "dense", impl="native")
    assert any(why.startswith("mm: (2, 203) torch.bfloat16") for why in seen.faults), seen.faults


def test_faults_are_seen():
    """Controls: views with something else between their rows, behind the last one, or nothing but zeros."""
    whole = torch.zeros(3, 48)
    assert fault(whole[:, :40], True) is None
    assert fault(whole.t(), True) is None
    whole[1, 47] = NAN
    assert "NaN or inf" in fault(whole[:, :40], True)
    assert fault(whole[:, :40].contiguous(), True) is None
    low = torch.zeros(2, 64, dtype=torch.bfloat16)
    low[1, 45] = 1.0  # behind the last row, in its last tile
    assert "not 0" in fault(low[:, :33], True)
    assert fault(low[:, :33], False) is None
    with HandedOver() as seen:
        low[:, :33] @ torch.ones(33, 2, dtype=torch.bfloat16)
    assert len(seen.faults) == seen.products == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of padding that holds NaN
@pytest.mark.parametrize("vocabulary", (16, 31, 203, 224))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("pair", (False, True))
def test_row_kernels_leave_zeros_behind_a_gradient(pair, dtype, vocabulary, interpreted):
    """All of a row that is not the gradient; behind the last row at least up to the end of a tile of 64 bytes."""
    rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
    kernels = [rows_triton, *([rows_native] if _native.has_native() and interpreted.type == "cpu" else [])]
    for rows in kernels:
        student, teacher, _ = draw(3, vocabulary, torch.float32, interpreted)
        a, b = tile(rows, student), tile(rows, teacher)
        tokens, weights = student.new_zeros(8, 3), {"kl_student_teacher": student.new_ones(3)}
        keep = torch.tensor([True, False, True], device=interpreted)
        options = (IDENTITY, IDENTITY), None, keep
        if pair:
            state = rows.divergence_stats(a, b, None, *options, tokens)
            grad = rows.divergence_grad_(a, b, state, None, weights, *options, dtype)
        else:
            grad = rows.affine_(a, b, None, weights, None, None, *options, tokens, tokens[0].clone(), dtype)
        assert grad.dtype == dtype and grad[0].any() and not grad[1].any()
        assert rows.row_stride(vocabulary) % (TILE_BYTES // 2) == 0
        whole = whole_rows(a, dtype)
        others = torch.ones(whole.shape, dtype=torch.bool, device=interpreted)
        first = grad.storage_offset() - whole.storage_offset()
        others[:, first : first + vocabulary] = False
        assert whole[others].eq(0).all(), rows.__name__


def spread(tensor, dim):
    """The tensor as a view of a larger one, of NaN, that has more in dimension `dim`."""
    shape = list(tensor.shape)
    shape[dim] += 3
    return tensor.new_full(shape, NAN).narrow(dim, 0, tensor.shape[dim]).copy_(tensor)


@pytest.mark.parametrize("softcap", (None, 20.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_every_operand_of_the_attention(dim, dtype, softcap):
    """Also where query, key, value and a cached prefix are views, as of a fused projection or a cache with room."""
    tree = PrefixTree([5, 3, 4], [-1, 0, 0])
    shapes = [(12, 4, 6), (12, 2, 6), (12, 2, 6), (7, 2, 6), (7, 2, 6)]
    drawn = [torch.randn(shape).to(dtype) for shape in shapes]
    for impl in ("composition", "reference"):
        found = []
        for tensors in (drawn, [spread(x, dim) for x in drawn]):
            q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
            with HandedOver() as seen:
                out = shared_prefix_attention(
                    q, k, v, tree, prefix_kv=tuple(tensors[3:]), softcap=softcap, window=8, impl=impl
                )
                out.backward(torch.ones_like(out))
            assert seen.faults == [] and seen.products >= 4
            found.append((out.detach(), q.grad, k.grad, v.grad))
        for a, b in zip(*found, strict=True):
            assert a.equal(b)


def test_every_operand_of_the_decoding_attention():
    """The samples' own keys are views of buffers that have room."""
    layer = DecodeLayer(torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6), set())
    for _ in range(3):
        key, _ = layer.update(torch.randn(4, 2, 1, 6), torch.randn(4, 2, 1, 6))
        with HandedOver() as seen:
            decode_attention(torch.randn(4, 4, 1, 6), read_keys(key), None, scale=0.4)
        assert seen.faults == [] and seen.products == 4


def test_a_repeated_view_with_gaps_is_not_dense():
    """Its extent happens to be its number of elements."""
    from sdft_kernels._gemm import dense, is_dense

    view = torch.arange(8, dtype=torch.float32)[::3][:2].expand(2, 2)
    assert not is_dense(view) and dense(view).is_contiguous() and torch.equal(dense(view), view)
    whole = torch.zeros(3, 4, dtype=torch.float32)
    assert is_dense(whole) and is_dense(whole.t()) and is_dense(whole[:1]) and not is_dense(whole[:, :3])
