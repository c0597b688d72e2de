"""Metrics that cost no extra pass: summaries of the per-token numbers of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_kernels.divergence import TokenDivergence

STUDENT_FIELDS = ("student_logprob", "student_entropy")
TEACHER_FIELDS = ("kl_teacher_student", "kl_student_teacher", "jsd", "teacher_logprob", "teacher_entropy")
QUANTILES = (0.5, 0.9, 0.99)


def quantile_name(share: float) -> str:
    """The metric's name, for example `kl_teacher_student_q90`."""
    return f"kl_teacher_student_q{round(100 * share)}"


@torch.no_grad()
def token_metrics(
    tokens: TokenDivergence, mask: Tensor, importance: Tensor | None, with_teacher: bool = True
) -> dict[str, Tensor]:
    """Means over the tokens in the loss, KL quantiles, and the effective sample size, as 0-d tensors.

    Args:
        tokens: (N,) numbers.
        mask: (N,) bool, tokens in the loss.
        importance: (N,) importance weights, or None.
        with_teacher: whether the numbers that involve a teacher mean anything.

    Returns:
        Means by field name; `kl_teacher_student_q50`, `_q90`, `_q99`; `top1_agreement`; `tokens` (count);
        `effective_sample_size` = (sum w)^2 / (n sum w^2), a share of the tokens, where importance weights are in use.
    """
    count = mask.sum()
    metrics = {"tokens": count}
    names = STUDENT_FIELDS + ((*TEACHER_FIELDS, "top1_agreement") if with_teacher else ())
    for name in names:
        values = getattr(tokens, name)
        if values is not None:
            metrics[name] = values.where(mask, 0.0).sum() / count.clamp(min=1)
    if not count:
        return metrics
    if with_teacher and tokens.kl_teacher_student is not None:
        kl = tokens.kl_teacher_student[mask].float()
        # Quantiles by sorting: torch.quantile stops at 2**24 values.
        ranked = kl.sort().values
        for q in QUANTILES:
            metrics[quantile_name(q)] = ranked[round(q * (len(ranked) - 1))]
    if importance is not None:
        w = importance[mask]
        metrics["effective_sample_size"] = w.sum() ** 2 / (len(w) * (w**2).sum().clamp(min=1e-30))
    return metrics
