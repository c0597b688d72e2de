"""The per-token numbers of a pair of distributions on a restricted support, and the words that say which support."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SUPPORTS = ("student", "teacher", "union", "intersection")
TAILS = ("renormalize", "bucket", "drop")
GIVEN = "given"  # the support is the caller's ids
PADDING = -1  # no outcome at this place of `ids`
MAX_LOG_MASS = -1e-7  # a tail bucket never holds less than 1e-7, as in TRL: its logarithm stays finite


class TopkDivergence(NamedTuple):
    """Per-token numbers, each ``(N,)`` in the caller's token order (`ids` ``(N, K)``), or None when not asked for.

    fp32 (fp64 for fp64 inputs), in nats, at the call's temperature. Only `divergence` is differentiable. Masked tokens
    hold 0, and -1 in `ids`.

    Attributes:
        divergence: of the two distributions on the support, in the direction of `alpha`. Differentiable.
        student_mass: probability that p_s gives the support.
        teacher_mass: probability that p_t gives the support.
        student_logprob: log p_s[target] over the whole vocabulary; 0 where the target is -100. None without `target`.
        ids: int64, the support: ``(N, K)``, ``(N, 2 K)`` for a union; -1 where there is no entry.
    """

    # Typed as present: the divergence is, unless `outputs` leaves it out, and callers need no assert.
    divergence: Tensor = None  # type: ignore[assignment]
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    student_logprob: Tensor | None = None
    ids: Tensor = None  # type: ignore[assignment]


FIELDS = TopkDivergence._fields
NUMBERS = FIELDS[:4]


class Restriction(NamedTuple):
    """Which support, what becomes of the rest, and which divergence."""

    k: int
    support: str  # of SUPPORTS, or GIVEN
    tail: str  # of TAILS
    alpha: float
    per_entry_clip: float | None = None

    @property
    def width(self) -> int:
        """Places of a token in `ids`."""
        return 2 * self.k if self.support == "union" else self.k

    @property
    def dense(self) -> bool:
        """Whether every logit of the student has a gradient: the log-sum-exps cancel only when renormalised."""
        return self.tail != "renormalize"

    def projects(self, cached: bool, outputs: tuple[str, ...]) -> tuple[bool, bool]:
        """Whether the student's and the teacher's whole vocabulary must be projected (one GEMM each)."""
        search = self.support in ("union", "intersection")
        student = self.dense or search or self.support == "student"
        teacher = self.dense or search or self.support == "teacher"
        student = student or "student_mass" in outputs or "student_logprob" in outputs
        return student, not cached and (teacher or "teacher_mass" in outputs)

    def free_outputs(self, cached: bool, has_target: bool) -> tuple[str, ...]:
        """The fields that need no GEMM beyond those of the divergence."""
        student, teacher = self.projects(cached, ())
        free = dict(
            divergence=True, student_mass=student, teacher_mass=teacher or cached,
            student_logprob=student and has_target, ids=True,
        )  # fmt: skip
        return tuple(name for name in FIELDS if free[name])
