"""Row kernels in PyTorch: from two tiles of raw logits to per-token numbers and dL/dlogits, on any device.

A tile is (C, V) and is walked in blocks of rows that stay in the processor's cache; the gradient is written over the
student's tile. Letters and formulas are those of the op's README.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._head import ABSENT_TARGET, Transform
from .._rows import blocks, blocks_bytes, to_z_
from .fields import DIFFERENTIABLE, FIELDS
from .statistics import PARTIAL, STATE, finish, label_logit, pivot, state_of

ROUNDS = False
SCRATCH_BLOCKS = 5  # e_s, e_t, gap, product, mixture
# |log p_s - log p_t| beyond this is as good as infinite to a mixture (e^-80 is 0 next to 1); e^80 is finite in fp32.
GAP_LIMIT = 80.0


def row_stride(vocabulary: int) -> int:
    """Elements from one row of a tile to the next."""
    return vocabulary


def scratch_bytes(count: int, vocabulary: int, itemsize: int, device_type: str = "cpu") -> int:
    """Bytes that a call on `count` rows needs beyond the two tiles."""
    return blocks_bytes(SCRATCH_BLOCKS, count, vocabulary, itemsize, device_type)


def affine_(
    student: Tensor,  # (C, V) raw logits; receives dL/dlogits if `gradient_dtype`
    teacher: Tensor,  # (C, V) raw logits; overwritten
    target: Tensor | None,  # (C,) int64
    weights: dict[str, Tensor],  # field -> (C,)
    old_logprob: Tensor | None,  # (C,)
    importance_clip: float | None,
    transforms: tuple[Transform, Transform],
    alpha: float | None,  # strictly between 0 and 1, or None: no JSD
    keep: Tensor | None,  # (C,) bool; a row that is not kept gets zeros everywhere, whatever it holds
    tokens: Tensor,  # (8, C) receives the fields
    loss: Tensor,  # (C,) receives ratio * sum_k weights_k field_k
    gradient_dtype: torch.dtype | None,  # None: no gradient; else it comes out in the tile's dtype, to be rounded later
) -> Tensor | None:
    """Statistics, token loss and gradient of a tile in one pass over its blocks; returns dL/dlogits, (C, V)."""
    for part in _parts(student, teacher):
        rows = part.rows
        labels = None if target is None else target[rows]
        numbers = _statistics(part, labels, transforms, alpha)
        _write(numbers, tokens[:, rows])
        upstream = {name: weight[rows, None] for name, weight in weights.items()}
        if importance_clip is not None and old_logprob is not None:
            ratio = (numbers["student_logprob"] - old_logprob[rows, None]).clamp(-20, 20).exp()
            ratio = ratio.clamp(max=importance_clip)
            upstream = {name: ratio * weight for name, weight in upstream.items()}
        loss[rows] = 0.0
        for name, weight in upstream.items():
            loss[rows] += _select(weight, weight * numbers[name])[:, 0]
        if gradient_dtype is not None:
            _gradient_(part, numbers, labels, upstream, transforms[0], alpha)
    _zero_dropped_(keep, tokens, loss)
    return None if gradient_dtype is None else _without_dropped_(student, keep)


def divergence_stats(
    student: Tensor,  # (C, V) raw logits; left pivoted for `divergence_grad_`
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,)
    transforms: tuple[Transform, Transform],
    alpha: float | None,  # strictly between 0 and 1, or None: no JSD
    keep: Tensor | None,  # (C,) bool
    tokens: Tensor,  # (8, C) receives the fields
) -> Tensor:
    """All fields of a tile, for a token loss that is not known yet; returns what `divergence_grad_` needs of them."""
    state = student.new_zeros(len(STATE), student.shape[0])
    for part in _parts(student, teacher):
        labels = None if target is None else target[part.rows]
        numbers = _statistics(part, labels, transforms, alpha)
        _write(numbers, tokens[:, part.rows])
        flat = {name: value[:, 0] for name, value in numbers.items()}
        state[:, part.rows] = state_of(flat, flat["sum_s"])
    _zero_dropped_(keep, tokens)
    return state


def partial_statistics(
    student: Tensor,  # (C, V) raw logits of a part of the vocabulary; left pivoted
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,) positions within the part; -100 where the target is elsewhere
    transforms: tuple[Transform, Transform],
    keep: Tensor | None,  # (C,) bool; a row that is not kept holds anything
) -> Tensor:
    """(len(PARTIAL), C): the sums of `statistics.PARTIAL` over this part."""
    partial = student.new_zeros(len(PARTIAL), student.shape[0])
    for part in _parts(student, teacher):
        labels = None if target is None else target[part.rows]
        for i, value in enumerate(_partial(part, labels, transforms).values()):
            partial[i, part.rows] = value[:, 0]
    return partial


def repivot_(student: Tensor, teacher: Tensor, partial: Tensor, state: Tensor) -> None:
    """Move tiles that `partial_statistics` pivoted about their own maxima to those in `state`."""
    for i, tile in enumerate((student, teacher)):
        tile.sub_((state[i] - pivot(partial[i]))[:, None])


def mixture_sums(
    student: Tensor,  # (C, V) pivoted about the maxima in `state`
    teacher: Tensor,  # (C, V) likewise
    state: Tensor,  # (len(STATE), C)
    transforms: tuple[Transform, Transform],
    alpha: float,
    keep: Tensor | None,  # (C,) bool
) -> Tensor:
    """(2, C): this part's share of KL(p_s || m) and KL(p_t || m)."""
    sums = student.new_zeros(2, student.shape[0])
    for part in _parts(student, teacher):
        numbers = {name: state[i, part.rows, None] for i, name in enumerate(STATE)}
        _exponentials(part)
        part.careful = part.z_s.device.type != "cpu" or not bool(part.gap.sum().isfinite())
        for i, value in enumerate(_mixture_sums(part, numbers, alpha)):
            sums[i, part.rows] = value[:, 0]
    return sums


