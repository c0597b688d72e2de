"""From sums over a part of the vocabulary to a token's numbers: merging parts, and the closed forms of the README."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._head import ABSENT_TARGET

# Sums over a part of the vocabulary about its own maxima; a part that is all -inf has sums of 0 and maxima of -inf.
# `joint` is 1 where both models have their maximum at one token, `label_*` the logit z of the target, 0 elsewhere.
PARTIAL = (
    *("max_s", "max_t", "sum_s", "sum_t", "first_s", "first_t", "gap_s", "gap_t"),
    *("joint", "label_s", "label_t"),
)
# What the gradient needs of a token's numbers.
STATE = ("max_s", "max_t", "sum_s", "sum_t", "kl_student_teacher", "student_entropy", "kl_student_mixture")


def pivot(maximum: Tensor) -> Tensor:
    """What is subtracted from the logits: their maximum, or 0 where all of them are -inf."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def merge(parts: Tensor) -> dict[str, Tensor]:
    """One part's statistics from those of several: (R, len(PARTIAL), C) -> name -> (C,).

    R is small (ranks, not blocks), so this is plain PyTorch; the order of the parts is fixed, hence the bits too.
    """
    p = {name: parts[:, i] for i, name in enumerate(PARTIAL)}
    merged = {name: p[name].amax(0) for name in ("max_s", "max_t")}
    d_s, d_t = (
        (p[f"max_{side}"] - pivot(merged[f"max_{side}"])).masked_fill(p[f"sum_{side}"] == 0, 0.0) for side in "st"
    )
    for side, d in (("s", d_s), ("t", d_t)):
        scale, total = d.exp(), p[f"sum_{side}"]
        shift = (total * (d_s - d_t)).masked_fill(total == 0, 0.0)
        moved = {"sum": total, "first": p[f"first_{side}"] + total * d, "gap": p[f"gap_{side}"] + shift}
        for name, value in moved.items():
            merged[f"{name}_{side}"] = (scale * value).masked_fill(scale == 0, 0.0).sum(0)
        merged[f"label_{side}"] = p[f"label_{side}"].sum(0)
    both = (p["max_s"] == merged["max_s"]) & (p["max_t"] == merged["max_t"])
    merged["joint"] = (p["joint"] * both).amax(0)
    return merged


def finish(p: dict[str, Tensor], target: Tensor | None, vocabulary: int) -> dict[str, Tensor]:
    """Fields (but the JSD) and entries of STATE (but the mixture's) from the statistics of a whole row.

    Every tensor, `target` too, has one shape. A target out of range has a log-probability of NaN, and a row that is all
    -inf, or holds a NaN, comes out NaN.
    """
    log_ratio = (p["sum_s"] / p["sum_t"]).log()
    numbers = {
        "max_s": pivot(p["max_s"]),
        "max_t": pivot(p["max_t"]),
        "sum_s": p["sum_s"],
        "sum_t": p["sum_t"],
        "kl_teacher_student": (log_ratio - p["gap_t"] / p["sum_t"]).clamp_min(0),
        "kl_student_teacher": (p["gap_s"] / p["sum_s"] - log_ratio).clamp_min(0),
        "student_entropy": (p["sum_s"].log() - p["first_s"] / p["sum_s"]).clamp_min(0),
        "teacher_entropy": (p["sum_t"].log() - p["first_t"] / p["sum_t"]).clamp_min(0),
        "top1_agreement": p["joint"] + 0 * (p["sum_s"] + p["sum_t"] + log_ratio),
    }
    if target is not None:
        for side, name in (("s", "student_logprob"), ("t", "teacher_logprob")):
            value = p[f"label_{side}"] - numbers[f"max_{side}"] - p[f"sum_{side}"].log()
            value = value.masked_fill(out_of_range(target, vocabulary), math.nan)
            numbers[name] = value.masked_fill(target == ABSENT_TARGET, 0.0)
    return numbers


def out_of_range(target: Tensor, vocabulary: int) -> Tensor:
    """True where the target is neither in the vocabulary nor absent."""
    return ((target < 0) | (target >= vocabulary)) & (target != ABSENT_TARGET)


def label_logit(z: Tensor, target: Tensor) -> Tensor:
    """z (C, V) at the target (C,), as (C, 1); 0 where it is not within the row: absent, or in another part."""
    column = target[:, None]
    inside = column.clamp(0, z.shape[1] - 1)
    return z.gather(1, inside).masked_fill(column != inside, 0.0)


def state_of(numbers: dict[str, Tensor], like: Tensor) -> Tensor:
    """(len(STATE), C) of numbers given as (C,); 0 where one is not there."""
    zero = torch.zeros_like(like)
    return torch.stack([numbers.get(name, zero) for name in STATE])
