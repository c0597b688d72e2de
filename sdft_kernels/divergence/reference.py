"""The whole op in a page of plain PyTorch: the oracle in fp64, and `impl="reference"`. Materialises (N, V) logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._gemm import dense
from .._head import ABSENT_TARGET, IDENTITY, Transform
from .fields import TokenDivergence


def logits(input: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """z of shape (N, V); a logit of -inf stays -inf through scale, softcap and temperature."""
    raw = dense(input) @ dense(weight).t()
    if bias is not None:
        raw = raw + bias
    absent = raw == -math.inf
    z = raw.masked_fill(absent, 0.0) * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return (z / transform.temperature).masked_fill(absent, -math.inf)


def _expectation(p: Tensor, value: Tensor) -> Tensor:
    """sum_v p_v value_v, where a p_v of 0 contributes nothing whatever value_v is."""
    return (p * value.masked_fill(p == 0, 0.0)).sum(-1)


def divergence_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, jsd_alpha: float | None
) -> TokenDivergence:
    """All fields from z_s and z_t, each (N, V); differentiable by autograd in the student's logits."""
    x, y = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p_s, p_t = x.exp(), y.exp()
    kl_teacher_student = _expectation(p_t, y - x)
    kl_student_teacher = _expectation(p_s, x - y)
    jsd = None
    if jsd_alpha == 0:
        jsd = kl_teacher_student
    elif jsd_alpha == 1:
        jsd = kl_student_teacher
    elif jsd_alpha is not None:
        # Both -inf: m is -inf too, and the gap is NaN where p is 0; keep NaN out of logaddexp's backward.
        both = (x == -math.inf) & (y == -math.inf)
        x_, y_ = x.masked_fill(both, 0.0), y.masked_fill(both, 0.0)
        m = torch.logaddexp(x_ + math.log1p(-jsd_alpha), y_ + math.log(jsd_alpha))
        jsd = jsd_alpha * _expectation(p_t, y_ - m) + (1 - jsd_alpha) * _expectation(p_s, x_ - m)
    student_logprob = teacher_logprob = None
    if target is not None:
        present = target != ABSENT_TARGET
        column = target.where(present, 0)[:, None]
        student_logprob = x.gather(-1, column)[:, 0].where(present, 0.0)
        teacher_logprob = y.gather(-1, column)[:, 0].where(present, 0.0)
    agree = ((x == x.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))).any(-1).to(x.dtype)
    return TokenDivergence(
        kl_teacher_student=kl_teacher_student,
        kl_student_teacher=kl_student_teacher,
        jsd=jsd,
        student_logprob=student_logprob,
        student_entropy=-_expectation(p_s, x),
        teacher_logprob=teacher_logprob,
        teacher_entropy=-_expectation(p_t, y),
        top1_agreement=agree + 0 * (x.amax(-1) + y.amax(-1)),  # NaN in either row: NaN here too
    )


def linear_divergence_reference(
    student_input: Tensor,  # (N, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor,  # (N, H_t)
    teacher_weight: Tensor,  # (V, H_t)
    target: Tensor | None = None,  # (N,)
    *,
    mask: Tensor | None = None,  # (N,) bool
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    student_transform: Transform = IDENTITY,
    teacher_transform: Transform = IDENTITY,
    jsd_alpha: float | None = None,
) -> TokenDivergence:
    """`linear_divergence` with the logits in memory, in the inputs' own dtype; autograd does the gradient."""
    if mask is not None:
        index = mask.nonzero()[:, 0]
        student_input, teacher_input = student_input[index], teacher_input[index]
        target = target[index] if target is not None else None
    with torch.no_grad():
        z_t = logits(teacher_input, teacher_weight, teacher_bias, teacher_transform)
    z_s = logits(student_input, student_weight, student_bias, student_transform)
    low = torch.float64 if z_s.dtype == torch.float64 else torch.float32
    tokens = divergence_from_logits(z_s.to(low), z_t.to(low), target, jsd_alpha)
    tokens = tokens._replace(top1_agreement=tokens.top1_agreement.detach())
    if mask is None:
        return tokens
    return tokens.apply(lambda f: f.new_zeros(mask.shape).index_put((index,), f))
