"""Quantiles of numbers seen in parts: counts in fixed bins, which add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BINS_PER_OCTAVE = 64
OCTAVES = range(-30, 14)  # 9e-10 to 16384, in powers of 2
# One bin before the range, for 0 and what rounds to it, one after it, and one for NaN.
BINS = len(OCTAVES) * BINS_PER_OCTAVE + 3
# A quantile is at most this far, relatively, from the value with that rank: half a bin.
RESOLUTION = 2 ** (0.5 / BINS_PER_OCTAVE) - 1


def histogram(values: Tensor, mask: Tensor) -> Tensor:
    """How many of the values under the mask are in each bin, (BINS,) fp64; nothing waits for the device.

    Args:
        values: (N,) floating point.
        mask: (N,) bool.
    """
    values = values.detach().float()
    place = (values.clamp(min=2.0**OCTAVES.start).log2() - OCTAVES.start) * BINS_PER_OCTAVE
    # NaN has no place as an integer, so the bin is chosen before the conversion.
    place = place.floor().clamp(max=BINS - 3) + 1
    place = place.where(values >= 2.0**OCTAVES.start, 0.0).masked_fill(values.isnan(), BINS - 1)
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, place.long(), mask.double())


def quantiles(counts: Tensor, shares: Sequence[float]) -> list[float]:
    """The value of rank round(share * (n - 1)) of the n counted ones, for each share, to `RESOLUTION`.

    What lies below the bins is 0, what lies above them inf. NaN ranks above every number.

    Args:
        counts: (BINS,) from `histogram`, or a sum of such; n > 0.
    """
    running = counts.cumsum(0)
    total = int(running[-1])
    ranks = torch.tensor([round(share * (total - 1)) for share in shares], dtype=counts.dtype, device=counts.device)
    return [_value(place) for place in torch.searchsorted(running, ranks, right=True).tolist()]


def _value(place: int) -> float:
    """The middle of a bin, as a ratio."""
    if place == 0:
        return 0.0
    if place >= BINS - 2:
        return float("inf") if place == BINS - 2 else float("nan")
    return float(2 ** (OCTAVES.start + (place - 0.5) / BINS_PER_OCTAVE))
