"""The Triton kernels: one program per token walks its two rows of raw logits in blocks of the vocabulary.

The statistics take one read, the JSD one more, the gradient the last, each in the opposite direction of the one before:
what was read last is still in the cache, and a row that fits there is fetched once. Letters and formulas are those of
the op's README. Rows are padded (`_rows.row_stride`), so that every access moves 16 bytes whatever V is.

A gradient in bf16 is written over the upper half of the fp32 row that it is computed from. Element v goes to byte
2 * stride + 2 v, never below byte 4 v of the row, so a walk from the end only overwrites what it has read; the barrier
orders the threads within a block.
"""

import triton
import triton.language as tl

from .._head import ABSENT_TARGET
from .._triton_math import add_pair, exp, log1p, log_ratio, merge, not_negative, over_mixture, select, tanh

_ABSENT = tl.constexpr(ABSENT_TARGET)


@triton.jit
def _first_column(step, vocabulary, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    if REVERSED:
        start = (tl.cdiv(vocabulary, BLOCK) - 1 - step) * BLOCK
    else:
        start = step * BLOCK
    return start


@triton.jit
def _load(row, column, vocabulary, stride, inner, outer, CAPPED: tl.constexpr):
    """z at these columns of a row of raw logits; -inf beyond the vocabulary. The stride, a multiple of 16, is the bound
    that the load sees: a bound of unknown divisibility would make it scalar."""
    raw = tl.load(row + column, mask=column < stride, other=0.0)
    raw = tl.where(column < vocabulary, raw, float("-inf"))
    return _transform(raw, inner, outer, CAPPED)


@triton.jit
def _transform(raw, inner, outer, CAPPED: tl.constexpr):
    """z = outer tanh(inner a), or outer a; a logit of -inf stays -inf."""
    if CAPPED:
        z = tl.where(raw == float("-inf"), raw, outer * tanh(raw * inner))
    else:
        z = raw * outer
    return z


@triton.jit
def _statistics(
    student, teacher, vocabulary, stride, inner_s, outer_s, inner_t, outer_t,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """m_s, m_t, S_s, S_t, A_s, A_t, B_s, B_t, and whether the maxima share a token: `statistics.PARTIAL`."""
    zero = tl.full((), 0.0, student.dtype.element_ty)
    max_s, max_t, joint = zero - float("inf"), zero - float("inf"), zero
    sum_s, sum_t, first_s, first_t, gap_s, gap_t = zero, zero, zero, zero, zero, zero
    for step in range(tl.cdiv(vocabulary, BLOCK)):
        column = _first_column(step, vocabulary, BLOCK, REVERSED) + tl.arange(0, BLOCK)
        z_s = _load(student, column, vocabulary, stride, inner_s, outer_s, CAPPED_S)
        z_t = _load(teacher, column, vocabulary, stride, inner_t, outer_t, CAPPED_T)
        max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint = merge(
            z_s, z_t, max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint
        )
    joint = tl.where(joint > 0.0, 1.0, 0.0)
    return max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint


@triton.jit
def _pivot(maximum):
    """What is subtracted from the logits: their maximum, or 0 where all of them are -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _mixture_sums(
    student, teacher, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, max_s, max_t, sum_s, sum_t, alpha,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(p_s || m) and KL(p_t || m)."""
    shift = log_ratio(sum_s, sum_t)  # log p_s - log p_t is the pivoted gap less this
    total_s = tl.full((), 0.0, student.dtype.element_ty)
    total_t = total_s
    for step in range(tl.cdiv(vocabulary, BLOCK)):
        column = _first_column(step, vocabulary, BLOCK, False) + tl.arange(0, BLOCK)
        y_s = _load(student, column, vocabulary, stride, inner_s, outer_s, CAPPED_S) - max_s
        y_t = _load(teacher, column, vocabulary, stride, inner_t, outer_t, CAPPED_T) - max_t
        q, over = over_mixture(y_s - y_t, shift, alpha)
        add_s, add_t = tl.reduce((select(exp(y_s), over), select(exp(y_t), over - q)), 0, add_pair)
        total_s += add_s
        total_t += add_t
    return total_s / sum_s, total_t / sum_t


@triton.jit
def _label_logit(row, label, vocabulary, inner, outer, CAPPED: tl.constexpr):
    """z[label]; 0 where the label is not within the row: absent, or in another part of the vocabulary."""
    inside = (label >= 0) & (label < vocabulary)
    z = _transform(tl.load(row + tl.where(inside, label, 0)), inner, outer, CAPPED)
    return tl.where(inside, z, 0.0)


@triton.jit
def _logprob(row, label, vocabulary, inner, outer, maximum, total, CAPPED: tl.constexpr):
    """log p[label]; 0 where absent, NaN where out of range."""
    value = _label_logit(row, label, vocabulary, inner, outer, CAPPED) - maximum - log1p(total - 1.0)
    value = tl.where((label >= 0) & (label < vocabulary), value, float("nan"))
    return tl.where(label == _ABSENT, 0.0, value)


@triton.jit
def _numbers(
    student, teacher, target, tokens, row, count, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, alpha,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All fields of a row, written to `tokens`; returns what the token loss and the gradient need of them."""
    max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint = _statistics(
        student, teacher, vocabulary, stride, inner_s, outer_s, inner_t, outer_t,
        CAPPED_S, CAPPED_T, BLOCK, alpha is not None,
    )  # fmt: skip
    shift = log_ratio(sum_s, sum_t)
    kl_f = not_negative(shift - gap_t / sum_t)
    kl_r = not_negative(gap_s / sum_s - shift)
    entropy = not_negative(log1p(sum_s - 1.0) - first_s / sum_s)
    tl.store(tokens + row, kl_f)
    tl.store(tokens + count + row, kl_r)
    tl.store(tokens + 4 * count + row, entropy)
    tl.store(tokens + 6 * count + row, not_negative(log1p(sum_t - 1.0) - first_t / sum_t))
    tl.store(tokens + 7 * count + row, joint + 0.0 * (sum_s + sum_t + shift))  # NaN in a row: NaN here
    max_s, max_t = _pivot(max_s), _pivot(max_t)
    jsd, kl_m, logprob = shift * 0.0, shift * 0.0, shift * 0.0
    if alpha is not None:
        kl_m, kl_t = _mixture_sums(
            student, teacher, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, max_s, max_t, sum_s, sum_t, alpha,
            CAPPED_S, CAPPED_T, BLOCK,
        )  # fmt: skip
        jsd = not_negative(alpha * kl_t + (1.0 - alpha) * kl_m)
        tl.store(tokens + 2 * count + row, jsd)
    if target is not None:
        label = tl.load(target + row)
        logprob = _logprob(student, label, vocabulary, inner_s, outer_s, max_s, sum_s, CAPPED_S)
        tl.store(tokens + 3 * count + row, logprob)
        teacher_logprob = _logprob(teacher, label, vocabulary, inner_t, outer_t, max_t, sum_t, CAPPED_T)
        tl.store(tokens + 5 * count + row, teacher_logprob)
    return max_s, max_t, sum_s, sum_t, kl_f, kl_r, jsd, logprob, entropy, kl_m


@triton.jit
def _write_gradient(
    student, teacher, gradient, target, row, vocabulary, stride, inner_s, outer_s, slope_s, inner_t, outer_t, alpha,
    max_s, max_t, sum_s, sum_t, kl_r, entropy, kl_m, g_f, g_r, g_j, g_l, g_h,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of a row (README, "The gradient"); an upstream gradient of None is not computed."""
    shift = log_ratio(sum_s, sum_t)
    poison = 0.0 * shift  # NaN for a row that is all -inf, whose terms are all dropped
    constant = tl.full((), 0.0, student.dtype.element_ty)
    if g_f is not None:
        constant += g_f
    if g_r is not None:
        constant -= select(g_r, kl_r) + g_r * shift
    if g_h is not None:
        constant -= g_h * (entropy - log1p(sum_s - 1.0))
    if g_j is not None:
        constant -= g_j * (1.0 - alpha) * kl_m
    if g_l is not None:
        label = tl.load(target + row)
        g_l = tl.where(label == _ABSENT, 0.0, g_l)
        constant -= g_l
    for step in range(tl.cdiv(vocabulary, BLOCK)):
        column = _first_column(step, vocabulary, BLOCK, True) + tl.arange(0, BLOCK)
        z_s = _load(student, column, vocabulary, stride, inner_s, outer_s, CAPPED_S)
        y_s = z_s - max_s
        y_t = _load(teacher, column, vocabulary, stride, inner_t, outer_t, CAPPED_T) - max_t
        bracket = constant
        if g_r is not None:
            bracket += select(g_r, y_s - y_t)
        if g_h is not None:
            bracket -= g_h * y_s
        if g_j is not None:
            bracket += g_j * (1.0 - alpha) * over_mixture(y_s - y_t, shift, alpha)[1]
        out = select(exp(y_s), bracket * (slope_s / sum_s)) + poison
        if g_f is not None:
            out -= exp(y_t) * (g_f * (slope_s / sum_t))
        if g_l is not None:
            out += tl.where(column == label, g_l * slope_s, 0.0)
        if CAPPED_S:  # dc/du = 1 - (c / cap)^2, and 0 at a logit of -inf
            bend = z_s / outer_s
            out *= not_negative(1.0 - bend * bend)
        tl.debug_barrier()  # every thread has its logits before any writes over them
        tl.store(gradient + column, out.to(gradient.dtype.element_ty), mask=column < stride)


@triton.jit
def _write_zeros(row, stride, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), row.dtype.element_ty)
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row + column, zero, mask=column < stride)


_VARYING = ["count", "vocabulary"]
_ANY_ALIGNMENT = ["target", "keep", "w_f", "w_r", "w_j", "w_l", "w_h", "old_logprob", "state"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def affine_kernel(
    student, teacher, gradient, target, keep, w_f, w_r, w_j, w_l, w_h, old_logprob, tokens, loss,
    count, vocabulary, stride, gradient_stride, inner_s, outer_s, slope_s, inner_t, outer_t, alpha, clip,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics, token loss and gradient of one row."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * stride
    if gradient is not None:
        gradient += row * gradient_stride
    kept = True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        max_s, max_t, sum_s, sum_t, kl_f, kl_r, jsd, logprob, entropy, kl_m = _numbers(
            student, teacher, target, tokens, row, count, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, alpha,
            CAPPED_S, CAPPED_T, BLOCK,
        )  # fmt: skip
        ratio = sum_s * 0.0 + 1.0
        if clip is not None:
            exponent = logprob - tl.load(old_logprob + row)
            exponent = tl.where(exponent > 20.0, 20.0, tl.where(exponent < -20.0, -20.0, exponent))
            ratio = exp(exponent)
            ratio = tl.where(ratio > clip, clip, ratio)
        g_f = tl.load(w_f + row) * ratio if w_f is not None else None
        g_r = tl.load(w_r + row) * ratio if w_r is not None else None
        g_j = tl.load(w_j + row) * ratio if w_j is not None else None
        g_l = tl.load(w_l + row) * ratio if w_l is not None else None
        g_h = tl.load(w_h + row) * ratio if w_h is not None else None
        total = tl.full((), 0.0, student.dtype.element_ty)
        if g_f is not None:
            total += select(g_f, kl_f)
        if g_r is not None:
            total += select(g_r, kl_r)
        if g_j is not None:
            total += select(g_j, jsd)
        if g_l is not None:
            total += select(g_l, logprob)
        if g_h is not None:
            total += select(g_h, entropy)
        tl.store(loss + row, total)
        if gradient is not None:
            _write_gradient(
                student, teacher, gradient, target, row, vocabulary, stride,
                inner_s, outer_s, slope_s, inner_t, outer_t, alpha,
                max_s, max_t, sum_s, sum_t, kl_r, entropy, kl_m, g_f, g_r, g_j, g_l, g_h, CAPPED_S, CAPPED_T, BLOCK,
            )  # fmt: skip
    elif gradient is not None:
        _write_zeros(gradient, stride, BLOCK)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def stats_kernel(
    student, teacher, target, keep, tokens, state, count, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, alpha,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All fields of one row, and the state that its gradient needs."""
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        max_s, max_t, sum_s, sum_t, _, kl_r, _, _, entropy, kl_m = _numbers(
            student + row * stride, teacher + row * stride, target, tokens, row, count, vocabulary, stride,
            inner_s, outer_s, inner_t, outer_t, alpha, CAPPED_S, CAPPED_T, BLOCK,
        )  # fmt: skip
        tl.store(state + row, max_s)
        tl.store(state + count + row, max_t)
        tl.store(state + 2 * count + row, sum_s)
        tl.store(state + 3 * count + row, sum_t)
        tl.store(state + 4 * count + row, kl_r)
        tl.store(state + 5 * count + row, entropy)
        tl.store(state + 6 * count + row, kl_m)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def partial_kernel(
    student, teacher, target, keep, partial, count, vocabulary, stride, inner_s, outer_s, inner_t, outer_t,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of one row over a part of the vocabulary, in the order of `statistics.PARTIAL`."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * stride
    kept = True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint = _statistics(
            student, teacher, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, CAPPED_S, CAPPED_T, BLOCK, False
        )
        tl.store(partial + row, max_s)
        tl.store(partial + count + row, max_t)
        tl.store(partial + 2 * count + row, sum_s)
        tl.store(partial + 3 * count + row, sum_t)
        tl.store(partial + 4 * count + row, first_s)
        tl.store(partial + 5 * count + row, first_t)
        tl.store(partial + 6 * count + row, gap_s)
        tl.store(partial + 7 * count + row, gap_t)
        tl.store(partial + 8 * count + row, joint)
        if target is not None:
            label = tl.load(target + row)
            label_s = _label_logit(student, label, vocabulary, inner_s, outer_s, CAPPED_S)
            label_t = _label_logit(teacher, label, vocabulary, inner_t, outer_t, CAPPED_T)
            tl.store(partial + 9 * count + row, label_s)
            tl.store(partial + 10 * count + row, label_t)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def mixture_kernel(
    student, teacher, keep, state, sums, count, vocabulary, stride, inner_s, outer_s, inner_t, outer_t, alpha,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part's share of KL(p_s || m) and KL(p_t || m) of one row."""
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        max_s, max_t = tl.load(state + row), tl.load(state + count + row)
        sum_s, sum_t = tl.load(state + 2 * count + row), tl.load(state + 3 * count + row)
        kl_m, kl_t = _mixture_sums(
            student + row * stride, teacher + row * stride, vocabulary, stride, inner_s, outer_s, inner_t, outer_t,
            max_s, max_t, sum_s, sum_t, alpha, CAPPED_S, CAPPED_T, BLOCK,
        )  # fmt: skip
        tl.store(sums + row, kl_m)
        tl.store(sums + count + row, kl_t)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def grad_kernel(
    student, teacher, gradient, target, keep, w_f, w_r, w_j, w_l, w_h, state,
    count, vocabulary, stride, gradient_stride, inner_s, outer_s, slope_s, inner_t, outer_t, alpha,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row from its state."""
    row = tl.program_id(0).to(tl.int64)
    gradient += row * gradient_stride
    kept = True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        max_s, max_t = tl.load(state + row), tl.load(state + count + row)
        sum_s, sum_t = tl.load(state + 2 * count + row), tl.load(state + 3 * count + row)
        kl_r, entropy = tl.load(state + 4 * count + row), tl.load(state + 5 * count + row)
        kl_m = tl.load(state + 6 * count + row)
        g_f = tl.load(w_f + row) if w_f is not None else None
        g_r = tl.load(w_r + row) if w_r is not None else None
        g_j = tl.load(w_j + row) if w_j is not None else None
        g_l = tl.load(w_l + row) if w_l is not None else None
        g_h = tl.load(w_h + row) if w_h is not None else None
        _write_gradient(
            student + row * stride, teacher + row * stride, gradient, target, row, vocabulary, stride,
            inner_s, outer_s, slope_s, inner_t, outer_t, alpha,
            max_s, max_t, sum_s, sum_t, kl_r, entropy, kl_m, g_f, g_r, g_j, g_l, g_h, CAPPED_S, CAPPED_T, BLOCK,
        )  # fmt: skip
    else:
        _write_zeros(gradient, stride, BLOCK)
