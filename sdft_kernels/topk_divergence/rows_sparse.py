"""Products on K rows of the head a token: logits at given ids, and the gradients from K entries.

They run over the distinct ids of a few tokens at a time: dense products on a small head. So they need no atomics, give
the same bits twice, and round as the products on the whole head do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._chunks import Head, Products

# Tokens whose ids are gathered together: at K = 100 at most 6400 rows of a head of 50 to 260 thousand, in practice
# fewer, since tokens share their likely successors. Elsewhere than on CPU each group costs a host synchronisation.
TOKENS = {"cpu": 64, "cuda": 256}
SCRATCH_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}


def scratch_bytes(device: torch.device) -> int:
    """Bytes for the gathered rows and their tile."""
    return SCRATCH_BYTES.get(device.type, SCRATCH_BYTES["cuda"])


class _Part(NamedTuple):
    """Some distinct ids of some tokens, and where the tokens' entries are among them."""

    tokens: slice
    ids: Tensor  # (U,)
    place: Tensor  # (c, K) within [0, U), anything where not `inside`
    inside: Tensor  # (c, K)


def _parts(ids: Tensor, hidden: int, itemsize: int) -> Iterator[_Part]:
    """Walk `ids` (C, K) by few tokens, and their distinct ids by what fits the scratch. Padding counts as id 0."""
    # Two copies of the rows (in the weight's dtype, and cast or as a gradient), one tile.
    group = TOKENS.get(ids.device.type, TOKENS["cuda"])
    step = max(1, scratch_bytes(ids.device) // ((2 * hidden + group) * itemsize))
    for start in range(0, ids.shape[0], group):
        tokens = slice(start, min(start + group, ids.shape[0]))
        distinct, place = ids[tokens].clamp_min(0).unique(return_inverse=True)
        for first in range(0, distinct.shape[0], step):
            part = distinct[first : first + step]
            inside = (place >= first) & (place < first + step)
            yield _Part(tokens, part, (place - first).clamp(0, part.shape[0] - 1), inside)


def logits_at(gemm: Products, hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Raw logits (C, K) of `hidden` (C, H) at `ids`; anything where there is padding."""
    out = torch.zeros(ids.shape, dtype=gemm.accumulate, device=hidden.device)
    for part in _parts(ids, hidden.shape[1], gemm.accumulate.itemsize):
        states = hidden[part.tokens]
        tile = out.new_empty(states.shape[0], part.ids.shape[0])
        gemm.project(states, head.weight[part.ids], None if head.bias is None else head.bias[part.ids], tile)
        out[part.tokens] = tile.gather(1, part.place).where(part.inside, out[part.tokens])
    return out


def gradients_(
    gemm: Products,
    ids: Tensor,  # (C, K), -1 in padding
    entries: Tensor,  # (C, K) dL/d(raw logits), 0 in padding
    hidden: Tensor,  # (C, H)
    weight: Tensor,  # (V, H)
    grad_weight: Tensor | None,  # (V, H) += entries^T hidden
    grad_bias: Tensor | None,  # (V,) += their sum
    need_input: bool,
) -> Tensor:
    """dX (C, H) in `gemm.accumulate`, 0 unless needed; the other two are added to."""
    total = torch.zeros(hidden.shape, dtype=gemm.accumulate, device=hidden.device)
    for part in _parts(ids, hidden.shape[1], gemm.accumulate.itemsize):
        states = hidden[part.tokens]
        grad = total.new_zeros(states.shape[0], part.ids.shape[0])
        # Places meet only in padding, which adds 0: one value a place, whatever the order.
        grad.scatter_add_(1, part.place, entries[part.tokens].masked_fill(~part.inside, 0.0))
        if grad_bias is not None:
            grad_bias[part.ids] += grad.sum(0)
        grad = gemm.round_gradient(grad)
        if need_input:
            out = total.new_empty(states.shape)
            gemm.grad_input(grad, weight[part.ids], out)
            total[part.tokens] += out
        if grad_weight is not None:
            rows = grad_weight.new_zeros(part.ids.shape[0], states.shape[1])
            gemm.grad_weight(grad, states, rows)
            grad_weight[part.ids] += rows
    return total
