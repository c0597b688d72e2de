"""Metrics between two log calls, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_kernels.distill.batch import DistillBatch
from sdft_kernels.distill.distiller import DistillOutput
from sdft_kernels.distill.histogram import BINS, histogram, quantiles
from sdft_kernels.distill.metrics import QUANTILES, STUDENT_FIELDS, TEACHER_FIELDS, quantile_name

TOKEN_MEANS = (*STUDENT_FIELDS, *TEACHER_FIELDS, "top1_agreement")
COUNTS = ("num_loss_tokens", "tokens_computed", "tokens_saved", "prefix_cache_hits")
LARGEST = ("completions/max_length", "prefix_cache_mib")
# Every metric has a place of its own, so that each process hands over the same vector, whatever its batches held.
NAMES = (
    *TOKEN_MEANS, "loss", "expert_logprob", "predicted_speedup", "completions/mean_length",
    "completions/clipped_ratio", "completions/skipped_ratio", *COUNTS, *LARGEST,
)  # fmt: skip
IMPORTANCE = ("sum", "sum of squares", "batches with weights")


class RunningMetrics:
    """Metrics of all tokens since the last `pop`, whatever batches and processes they came in.

    Means are weighted, counts are summed; of lengths and of the cache's size the largest stays. Quantiles are those of
    all tokens to `histogram.RESOLUTION` (0.5 %), the effective sample size is that of all tokens.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._pairs: dict[str, Tensor] = {}  # (value * weight, weight); of the largest ones (value, 1)
        self._importance: Tensor | None = None
        self._histogram: Tensor | None = None

    def add(self, output: DistillOutput, batch: DistillBatch, max_completion_length: int) -> None:
        """Add the metrics of one batch."""
        metrics, mask = output.metrics, output.mask
        tokens = metrics["tokens"]
        for name in TOKEN_MEANS:
            if name in metrics:
                self.accumulate(name, metrics[name], tokens)
        self.accumulate("num_loss_tokens", tokens, 1)
        for name in (*COUNTS, *LARGEST):
            if name in metrics:
                self.accumulate(name, metrics[name], 1)
        if "predicted_speedup" in metrics:
            # FLOPs saved over FLOPs computed; these are nearly in proportion to the tokens computed.
            self.accumulate("predicted_speedup", metrics["predicted_speedup"], metrics["tokens_computed"])
        self._add_lengths(output, batch, max_completion_length)
        importance = mask.double() if output.importance is None else output.importance.double().where(mask, 0.0)
        in_use = torch.full_like(importance.sum(), output.importance is not None)
        sums = torch.stack([importance.sum(), importance.square().sum(), in_use])
        self._importance = sums if self._importance is None else self._importance + sums
        if output.tokens.kl_teacher_student is not None:
            counts = histogram(output.tokens.kl_teacher_student, mask)
            self._histogram = counts if self._histogram is None else self._histogram + counts

    def _add_lengths(self, output: DistillOutput, batch: DistillBatch, limit: int) -> None:
        lengths = torch.tensor(batch.flatten().lengths, dtype=torch.int64, device=output.mask.device)
        if not len(lengths):
            return
        self.accumulate("completions/mean_length", lengths.double().mean(), len(lengths))
        self.accumulate("completions/max_length", lengths.max(), 1)
        # At the limit almost surely means cut there: an end exactly at the limit is rare and harmless to count.
        self.accumulate("completions/clipped_ratio", (lengths >= limit).double().mean(), len(lengths))
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device, dtype=torch.int64), lengths
        )
        counted = torch.zeros_like(lengths).index_add_(0, sequence, output.mask.long())
        self.accumulate("completions/skipped_ratio", (counted == 0).double().mean(), len(lengths))

    def accumulate(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add one value with its weight, for a count 1; `name` is one of `NAMES`.

        Raises:
            KeyError: another name, which the other processes would not hand over.
        """
        if name not in NAMES:
            raise KeyError(f"the metric {name!r} has no place in running.NAMES")
        new = torch.stack([value.double() * weight, torch.as_tensor(weight, dtype=torch.float64, device=value.device)])
        old = self._pairs.get(name)
        if old is None:
            self._pairs[name] = new
        else:
            self._pairs[name] = torch.maximum(old, new) if name in LARGEST else old + new

    def pop(self, accelerator: Any) -> dict[str, float]:
        """The metrics over all processes since the last call; starts anew. Every process has to call it.

        One reduction. A metric that no process has anything for is left out.
        """
        own = self._vector(accelerator.device)
        self.clear()
        return merged(accelerator.gather(own[None]))

    def _vector(self, device: torch.device) -> Tensor:
        """(WIDTH,) fp64: the pairs of `NAMES`, the three sums of `IMPORTANCE`, the histogram."""
        pairs = torch.zeros(len(NAMES), 2, dtype=torch.float64, device=device)
        for place, name in enumerate(NAMES):
            if name in self._pairs:
                pairs[place] = self._pairs[name]
        importance = torch.zeros(len(IMPORTANCE), dtype=torch.float64, device=device)
        if self._importance is not None:
            importance.copy_(self._importance)
        counts = torch.zeros(BINS, dtype=torch.float64, device=device)
        if self._histogram is not None:
            counts.copy_(self._histogram)
        return torch.cat([pairs.flatten(), importance, counts])


def merged(vectors: Tensor) -> dict[str, float]:
    """The metrics of several processes, from their vectors, (processes, WIDTH) fp64."""
    width = 2 * len(NAMES)
    pairs, importance, counts = vectors.cpu().tensor_split([width, width + len(IMPORTANCE)], dim=1)
    pairs = pairs.unflatten(1, (len(NAMES), 2))
    totals, largest = pairs.sum(0).tolist(), pairs.amax(0).tolist()
    result: dict[str, float] = {}
    for place, name in enumerate(NAMES):
        value, weight = largest[place] if name in LARGEST else totals[place]
        if weight > 0:
            result[name] = value if name in (*COUNTS, *LARGEST) else value / weight
    for name in ("num_loss_tokens", "completions/max_length"):
        if name in result:
            result[name] = int(result[name])
    if not result.get("num_loss_tokens"):
        return result
    if counts.any():
        values = quantiles(counts.sum(0), QUANTILES)
        result |= {quantile_name(share): value for share, value in zip(QUANTILES, values, strict=True)}
    total, squares, in_use = importance.sum(0).tolist()
    if in_use:
        result["effective_sample_size"] = total**2 / max(result["num_loss_tokens"] * squares, 1e-30)
    return result
