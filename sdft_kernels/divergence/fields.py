"""The per-token numbers of a pair of distributions, by name and in the order every implementation uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class TokenDivergence(NamedTuple):
    """Per-token numbers, each ``(N,)`` in the caller's token order, or None when not asked for.

    fp32 (fp64 for fp64 inputs), in nats, at the call's temperature. The first five accept an upstream gradient in
    `linear_divergence`; the last three never do. Masked tokens hold 0.

    Attributes:
        kl_teacher_student: KL(p_t || p_s), the paper's "forward" KL.
        kl_student_teacher: KL(p_s || p_t), the "reverse" KL.
        jsd: alpha KL(p_t || m) + (1 - alpha) KL(p_s || m) with m = (1 - alpha) p_s + alpha p_t; at `jsd_alpha` 0 and 1
            the matching KL (a jump: the limit at either end is 0).
        student_logprob: log p_s[target]; 0 where the target is -100. None without `target`.
        student_entropy: entropy of p_s.
        teacher_logprob: log p_t[target]; 0 where the target is -100. None without `target`.
        teacher_entropy: entropy of p_t.
        top1_agreement: 1 where the two distributions share a most likely token, else 0.
    """

    # Typed as present, which they are unless `outputs` leaves them out: callers need no assert.
    kl_teacher_student: Tensor = None  # type: ignore[assignment]
    kl_student_teacher: Tensor = None  # type: ignore[assignment]
    jsd: Tensor | None = None
    student_logprob: Tensor | None = None
    student_entropy: Tensor = None  # type: ignore[assignment]
    teacher_logprob: Tensor | None = None
    teacher_entropy: Tensor = None  # type: ignore[assignment]
    top1_agreement: Tensor = None  # type: ignore[assignment]

    def apply(self, function: Callable[[Tensor], Tensor]) -> TokenDivergence:
        """`function` of every number that is there."""
        return TokenDivergence(*(value if value is None else function(value) for value in self))  # type: ignore[arg-type]


FIELDS = TokenDivergence._fields
DIFFERENTIABLE = FIELDS[:5]
NEED_TARGET = ("student_logprob", "teacher_logprob")


def available_fields(has_target: bool, has_jsd: bool) -> tuple[str, ...]:
    """The fields a call can fill."""
    return tuple(f for f in FIELDS if (has_target or f not in NEED_TARGET) and (has_jsd or f != "jsd"))
