"""Means of batch metrics between two log calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_kernels.distill.batch import DistillBatch

# Counts, summed over batches and processes; everything else is a mean.
SUMMED = ("tokens_computed", "tokens_saved", "prefix_cache_hits")


class RunningMetrics:
    """Token-weighted means of metrics, sums of counts, and statistics of completion lengths."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._tokens: Tensor | int = 0
        self._lengths: list[int] = []
        self._limit = 0

    def add(self, metrics: dict[str, Tensor], batch: DistillBatch, max_completion_length: int) -> None:
        """Add the metrics of one batch."""
        tokens = metrics["tokens"]
        self._tokens = self._tokens + tokens
        self._lengths += batch.flatten().lengths
        self._limit = max_completion_length
        for name, value in metrics.items():
            if name != "tokens":
                self.add_mean(name, value, torch.ones_like(tokens) if name in SUMMED else tokens)

    def add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add one value with its weight."""
        self._sums[name] = self._sums.get(name, 0.0) + value.double() * weight
        self._weights[name] = self._weights.get(name, 0) + weight

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes since the last call; starts anew."""
        result: dict[str, float] = {}
        for name in sorted(self._sums):
            pair = torch.stack([self._sums[name], self._weights[name].double()])
            total, weight = accelerator.reduce(pair, reduction="sum").tolist()
            result[name] = total if name in SUMMED else total / max(weight, 1)
        if self._lengths:
            result["num_loss_tokens"] = int(
                accelerator.reduce(torch.as_tensor(self._tokens, dtype=torch.int64), reduction="sum")
            )
            count = len(self._lengths)
            result["completions/mean_length"] = sum(self._lengths) / count
            result["completions/max_length"] = max(self._lengths)
            # At the limit almost surely means cut there: an end exactly at the limit is rare and harmless to count.
            result["completions/clipped_ratio"] = sum(n >= self._limit for n in self._lengths) / count
        self._clear()
        return result
