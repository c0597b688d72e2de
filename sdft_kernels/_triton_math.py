"""The divergence math of one block of logits as Triton functions, in fp32 (and fp64, for the interpreter).

Letters and formulas are those of `divergence/README.md`.
"""

import triton
import triton.language as tl

GAP_LIMIT = tl.constexpr(80.0)  # |log p_s - log p_t| beyond this is infinite to a mixture, and e^80 is finite in fp32


@triton.jit
def exp(x):
    """e^x to an ulp or two. 2^fl(x log2 e), which `tl.exp` is in fp32, is off by |x| 2^-24: 1e-6 at x = -20."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        rounded = x * 1.4426950408889634
        lost = tl.fma(x, 1.4426950216293335, -rounded) + x * 1.925963033500e-08
        power = tl.exp2(rounded)
        result = power + power * (tl.where(rounded > -200.0, lost, 0.0) * 0.6931471805599453)
    return result


@triton.jit
def log1p(w):
    """log(1 + w); below 1/2 by 2 atanh(w / (2 + w)), where 1 + w would round away what is small in w."""
    s = w / (2.0 + w)
    t = s * s
    if w.dtype == tl.float64:  # 2^-53 is small enough: the budgets of fp64 are 1e-10
        result = tl.log(1.0 + w)
    else:
        series = 1.0 + t * (0.33333333 + t * (0.2 + t * (0.14285714 + t * (0.11111111 + t * 0.090909091))))
        result = tl.where(tl.abs(w) < 0.5, 2.0 * s * series, tl.log(1.0 + w))
    return result


@triton.jit
def tanh(x):
    """tanh to an ulp: 1 - 2 e / (1 + e) with e = e^-2|x|, and below 0.625, where that cancels, Cephes' polynomial."""
    e = exp(-2.0 * tl.abs(x))
    t = 1.0 - 2.0 * e / (1.0 + e)
    large = tl.where(x < 0.0, -t, t)
    if x.dtype == tl.float64:
        result = large
    else:
        q = x * x
        p = -5.70498872745e-3 * q + 2.06390887954e-2
        p = ((p * q - 5.37397155531e-2) * q + 1.33314422036e-1) * q - 3.33332819422e-1
        result = tl.where(tl.abs(x) < 0.625, p * q * x + x, large)
    return result


@triton.jit
def not_negative(x):
    """max(x, 0) that keeps a NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def select(weight, value):
    """weight * value, and exactly 0 where the weight is 0, whatever the value."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def max_pair(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_seven(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def merge(z_s, z_t, max_s, max_t, sum_s, sum_t, first_s, first_t, gap_s, gap_t, joint):
    """The statistics with one block more: rescaled to the new maxima, then the block's own sums added.

    A side that was all -inf so far (sum 0) has a pivot of 0 and nothing to rescale. What has an e of 0 is dropped, not
    multiplied: it may stand beside an infinite gap. Two reductions of tuples: nine of single values would cost nine
    barriers a block.
    """
    block_s, block_t = tl.reduce((z_s, z_t), 0, max_pair)
    new_s, new_t = tl.maximum(max_s, block_s), tl.maximum(max_t, block_t)
    pivot_s = tl.where(new_s == float("-inf"), 0.0, new_s)
    pivot_t = tl.where(new_t == float("-inf"), 0.0, new_t)
    d_s = tl.where(sum_s == 0.0, 0.0, max_s - pivot_s)
    d_t = tl.where(sum_t == 0.0, 0.0, max_t - pivot_t)
    r_s, r_t = exp(d_s), exp(d_t)
    gap_s, first_s = select(r_s, gap_s + select(sum_s, d_s - d_t)), select(r_s, first_s + sum_s * d_s)
    gap_t, first_t = select(r_t, gap_t + select(sum_t, d_s - d_t)), select(r_t, first_t + sum_t * d_t)
    y_s, y_t = z_s - pivot_s, z_t - pivot_t
    e_s, e_t = exp(y_s), exp(y_t)
    gap = y_s - y_t
    both = tl.where((z_s == new_s) & (z_t == new_t), 1.0, 0.0).to(e_s.dtype)
    add_s, add_t, add_first_s, add_first_t, add_gap_s, add_gap_t, here = tl.reduce(
        (e_s, e_t, select(e_s, y_s), select(e_t, y_t), select(e_s, gap), select(e_t, gap), both), 0, add_seven
    )
    joint = here + tl.where((new_s == max_s) & (new_t == max_t), joint, 0.0)
    return (
        new_s, new_t, r_s * sum_s + add_s, r_t * sum_t + add_t, first_s + add_first_s, first_t + add_first_t,
        gap_s + add_gap_s, gap_t + add_gap_t, joint,
    )  # fmt: skip


@triton.jit
def log_ratio(sum_s, sum_t):
    """log(S_s / S_t), exact where the two are close: their difference is, their ratio is not."""
    return log1p((sum_s - sum_t) / sum_t)


@triton.jit
def over_mixture(gap, log_ratio, alpha):
    """q = log p_s - log p_t, and log p_s - log m = -log(1 + alpha (e^-q - 1)), exact near q = 0."""
    q = gap - log_ratio
    q = tl.where(q > GAP_LIMIT, GAP_LIMIT, tl.where(q < -GAP_LIMIT, -GAP_LIMIT, q))
    if q.dtype == tl.float64:
        w = alpha * (tl.exp(-q) - 1.0)
    else:
        x = -q
        small = 1.0 + x * (0.25 + x * (0.05 + x * (0.0083333333 + x * (0.0011904762 + x * 0.00014880952))))
        small = x * (1.0 + x * (0.5 + x * 0.16666667 * small))
        w = alpha * tl.where(tl.abs(x) < 0.5, small, exp(x) - 1.0)
    return q, -log1p(w)
