"""What one call of the attention holds, whoever computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .parts import Scoring
from .tree import PrefixTree


class Inputs(NamedTuple):
    """One layer's tensors, last dimensions contiguous."""

    query: Tensor  # (T, Hq, D)
    key: Tensor  # (T, Hkv, D)
    value: Tensor  # (T, Hkv, D)
    sinks: Tensor | None  # (Hq,)
    cached_key: Tensor | None  # (P, Hkv, D)
    cached_value: Tensor | None  # (P, Hkv, D)

    @property
    def prefix(self) -> int:
        """Tokens in the cached prefix."""
        return 0 if self.cached_key is None else self.cached_key.shape[0]


class Options(NamedTuple):
    """What does not change from layer to layer."""

    tree: PrefixTree
    scoring: Scoring
    window: int | None


class Grads(NamedTuple):
    """Gradients of query, key, value (in their dtype) and sinks."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None


def grad_of_sinks(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """(Hq,) from the (T, Hq) LSE and rowsum(grad * out) - gradient of the LSE: a sink has a probability, no value."""
    if sinks is None:
        return None
    return -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum(0).to(sinks.dtype)