def divergence_grad_(
    student: Tensor,  # (C, V) as `divergence_stats` left it; receives dL/dlogits
    teacher: Tensor,  # (C, V) likewise; overwritten
    state: Tensor,  # what `divergence_stats` returned
    target: Tensor | None,  # (C,)
    upstream: dict[str, Tensor],  # field -> dL/dfield (C,)
    transforms: tuple[Transform, Transform],
    alpha: float | None,
    keep: Tensor | None,  # (C,) bool
    gradient_dtype: torch.dtype,
) -> Tensor:
    """dL/dlogits, (C, V), written over the student's tile in its dtype."""
    for part in _parts(student, teacher):
        labels = None if target is None else target[part.rows]
        numbers = {name: state[i, part.rows, None] for i, name in enumerate(STATE)}
        _exponentials(part)
        # A -inf or NaN logit poisons this sum; see `_partial`.
        part.careful = part.z_s.device.type != "cpu" or not bool(part.gap.sum().isfinite())
        if alpha is not None and "jsd" in upstream:
            _mixture(part, numbers, alpha)
        _gradient_(part, numbers, labels, {k: g[part.rows, None] for k, g in upstream.items()}, transforms[0], alpha)
    return _without_dropped_(student, keep)


def _zero_dropped_(keep: Tensor | None, *outputs: Tensor) -> None:
    if keep is not None:
        for output in outputs:
            output.masked_fill_(~keep, 0)


def _without_dropped_(gradient: Tensor, keep: Tensor | None) -> Tensor:
    return gradient if keep is None else gradient.masked_fill_(~keep[:, None], 0)


@dataclass
class _Part:
    """A block of rows of both tiles and its scratch, (R, V) each."""

    rows: slice
    z_s: Tensor  # raw logits, then z - max
    z_t: Tensor
    e_s: Tensor  # exp(z - max)
    e_t: Tensor
    gap: Tensor  # z_s - z_t, pivoted
    product: Tensor
    mixture: Tensor  # log p_s - log m
    careful: bool = False  # a -inf or NaN is about: select, never multiply by 0


