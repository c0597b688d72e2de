"""The whole op in a page of plain PyTorch: the oracle in fp64, and `impl="reference"`. Materialises (N, V) logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._gemm import dense
from .._head import ABSENT_TARGET, IDENTITY, Transform
from .fields import GIVEN, MAX_LOG_MASS, PADDING, Restriction, TopkDivergence


def _log_softmax(input: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor]:
    """Raw logits and log p, (N, V) each."""
    raw = dense(input) @ dense(weight).t()
    if bias is not None:
        raw = raw + bias
    raw = raw.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
    absent = raw == -math.inf
    z = raw.masked_fill(absent, 0.0) * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return raw, (z / transform.temperature).masked_fill(absent, -math.inf).log_softmax(-1)


def _support(
    student: Tensor, teacher: Tensor, teacher_ids: Tensor | None, given: Tensor | None, r: Restriction
) -> Tensor:
    """ids from raw logits (N, V): a softcap rounds the largest to equals."""
    if r.support == GIVEN:
        assert given is not None
        return given
    student_ids = student.topk(r.k).indices if r.support != "teacher" else None
    if teacher_ids is None:
        teacher_ids = teacher.topk(r.k).indices
    if student_ids is None:
        return teacher_ids
    if r.support == "student":
        return student_ids
    among = (
        torch.zeros_like(student, dtype=torch.bool).scatter(1, student_ids, True).gather(1, teacher_ids.clamp_min(0))
    )
    if r.support == "intersection":
        return teacher_ids.where(among & (teacher_ids != PADDING), PADDING)
    return torch.cat([student_ids, teacher_ids.masked_fill(among, PADDING)], -1)


def _pointwise(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """The divergence's term of each outcome; an outcome of probability 0 contributes nothing."""
    p_s, p_t = x.exp(), y.exp()
    if alpha == 0:
        return (p_t * (y - x)).masked_fill(p_t == 0, 0.0)
    if alpha == 1:
        return p_s * (x - y).masked_fill(p_s == 0, 0.0)
    # Both -inf: keep NaN out of logaddexp's backward.
    both = (x == -math.inf) & (y == -math.inf)
    x, y = x.masked_fill(both, 0.0), y.masked_fill(both, 0.0)
    m = torch.logaddexp(x + math.log1p(-alpha), y + math.log(alpha))
    of_teacher, of_student = (p_t * (y - m).masked_fill(p_t == 0, 0.0)), (p_s * (x - m).masked_fill(p_s == 0, 0.0))
    return alpha * of_teacher + (1 - alpha) * of_student


def _with_tail(a: Tensor, tail: str) -> Tensor:
    """From log-probabilities on the support, -inf where there is no entry, to the outcomes that are compared."""
    if tail == "drop":
        return a
    empty = (a == -math.inf).all(-1, keepdim=True)
    mass = a.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    if tail == "renormalize":
        return a - mass
    return torch.cat([a, (-torch.expm1(mass.clamp(max=MAX_LOG_MASS))).log()], -1)


def divergence_on_support(a: Tensor, b: Tensor, ids: Tensor, r: Restriction) -> Tensor:
    """(N,) from log p_s and log p_t at `ids`, each (N, K); differentiable by autograd in `a`."""
    padding = ids == PADDING
    a, b = a.masked_fill(padding, -math.inf), b.masked_fill(padding, -math.inf)
    terms = _pointwise(_with_tail(a, r.tail), _with_tail(b, r.tail), r.alpha)
    if r.per_entry_clip is not None:
        terms = terms.clamp(max=r.per_entry_clip)
    return terms.sum(-1).masked_fill(padding.all(-1), 0.0)


def linear_topk_divergence_reference(
    student_input: Tensor,  # (N, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor | None,  # (N, H_t)
    teacher_weight: Tensor | None,  # (V, H_t)
    target: Tensor | None,  # (N,)
    *,
    restriction: Restriction,
    given: Tensor | None = None,  # (N, K)
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # (N, K) each
    mask: Tensor | None = None,  # (N,) bool
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    student_transform: Transform = IDENTITY,
    teacher_transform: Transform = IDENTITY,
) -> TopkDivergence:
    """`linear_topk_divergence` with the logits in memory, in the inputs' own dtype; autograd does the gradient."""
    index = (
        torch.arange(len(student_input), dtype=torch.int64, device=student_input.device)
        if mask is None
        else mask.nonzero()[:, 0]
    )
    raw, x = _log_softmax(student_input[index], student_weight, student_bias, student_transform)
    teacher_ids, teacher_raw, y = None, raw, x
    with torch.no_grad():
        if teacher_topk is not None:
            teacher_ids, logprobs = teacher_topk[0][index], teacher_topk[1][index].to(x.dtype)
            y = torch.full_like(x, -math.inf)
            y.scatter_(1, teacher_ids.clamp_min(0), logprobs.masked_fill(teacher_ids == PADDING, -math.inf))
            first = (teacher_ids == 0).any(-1)  # padding was scattered to id 0: put the real one back
            y[first, 0] = logprobs[teacher_ids == 0]
        elif teacher_input is not None and teacher_weight is not None:
            teacher_raw, y = _log_softmax(teacher_input[index], teacher_weight, teacher_bias, teacher_transform)
    ids = _support(raw, teacher_raw, teacher_ids, None if given is None else given[index], restriction)
    a, b = x.gather(1, ids.clamp_min(0)), y.gather(1, ids.clamp_min(0))
    masses = (v.detach().exp().masked_fill(ids == PADDING, 0.0).sum(-1) for v in (a, b))
    student_logprob = None
    if target is not None:
        present = target[index] != ABSENT_TARGET
        student_logprob = x.detach().gather(1, target[index].where(present, 0)[:, None])[:, 0].where(present, 0.0)
    student_mass, teacher_mass = masses
    tokens = TopkDivergence(divergence_on_support(a, b, ids, restriction), student_mass, teacher_mass, student_logprob)
    count = len(student_input)
    numbers = {n: v.new_zeros(count).index_put((index,), v) for n, v in tokens._asdict().items() if v is not None}
    return TopkDivergence(**numbers, ids=ids.new_full((count, ids.shape[1]), PADDING).index_put((index,), ids))
