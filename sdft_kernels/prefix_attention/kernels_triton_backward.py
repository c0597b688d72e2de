"""The backward of the fused attention over a prefix tree in Triton: no atomics, so the same call gives the same bits.

dQ walks as the forward does. dK and dV are owned by a program per key tile, which walks the rows that see it: those of
its own segment, then every descendant's, in the order of the tree. Letters are those of the README, tables and units
those of `kernels_triton`; `dL/ds` is taken with respect to the logit, not to s.
"""

import triton
import triton.language as tl

from .._triton_math import tanh
from .kernels_triton import LOG2_E, first_block, load_rows, seen, store_rows


@triton.jit
def delta_kernel(
    grad, out, grad_lse, delta, stride_gt, stride_ot, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M tokens of one head: delta = rowsum(dO * O), less the gradient of the LSE if any."""
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    wide = delta.dtype.element_ty
    g = load_rows(grad + head * D, first, tokens - first, stride_gt, BLOCK_M, D, BLOCK_D, True).to(wide)
    o = load_rows(out + head * D, first, tokens - first, stride_ot, BLOCK_M, D, BLOCK_D, True).to(wide)
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    total = tl.sum(g * o, 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + row * heads + head, mask=row < tokens, other=0.0).to(wide)
    tl.store(delta + row * heads + head, total, mask=row < tokens)


@triton.jit
def _probabilities(products, lse, visible, inner, outer, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """p = e^(logit - lse), 0 where not visible, and the slope of the softcap."""
    if CAPPED:
        bent = tanh(products * inner)
        s, slope = outer * bent, 1.0 - bent * bent
    else:
        s, slope = products * outer, 1.0
    p = tl.exp2(s - lse * LOG2_E)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    return p, slope


@triton.jit
def _grad_query(
    acc, q, g, lse, delta, row_position, key, value, stride_k, stride_v, row, keys, position, begin, end, window, inner,
    outer, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, less the scale, of the key blocks from `begin` to `end` of one segment more."""
    for n in range(begin, end, BLOCK_N):
        k = load_rows(key, row + n, keys - n, stride_k, BLOCK_N, D, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
        column = n + tl.arange(0, BLOCK_N)[None, :]
        visible = seen(row_position[:, None], position + column, column, keys, window, WINDOWED)
        p, slope = _probabilities(products, lse[:, None], visible, inner, outer, CAPPED, MASKED)
        v = load_rows(value, row + n, keys - n, stride_v, BLOCK_N, D, BLOCK_D, MASKED)
        ds = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=acc.dtype)
        ds = p * (ds - delta[:, None]) * slope
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit(do_not_specialize=["prefix", "window"])
def grad_query_kernel(
    query, key, value, cached_key, cached_value, grad, lse, delta, grad_query, tiles, segments, path_offsets, paths,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ckt, stride_ckh, stride_cvt, stride_cvh,
    stride_ot, heads, prefix, window, scale, inner, outer,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one query tile of one head: reads what the forward read, writes its dQ."""
    tile = tiles + 3 * (tl.num_programs(0) - 1 - tl.program_id(0))
    head = tl.program_id(1)
    key_head = head // GROUP
    segment, first, count = tl.load(tile), tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    row = tl.load(segments + 3 * segment) + first
    start = prefix + tl.load(segments + 3 * segment + 2).to(tl.int32) + first
    row_position = start + tl.arange(0, BLOCK_M)
    index = tl.arange(0, BLOCK_M)
    q = load_rows(query + head * stride_qh, row, count, stride_qt, BLOCK_M, D, BLOCK_D, True)
    g = load_rows(grad + head * D, row, count, stride_ot, BLOCK_M, D, BLOCK_D, True)
    row_lse = tl.load(lse + (row + index) * heads + head, mask=index < count, other=0.0)
    row_delta = tl.load(delta + (row + index) * heads + head, mask=index < count, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), lse.dtype.element_ty)

    if cached_key is not None:
        k, v = cached_key + key_head * stride_ckh, cached_value + key_head * stride_cvh
        begin = first_block(start, window, WINDOWED, BLOCK_N)
        if not WINDOWED:
            whole = prefix // BLOCK_N * BLOCK_N
            acc = _grad_query(
                acc, q, g, row_lse, row_delta, row_position, k, v, stride_ckt, stride_cvt, prefix * 0, prefix, 0, begin,
                whole, window, inner, outer, False, False, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            begin = whole
        acc = _grad_query(
            acc, q, g, row_lse, row_delta, row_position, k, v, stride_ckt, stride_cvt, prefix * 0, prefix, 0, begin,
            prefix, window, inner, outer, True, WINDOWED, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
        )  # fmt: skip

    k, v = key + key_head * stride_kh, value + key_head * stride_vh
    for entry in range(tl.load(path_offsets + segment).to(tl.int32), tl.load(path_offsets + segment + 1).to(tl.int32)):
        other = tl.load(paths + entry)
        key_row = tl.load(segments + 3 * other)
        keys = tl.load(segments + 3 * other + 1).to(tl.int32)
        position = prefix + tl.load(segments + 3 * other + 2).to(tl.int32)
        keys = tl.minimum(keys, start + count - position)
        begin = first_block(start - position, window, WINDOWED, BLOCK_N)
        if not WINDOWED:
            whole = tl.minimum(keys, start - position) // BLOCK_N * BLOCK_N
            acc = _grad_query(
                acc, q, g, row_lse, row_delta, row_position, k, v, stride_kt, stride_vt, key_row, keys, position, begin,
                whole, window, inner, outer, False, False, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            begin = whole
        acc = _grad_query(
            acc, q, g, row_lse, row_delta, row_position, k, v, stride_kt, stride_vt, key_row, keys, position, begin,
            keys, window, inner, outer, True, WINDOWED, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    store_rows(grad_query + head * D, row, count, stride_ot, acc * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def _grad_keys(
    dk, dv, k, v, key_position, query, grad, lse, delta, stride_q, stride_g, heads, row, rows, position, begin, end,
    window, inner, outer, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, less the scale, and dV of the rows from `begin` to `end` of one segment and one head more."""
    index = tl.arange(0, BLOCK_M)
    for m in range(begin, end, BLOCK_M):
        q = load_rows(query, row + m, rows - m, stride_q, BLOCK_M, D, BLOCK_D, MASKED)
        at = (row + m + index) * heads
        row_lse = tl.load(lse + at, mask=index < rows - m, other=0.0)
        row_delta = tl.load(delta + at, mask=index < rows - m, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)
        line = (m + index)[None, :]
        visible = seen(position + line, key_position[:, None], line, rows, window, WINDOWED)
        p, slope = _probabilities(products, row_lse[None, :], visible, inner, outer, CAPPED, MASKED)
        g = load_rows(grad, row + m, rows - m, stride_g, BLOCK_M, D, BLOCK_D, MASKED)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION, out_dtype=dk.dtype)
        ds = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=dk.dtype)
        ds = p * (ds - row_delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=["prefix", "window"])