def _parts(student: Tensor, teacher: Tensor) -> Iterator[_Part]:
    for rows, scratch in blocks(student, SCRATCH_BLOCKS):
        yield _Part(rows, student[rows], teacher[rows], *scratch)


def _select(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, but exactly 0 where `weight` is 0, whatever it holds there."""
    return value.masked_fill(weight == 0, 0.0)


def _expectation(part: _Part, e: Tensor, value: Tensor) -> Tensor:
    """sum_v e_v value_v, (R, 1)."""
    torch.mul(e, value, out=part.product)
    if part.careful:
        part.product.masked_fill_(e == 0, 0.0)
    return part.product.sum(-1, keepdim=True)


def _exponentials(part: _Part) -> None:
    torch.exp(part.z_s, out=part.e_s)
    torch.exp(part.z_t, out=part.e_t)
    torch.sub(part.z_s, part.z_t, out=part.gap)


def _partial(part: _Part, labels: Tensor | None, transforms: tuple[Transform, Transform]) -> dict[str, Tensor]:
    """Pivot both tiles in place; return every entry of PARTIAL as (R, 1), in its order."""
    to_z_(part.z_s, transforms[0])
    to_z_(part.z_t, transforms[1])
    maxima = part.z_s.amax(-1, keepdim=True), part.z_t.amax(-1, keepdim=True)
    absent = torch.zeros_like(maxima[0])
    at_label = [absent if labels is None else label_logit(z, labels) for z in (part.z_s, part.z_t)]
    part.z_s.sub_(pivot(maxima[0]))
    part.z_t.sub_(pivot(maxima[1]))
    _exponentials(part)
    # On CPU the fast sums are tried first: a -inf turns 0 * -inf into NaN and only then the block is summed with
    # selection (a pass more). Elsewhere asking would cost a synchronisation, so selection is always on.
    part.careful = part.z_s.device.type != "cpu"
    sums = _sums(part)
    if not part.careful and bool(torch.stack(sums).isnan().any()):
        part.careful = True
        sums = _sums(part)
    torch.add(part.z_s, part.z_t, out=part.product)
    joint = (part.product.amax(-1, keepdim=True) == 0).to(absent)  # both are 0 where both have their maximum
    return dict(zip(PARTIAL, (*maxima, *sums, joint, *at_label), strict=True))


def _statistics(
    part: _Part, labels: Tensor | None, transforms: tuple[Transform, Transform], alpha: float | None
) -> dict[str, Tensor]:
    """Pivot both tiles in place; return every field and every entry of STATE as (R, 1)."""
    target = None if labels is None else labels[:, None]
    numbers = finish(_partial(part, labels, transforms), target, part.z_s.shape[1])
    if alpha is not None:
        total_s, total_t = _mixture_sums(part, numbers, alpha)
        numbers["kl_student_mixture"] = total_s
        numbers["jsd"] = (alpha * total_t + (1 - alpha) * total_s).clamp_min(0)
    return numbers


def _sums(part: _Part) -> tuple[Tensor, ...]:
    """S_s, S_t, A_s, A_t, B_s, B_t of the README, (R, 1) each."""
    return (
        part.e_s.sum(-1, keepdim=True),
        part.e_t.sum(-1, keepdim=True),
        _expectation(part, part.e_s, part.z_s),
        _expectation(part, part.e_t, part.z_t),
        _expectation(part, part.e_s, part.gap),
        _expectation(part, part.e_t, part.gap),
    )


def _mixture(part: _Part, numbers: dict[str, Tensor], alpha: float) -> None:
    """q = log p_s - log p_t into `part.product`, log p_s - log m into `part.mixture`."""
    q = torch.sub(part.gap, (numbers["sum_s"] / numbers["sum_t"]).log(), out=part.product).clamp_(-GAP_LIMIT, GAP_LIMIT)
    torch.neg(q, out=part.mixture).expm1_().mul_(alpha).log1p_().neg_()  # -log((1 - alpha) + alpha e^-q)


def _mixture_sums(part: _Part, numbers: dict[str, Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p_s || m) and KL(p_t || m), (R, 1)."""
    _mixture(part, numbers, alpha)
    log_p_t_over_m = torch.sub(part.mixture, part.product, out=part.product)
    kl_teacher = _expectation(part, part.e_t, log_p_t_over_m) / numbers["sum_t"]
    return _expectation(part, part.e_s, part.mixture) / numbers["sum_s"], kl_teacher


def _write(numbers: dict[str, Tensor], tokens: Tensor) -> None:
    for i, name in enumerate(FIELDS):
        if name in numbers:
            tokens[i] = numbers[name][:, 0]


def _gradient_(
    part: _Part,
    numbers: dict[str, Tensor],
    labels: Tensor | None,
    upstream: dict[str, Tensor],
    transform: Transform,
    alpha: float | None,
) -> None:
    """Write dL/dlogits over `part.z_s` (README, "The gradient")."""
    sum_s, sum_t = numbers["sum_s"], numbers["sum_t"]
    g_l = upstream.get("student_logprob")
    if g_l is not None and labels is not None:
        upstream["student_logprob"] = g_l = g_l.masked_fill(labels[:, None] == ABSENT_TARGET, 0.0)
    bracket = _bracket(part, numbers, upstream, alpha)
    out = part.z_s if transform.softcap is None else part.product
    torch.mul(part.e_s, bracket.mul_(transform.slope / sum_s), out=out)
    if part.careful:
        out.masked_fill_(part.e_s == 0, 0.0)
        out.add_(0 * (sum_s / sum_t).log())  # NaN for a row that is all -inf, whose terms are all dropped
    if "kl_teacher_student" in upstream:
        out.addcmul_(part.e_t, upstream["kl_teacher_student"] * (transform.slope / sum_t), value=-1)
    if g_l is not None and labels is not None:
        column = labels[:, None].clamp(0, out.shape[1] - 1)
        out.scatter_add_(1, column, (g_l * transform.slope).masked_fill(column != labels[:, None], 0.0))
    if transform.softcap is not None:  # dc/du = 1 - (c / cap)^2, and 0 at a logit of -inf
        bend = part.z_s.add_(numbers["max_s"]).mul_(transform.temperature / transform.softcap)
        bend.square_().neg_().add_(1).clamp_min_(0).mul_(out)


def _bracket(part: _Part, numbers: dict[str, Tensor], upstream: dict[str, Tensor], alpha: float | None) -> Tensor:
    """A + b x - g_r y - g_j (1 - alpha) log m; (R, 1) if it does not depend on v, else (R, V) in `part.gap`."""
    g_f, g_r, g_j, g_l, g_h = (upstream.get(name) for name in DIFFERENTIABLE)
    constant = torch.zeros_like(numbers["sum_s"])
    if g_f is not None:
        constant += g_f
    if g_l is not None:
        constant -= g_l
    if g_r is not None:
        constant -= _select(g_r, g_r * numbers["kl_student_teacher"])
        constant -= g_r * (numbers["sum_s"] / numbers["sum_t"]).log()
    if g_h is not None:
        constant -= g_h * (numbers["student_entropy"] - numbers["sum_s"].log())
    if g_j is None and g_r is None and g_h is None:
        return constant
    bracket = part.gap
    if g_r is None:
        bracket.zero_()
    else:
        bracket.mul_(g_r)
        if part.careful:
            bracket.masked_fill_(g_r == 0, 0.0)
    if g_h is not None:
        bracket.addcmul_(part.z_s, g_h, value=-1)
    if g_j is not None and alpha is not None:
        constant -= (1 - alpha) * g_j * numbers["kl_student_mixture"]
        bracket.addcmul_(part.mixture, g_j, value=1 - alpha)
    return bracket.add_(constant)
