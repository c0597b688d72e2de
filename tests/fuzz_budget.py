"""Errors over the house's budget: twice what eager PyTorch loses in the same dtype, or 1 ulp."""

from __future__ import annotations

from torch import Tensor


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of a - b in fp64."""
    return (a.double() - b.double()).norm().item()


def over(value: Tensor, exact: Tensor, eager: list[Tensor], floor: float) -> float:
    """The error of `value` over its budget; above 1 it is too large, and infinite where `value` is not finite.

    Args:
        exact: the truth, fp64.
        eager: what eager PyTorch gives: the largest of their errors counts.
        floor: an error that is always allowed, before it is doubled.
    """
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    error = distance(value, exact)
    budget = 2 * max(floor, *(distance(e, exact) for e in eager), 0.0)
    if error == 0:
        return 0.0
    return error / budget if error == error and budget > 0 else float("inf")
