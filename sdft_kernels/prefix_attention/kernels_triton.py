"""The fused attention over a prefix tree in Triton: the forward, and what the backward shares with it.

A query tile lies in one segment. It walks keys root to leaf: the cached prefix, each ancestor, its own segment up to
the diagonal. Key blocks start at each segment's own start and nothing is split over keys, so the bits of a segment's
output depend on its own path only. Logits are held in units of log 2: s = log2(e) * logit. Letters are those of the
README.

`tiles` is (tiles, 3): segment, first token within it, tokens. `segments` is (S, 3): first packed row, tokens, position
of the first token. Both int64.
"""

import triton
import triton.language as tl

from .._triton_math import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base, first, count, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, BLOCK_D) of the rows `first` on; 0 beyond `count` rows (if MASKED) and beyond D columns."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # 64 bits once a tile: a packed batch passes 2^31 elements at 128k tokens of 64 heads of 256.
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if MASKED and BLOCK_D > D:
        tile = tl.load(pointers, mask=(row[:, None] < count) & (column[None, :] < D), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=row[:, None] < count, other=0.0)
    elif BLOCK_D > D:
        tile = tl.load(pointers, mask=column[None, :] < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, first, count, stride, tile, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first `count` rows and D columns of a tile."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(row[:, None] < count) & (column[None, :] < D))


@triton.jit
def logits(products, inner, outer, CAPPED: tl.constexpr):
    """s from q.k: outer tanh(inner x), or outer x."""
    if CAPPED:
        s = outer * tanh(products * inner)
    else:
        s = products * outer
    return s


@triton.jit
def seen(row_position, key_position, key, keys, window, WINDOWED: tl.constexpr):
    """Whether a row sees a key, both broadcast: not after it, within `keys` of them, within the window."""
    visible = (key < keys) & (key_position <= row_position)
    if WINDOWED:
        visible &= key_position > row_position - window
    return visible


@triton.jit
def first_block(nearest, window, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first block that a tile sees; `nearest` is its first row's position from the first key."""
    if WINDOWED:
        first = tl.maximum(nearest - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        first = nearest * 0
    return first


@triton.jit
def _attend(
    acc, peak, total, q, row_position, key, value, stride_k, stride_v, row, keys, position, begin, end, window, inner,
    outer, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax with the key blocks from `begin` to `end` of one segment more."""
    for n in range(begin, end, BLOCK_N):
        k = load_rows(key, row + n, keys - n, stride_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
        s = logits(s, inner, outer, CAPPED)
        if MASKED:
            column = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(
                seen(row_position[:, None], position + column, column, keys, window, WINDOWED), s, float("-inf")
            )
        new = tl.maximum(peak, tl.max(s, 1))
        pivot = tl.where(new == float("-inf"), 0.0, new)  # a row that a window still hides everything from
        p = tl.exp2(s - pivot[:, None])
        rescale = tl.exp2(peak - pivot)
        total = total * rescale + tl.sum(p, 1)
        v = load_rows(value, row + n, keys - n, stride_v, BLOCK_N, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
        peak = new
    return acc, peak, total


# A prefix of 0, 1 or 16 tokens, or such a window, must not compile another kernel.
@triton.jit(do_not_specialize=["prefix", "window"])
def forward_kernel(
    query, key, value, sinks, cached_key, cached_value, out, lse, tiles, segments, path_offsets, paths,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ckt, stride_ckh, stride_cvt, stride_cvh,
    stride_ot, heads, prefix, window, inner, outer,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one query tile of one head: reads its keys and values once, writes its output and LSE."""
    # The last tiles have the longest paths: they start first.
    tile = tiles + 3 * (tl.num_programs(0) - 1 - tl.program_id(0))
    head = tl.program_id(1)
    key_head = head // GROUP
    segment, first, count = tl.load(tile), tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    row = tl.load(segments + 3 * segment) + first
    start = prefix + tl.load(segments + 3 * segment + 2).to(tl.int32) + first
    row_position = start + tl.arange(0, BLOCK_M)
    q = load_rows(query + head * stride_qh, row, count, stride_qt, BLOCK_M, D, BLOCK_D, True)

    wide = lse.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    if sinks is None:
        peak, total = tl.full((BLOCK_M,), float("-inf"), wide), tl.zeros((BLOCK_M,), wide)
    else:
        sink = tl.load(sinks + head).to(wide) * LOG2_E
        peak, total = tl.zeros((BLOCK_M,), wide) + sink, tl.zeros((BLOCK_M,), wide) + 1.0
    if cached_key is not None:
        k, v = cached_key + key_head * stride_ckh, cached_value + key_head * stride_cvh
        begin = first_block(start, window, WINDOWED, BLOCK_N)
        if not WINDOWED:
            whole = prefix // BLOCK_N * BLOCK_N
            acc, peak, total = _attend(
                acc, peak, total, q, row_position, k, v, stride_ckt, stride_cvt, prefix * 0, prefix, 0, begin, whole,
                window, inner, outer, False, False, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            begin = whole
        acc, peak, total = _attend(
            acc, peak, total, q, row_position, k, v, stride_ckt, stride_cvt, prefix * 0, prefix, 0, begin, prefix,
            window, inner, outer, True, WINDOWED, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
        )  # fmt: skip

    k, v = key + key_head * stride_kh, value + key_head * stride_vh
    for entry in range(tl.load(path_offsets + segment).to(tl.int32), tl.load(path_offsets + segment + 1).to(tl.int32)):
        other = tl.load(paths + entry)
        key_row = tl.load(segments + 3 * other)
        keys = tl.load(segments + 3 * other + 1).to(tl.int32)
        position = prefix + tl.load(segments + 3 * other + 2).to(tl.int32)
        # Of its own segment a tile sees what stands before its end.
        keys = tl.minimum(keys, start + count - position)
        begin = first_block(start - position, window, WINDOWED, BLOCK_N)
        if not WINDOWED:
            whole = tl.minimum(keys, start - position) // BLOCK_N * BLOCK_N
            acc, peak, total = _attend(
                acc, peak, total, q, row_position, k, v, stride_kt, stride_vt, key_row, keys, position, begin, whole,
                window, inner, outer, False, False, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            begin = whole
        acc, peak, total = _attend(
            acc, peak, total, q, row_position, k, v, stride_kt, stride_vt, key_row, keys, position, begin, keys,
            window, inner, outer, True, WINDOWED, CAPPED, BLOCK_N, D, BLOCK_D, PRECISION,
        )  # fmt: skip

    store_rows(out + head * D, row, count, stride_ot, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    index = tl.arange(0, BLOCK_M)
    tl.store(lse + (row + index) * heads + head, (peak + tl.log2(total)) * LN_2, mask=index < count)
