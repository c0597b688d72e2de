"""Error budgets: a result is judged against fp64 truth by what eager PyTorch achieves in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding the exact result to its dtype costs up to half an ulp; an eager result may hit it exactly by luck.
ULPS = 1.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in fp64; the absolute norm where truth is 0. Equal infinities are no error.

    A NaN on one side only, or infinities that differ, give ``inf``.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    special = ~truth.isfinite() | ~actual.isfinite()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    if bool((special & ~same).any()):
        return float("inf")
    difference = (actual - truth).masked_fill(special, 0.0).norm().item()
    scale = truth.masked_fill(special, 0.0).norm().item()
    return difference / scale if scale > 0 else difference


def budget_ratio(actual: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Error of `actual` over the error of `eager`, both against `truth`; at most 1 ulp of the dtype counts as free."""
    floor = ULPS * torch.finfo(actual.dtype).eps
    return relative_error(actual, truth) / max(relative_error(eager, truth), floor)


def assert_within_budget(actual: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, name: str = "") -> float:
    """Assert |actual - truth| <= factor * max(|eager - truth|, 1 ulp) in norm; return the ratio.

    Raises:
        AssertionError: naming both errors.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    ratio = budget_ratio(actual, eager, truth)
    assert ratio <= factor, (
        f"{name}: error {relative_error(actual, truth):.3g} is {ratio:.3g} times the eager error "
        f"{relative_error(eager, truth):.3g} (at most {factor} allowed)"
    )
    return ratio