def grad_key_value_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, tiles, segments, descendant_offsets, descendants,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_dt, heads, prefix, window,
    scale, inner, outer,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one key tile of one key head: walks the rows that see it, head by head; writes dK and dV."""
    # The first tiles are the roots', which every row sees: they start first.
    tile, key_head = tiles + 3 * tl.program_id(0), tl.program_id(1)
    segment, first, count = tl.load(tile), tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    key_row = tl.load(segments + 3 * segment) + first
    start = prefix + tl.load(segments + 3 * segment + 2).to(tl.int32) + first
    key_position = start + tl.arange(0, BLOCK_N)
    k = load_rows(key + key_head * stride_kh, key_row, count, stride_kt, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(value + key_head * stride_vh, key_row, count, stride_vt, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), lse.dtype.element_ty)
    dv = tl.zeros((BLOCK_N, BLOCK_D), lse.dtype.element_ty)

    begin_entry = tl.load(descendant_offsets + segment).to(tl.int32)
    entries = tl.load(descendant_offsets + segment + 1).to(tl.int32) - begin_entry
    for step in range(GROUP * entries):
        head = key_head * GROUP + step // entries
        other = tl.load(descendants + begin_entry + step % entries)
        row = tl.load(segments + 3 * other)
        rows = tl.load(segments + 3 * other + 1).to(tl.int32)
        position = prefix + tl.load(segments + 3 * other + 2).to(tl.int32)
        # Rows before the tile see nothing of it; the diagonal ends `BLOCK_N` rows later.
        begin = tl.maximum(start - position, 0) // BLOCK_M * BLOCK_M
        q, g = query + head * stride_qh, grad + head * D
        if WINDOWED:
            end = tl.minimum(rows, start + count - 1 + window - position)
        else:
            end = rows
            diagonal = tl.minimum(tl.cdiv(tl.maximum(start + count - 1 - position, 0), BLOCK_M) * BLOCK_M, rows)
            dk, dv = _grad_keys(
                dk, dv, k, v, key_position, q, g, lse + head, delta + head, stride_qt, stride_ot, heads, row, rows,
                position, begin, diagonal, window, inner, outer, True, False, CAPPED, BLOCK_M, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            begin = tl.maximum(diagonal, rows // BLOCK_M * BLOCK_M)
            dk, dv = _grad_keys(
                dk, dv, k, v, key_position, q, g, lse + head, delta + head, stride_qt, stride_ot, heads, row, rows,
                position, diagonal, begin, window, inner, outer, False, False, CAPPED, BLOCK_M, D, BLOCK_D, PRECISION,
            )  # fmt: skip
        dk, dv = _grad_keys(
            dk, dv, k, v, key_position, q, g, lse + head, delta + head, stride_qt, stride_ot, heads, row, rows,
            position, begin, end, window, inner, outer, True, WINDOWED, CAPPED, BLOCK_M, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    store_rows(grad_key + key_head * D, key_row, count, stride_dt, dk * scale, BLOCK_N, D, BLOCK_D)
    store_rows(grad_value + key_head * D, key_row, count, stride_dt, dv, BLOCK_N, D, BLOCK_D)
