"""One part of the attention in plain PyTorch: any device, a softcap, rows that see no key.

Scores of one block are held at a time: (Hq, BLOCK_ROWS, BLOCK_KEYS) in fp32 (fp64 for fp64). The query heads that share
a key head are rows of one product, so no key is repeated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .parts import FULL, Merged, Part, Scoring

BLOCK_ROWS = 128
BLOCK_KEYS = 512


def band_mask(part: Part, device: torch.device) -> Tensor:
    """(rows, keys) bool: True where the row sees the key."""
    length, count = part.size
    gap = (
        torch.arange(length, dtype=torch.int64, device=device)[:, None]
        + part.shift
        - torch.arange(count, dtype=torch.int64, device=device)
    )
    return (gap >= 0) & (gap < part.window)


def forward(query: Tensor, key: Tensor, value: Tensor, part: Part, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        query: (L, Hq, D) rows of the part.
        key, value: (S, Hkv, D).

    Returns:
        (L, Hq, D) and the (L, Hq) log-sum-exp, both wide; 0 and -inf for a row that sees no key.
    """
    length = query.shape[0]
    _, logits, _ = _logits(query, key, part, scoring)
    pivot = logits.amax(-1, keepdim=True)
    pivot = pivot.masked_fill(pivot == -math.inf, 0.0)
    weights = torch.exp(logits - pivot)
    total = weights.sum(-1, keepdim=True)
    output = weights @ _by_head(value) / total.masked_fill(total == 0, 1.0)
    return _unfolded(output, length), _unfolded(pivot + torch.log(total), length)[..., 0]


def backward(
    merged: Merged, query: Tensor, key: Tensor, value: Tensor, part: Part, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, Hq, D), (S, Hkv, D), (S, Hkv, D): gradients of query, key and value from one block, wide."""
    heads = key.shape[1]
    rows, logits, slope = _logits(query, key, part, scoring)
    grad_rows, keys, values = _folded(merged.grad, heads), _by_head(key), _by_head(value)
    probabilities = torch.exp(logits - _folded(merged.lse[..., None], heads))
    grad_logits = probabilities * (grad_rows @ values.mT - _folded(merged.delta[..., None], heads))
    if slope is not None:
        grad_logits *= slope
    grad_logits *= scoring.scale
    grad_key, grad_value = grad_logits.mT @ rows, probabilities.mT @ grad_rows
    return _unfolded(grad_logits @ keys, query.shape[0]), grad_key.transpose(0, 1), grad_value.transpose(0, 1)


def _logits(query: Tensor, key: Tensor, part: Part, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor | None]:
    """Folded rows, masked logits (Hkv, L * group, S), and the softcap's derivative."""
    heads = key.shape[1]
    rows = _folded(query, heads)
    logits = rows @ _by_head(key).mT * scoring.scale
    slope = None
    if scoring.softcap is not None:
        tanh = torch.tanh(logits / scoring.softcap)
        logits, slope = scoring.softcap * tanh, 1 - tanh * tanh
    if part.kind != FULL:
        seen = band_mask(part, query.device).repeat_interleave(query.shape[1] // heads, dim=0)
        logits = logits.masked_fill_(~seen, -math.inf)
    return rows, logits, slope


def _folded(rows: Tensor, heads: int) -> Tensor:
    """(L, Hq, D) to (Hkv, L * group, D), wide."""
    wide = rows.to(accumulate_dtype(rows.dtype)).unflatten(1, (heads, -1))
    return wide.transpose(0, 1).reshape(heads, -1, rows.shape[-1])


def _unfolded(rows: Tensor, length: int) -> Tensor:
    """(Hkv, L * group, D) to (L, Hq, D)."""
    return rows.unflatten(1, (length, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(tensor: Tensor) -> Tensor:
    """(S, Hkv, D) to (Hkv, S, D), wide."""
    return tensor.to(accumulate_dtype(tensor.dtype)).transpose(0, 1)
