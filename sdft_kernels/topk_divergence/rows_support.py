"""Row kernels in PyTorch on the (C, K) entries of the support: which, their divergence, and its gradient. Any device.

All in fp64: K numbers a token cost nothing beside V, and nothing here then cancels that the logits have not lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._head import Transform
from .fields import MAX_LOG_MASS, PADDING, Restriction


def combine(student_ids: Tensor, teacher_ids: Tensor, support: str) -> Tensor:
    """Union (C, 2 K): the student's, then the teacher's others. Intersection (C, K): the teacher's that are shared."""
    ordered = student_ids.sort(-1).values
    place = torch.searchsorted(ordered, teacher_ids.contiguous()).clamp_max(ordered.shape[1] - 1)
    shared = ordered.gather(1, place) == teacher_ids
    if support == "intersection":
        return teacher_ids.masked_fill(~shared, PADDING)
    return torch.cat([student_ids, teacher_ids.masked_fill(shared, PADDING)], -1)


def log_mass(logprobs: Tensor, ids: Tensor) -> Tensor:
    """log of the probability of the support, (C, 1): -inf where it is empty."""
    return logprobs.double().masked_fill(ids == PADDING, -math.inf).logsumexp(-1, keepdim=True)


def log_rest(mass: Tensor) -> Tensor:
    """log(1 - e^mass): what a log-mass leaves."""
    return torch.where(mass < -math.log(2), (-mass.exp()).log1p(), (-mass.expm1()).log())


def support_divergence(
    a: Tensor,  # (C, K) z of the student where renormalised, else log p_s
    b: Tensor,  # (C, K) the teacher's
    ids: Tensor,  # (C, K), -1 in padding
    rests: tuple[Tensor, Tensor] | None,  # (C, 1) each, student's and teacher's log-probability of the rest: a bucket
    restriction: Restriction,
) -> tuple[Tensor, Tensor]:
    """The divergence (C,) and its gradient in `a` (C, K), 0 in padding; both fp64."""
    padding = ids == PADDING
    a, b = (v.double().masked_fill(padding, -math.inf) for v in (a, b))
    least = math.log(-math.expm1(MAX_LOG_MASS))
    if restriction.tail == "renormalize":
        x, y = _renormalize(a, padding), _renormalize(b, padding)
    elif rests is not None:
        x, y = (torch.cat([v, r.double().clamp_min(least)], -1) for v, r in zip((a, b), rests, strict=True))
    else:
        x, y = a, b
    terms, slopes = _pointwise(x, y, restriction.alpha)
    if restriction.per_entry_clip is not None:
        slopes = slopes.masked_fill(terms > restriction.per_entry_clip, 0.0)
        terms = terms.clamp(max=restriction.per_entry_clip)
    value = terms.sum(-1)
    if restriction.tail == "renormalize" and restriction.per_entry_clip is None:
        value = value.clamp_min(0)  # rounding may say -1e-17; beside a bucket held at its least -1e-10 is right
    if restriction.tail == "renormalize":
        slopes = slopes - x.exp() * slopes.sum(-1, keepdim=True)
    elif rests is not None:  # the rest is 1 - sum_k e^a_k, unless it is held at its least
        slopes, of_rest = slopes[:, :-1], slopes[:, -1:].masked_fill(rests[0] <= least, 0.0)
        slopes = slopes - (a - x[:, -1:]).exp() * of_rest
    # An empty support has nothing to tell apart.
    return value.masked_fill(padding.all(-1), 0.0), slopes.masked_fill(padding, 0.0)


def to_raw(gradient: Tensor, z: Tensor, transform: Transform) -> Tensor:
    """A gradient in z (C, K) as one in the raw logits; 0 at a logit of -inf, which no parameter moves."""
    gradient = (gradient * transform.slope).masked_fill(z == -math.inf, 0.0)
    if transform.softcap is None:
        return gradient
    bend = 1 - (z.double() * (transform.temperature / transform.softcap)).square()
    return gradient * bend.clamp_min(0)


def _renormalize(a: Tensor, padding: Tensor) -> Tensor:
    """log-probabilities within the support. NaN where it has entries and no probability; left alone where empty."""
    a = a - a.amax(-1, keepdim=True).masked_fill(padding.all(-1, keepdim=True), 0.0)
    return a - a.exp().sum(-1, keepdim=True).log().masked_fill(padding.all(-1, keepdim=True), 0.0)


def _pointwise(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The divergence's term of each outcome and its derivative in x; outcomes of probability 0 contribute nothing."""
    p_s, p_t = x.exp(), y.exp()
    if alpha == 0:
        return _select(p_t, p_t * (y - x)), -p_t
    if alpha == 1:
        terms = _select(p_s, p_s * (x - y))
        return terms, terms + p_s
    m = torch.logaddexp(x + math.log1p(-alpha), y + math.log(alpha))
    of_student = (1 - alpha) * _select(p_s, p_s * (x - m))  # its derivative too: the mixture's own terms cancel
    return alpha * _select(p_t, p_t * (y - m)) + of_student, of_student


def _select(p: Tensor, value: Tensor) -> Tensor:
    return value.masked_fill(p == 0, 0.0)
