"""Row kernels in PyTorch on a tile of raw logits: the largest, the statistics, and the dense gradient. Any device.

A tile is (C, V) and is walked in blocks of rows that stay in the processor's cache; it is overwritten. Letters and
formulas are those of the op's README.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._head import ABSENT_TARGET, Transform
from .._rows import blocks, blocks_bytes, to_z_
from .fields import PADDING

SCRATCH_BLOCKS = 1  # e, or the gradient


class Statistics(NamedTuple):
    """Of each row of a tile, (C, 1) each: log p_v = z_v - top - log(total)."""

    top: Tensor
    total: Tensor  # sum_v e^(z_v - top)
    rest: Tensor  # the same over the entries that are not in the support

    def split(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the entries with `z` (C, K), and of all that is not among them (C, 1); fp64.

        The entries' own sum replaces their part of `total`: the outcomes then sum to 1 to the last bit of fp64, without
        which a divergence of 1e-3 carries the rounding of an fp32 sum in its first digits.
        """
        gap = z.double() - self.top
        entries = gap.masked_fill(ids == PADDING, -math.inf).exp().sum(-1, keepdim=True)
        rest = self.rest.double()
        return gap - (entries + rest).log(), -(entries / rest).log1p()


def scratch_bytes(count: int, vocabulary: int, itemsize: int, device_type: str = "cpu") -> int:
    """Bytes that a call on `count` rows needs beyond the tile."""
    return blocks_bytes(SCRATCH_BLOCKS, count, vocabulary, itemsize, device_type)


def largest(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids (C, k) of the largest logits, descending; (C,) whether the row is no distribution (NaN, inf, all -inf)."""
    values, ids = tile.topk(k, dim=-1)  # NaN counts as the largest
    return ids, ~values[:, 0].isfinite()


def at(tile: Tensor, ids: Tensor) -> Tensor:
    """The raw logits at `ids`; anything where there is padding."""
    return tile.gather(1, ids.clamp_min(0))


def statistics_(tile: Tensor, ids: Tensor, transform: Transform) -> Statistics:
    """Turn raw logits into z - top, in place, and sum them. `rest` is summed, not 1 - mass: a mass may round to 1."""
    result = Statistics(*(tile.new_empty(tile.shape[0], 1) for _ in Statistics._fields))
    for rows, (e,) in blocks(tile, SCRATCH_BLOCKS):
        z, entries = to_z_(tile[rows], transform), ids[rows]
        torch.amax(z, -1, keepdim=True, out=result.top[rows])
        torch.exp(z.sub_(result.top[rows]), out=e)
        torch.sum(e, -1, keepdim=True, out=result.total[rows])
        # A place of padding repeats an entry of its row; a row without entries leaves everything to the rest.
        some = entries.amax(-1, keepdim=True)
        e.scatter_(1, entries.where(entries != PADDING, some).clamp_min(0), 0.0)
        torch.sum(e, -1, keepdim=True, out=result.rest[rows])
        result.rest[rows] = result.rest[rows].where(some != PADDING, result.total[rows])
    return result


def gradient_(
    tile: Tensor,  # (C, V) as `statistics_` left it; receives dL/d(raw logits)
    statistics: Statistics,
    ids: Tensor,  # (C, K)
    entries: Tensor,  # (C, K) dL/dlog p at the entries, 0 in padding
    rest: Tensor,  # (C,) their sum
    transform: Transform,
) -> None:
    """dL/dz_v = [v in the support] entries_v - p_v rest, back to the raw logits."""
    for rows, (out,) in blocks(tile, SCRATCH_BLOCKS):
        z = tile[rows]
        torch.exp(z, out=out)
        out.mul_(-rest[rows, None] * transform.slope / statistics.total[rows])
        place = ids[rows].clamp_min(0)
        at_entries = (entries[rows] * transform.slope).masked_fill(z.gather(1, place) == -math.inf, 0.0)
        out.scatter_add_(1, place, at_entries)
        if transform.softcap is None:
            z.copy_(out)
        else:  # dc/du = 1 - (c / cap)^2, and 0 at a logit of -inf
            z.add_(statistics.top[rows]).mul_(transform.temperature / transform.softcap)
            z.square_().neg_().add_(1).clamp_min_(0).mul_(out)


def target_logprob(tile: Tensor, statistics: Statistics, target: Tensor) -> Tensor:
    """log p[target], (C,), of a tile that `statistics_` left: 0 where absent, NaN where out of range."""
    labels = target[:, None]
    inside = labels.clamp(0, tile.shape[1] - 1)
    value = (tile.gather(1, inside) - statistics.total.log()).masked_fill(labels != inside, math.nan)
    return value.masked_fill(labels == ABSENT_TARGET, 0.0)[:, 0]
