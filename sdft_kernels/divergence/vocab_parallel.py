"""A vocabulary sharded over a process group: row kernels that exchange a dozen floats per token and rank.

Each rank holds its rows of both heads, in rank order, and the same tokens. Statistics over a shard merge like those of
two blocks; the JSD's second look adds two sums; dX is a sum over shards. dW and dbias stay local.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._head import ABSENT_TARGET, Transform
from .fields import FIELDS
from .statistics import finish, merge, state_of

ELSEWHERE = -1  # no row of this shard, but not absent: the other rows' share of log p's gradient is here


@dataclass(frozen=True)
class Shard:
    """This rank's place in the vocabulary.

    Attributes:
        group: the process group over which the vocabulary is sharded.
        start: vocabulary entry of this rank's first row.
        vocabulary: entries of all ranks together.
        chunk: tokens at a time, the least that any rank can hold: all must exchange the same number.
    """

    group: Any
    start: int
    vocabulary: int
    chunk: int

    @staticmethod
    def agree(group_name: str, count: int, rows: int, chunk: int, device: torch.device) -> Shard:
        """Exchange sizes (one host synchronisation).

        Raises:
            ValueError: the ranks have different numbers of tokens, or another has no room for one (`chunk` 0).
        """
        group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
        sizes = torch.tensor([count, rows, chunk], dtype=torch.int64, device=device)
        every = [torch.empty_like(sizes) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, sizes, group=group)
        counts, all_rows, chunks = torch.stack(every).t().tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"vocab_group: every rank must pass the same tokens, got {counts} of them by rank")
        if chunk > 0 and min(chunks) == 0:
            without = [rank for rank, size in enumerate(chunks) if size == 0]
            raise ValueError(f"vocab_group: memory_budget holds no token of the shard of ranks {without}")
        before = all_rows[: dist.get_rank(group)]
        return Shard(group, sum(before), sum(all_rows), min(chunks))

    def local(self, target: Tensor | None, rows: int) -> Tensor | None:
        """Positions within this shard; `ELSEWHERE` where the target is another rank's, absent where it is absent."""
        if target is None:
            return None
        moved = target - self.start
        moved = moved.masked_fill((moved < 0) | (moved >= rows), ELSEWHERE)
        return moved.masked_fill(target == ABSENT_TARGET, ABSENT_TARGET)

    def gather(self, partial: Tensor) -> Tensor:
        """(R, ...) of every rank's tensor, in rank order."""
        every = partial.new_zeros(dist.get_world_size(self.group), *partial.shape)
        dist.all_gather(list(every.unbind(0)), partial.contiguous(), group=self.group)
        return every

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, in rank order: the same bits on every rank."""
        return tensor.copy_(self.gather(tensor).sum(0))


class ShardedRows:
    """The row kernels of an implementation over one shard, with the numbers of the whole vocabulary."""

    def __init__(self, rows: Any, shard: Shard) -> None:
        self.rows, self.shard = rows, shard
        self.ROUNDS: bool = rows.ROUNDS

    def row_stride(self, vocabulary: int) -> int:
        return int(self.rows.row_stride(vocabulary))

    def scratch_bytes(self, count: int, vocabulary: int, itemsize: int, device_type: str) -> int:
        return int(self.rows.scratch_bytes(count, vocabulary, itemsize, device_type))

    def affine_(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        weights: dict[str, Tensor],
        old_logprob: Tensor | None,
        importance_clip: float | None,
        transforms: tuple[Transform, Transform],
        alpha: float | None,
        keep: Tensor | None,
        tokens: Tensor,
        loss: Tensor,
        gradient_dtype: torch.dtype | None,
    ) -> Tensor | None:
        """As `rows_torch.affine_`, in two steps: the numbers are known only after the exchange."""
        state = self.divergence_stats(student, teacher, target, transforms, alpha, keep, tokens)
        if importance_clip is not None and old_logprob is not None:
            exponent = (tokens[FIELDS.index("student_logprob")] - old_logprob).clamp(-20, 20)
            ratio = exponent.exp().clamp(max=importance_clip)
            weights = {name: ratio * weight for name, weight in weights.items()}
        for name, weight in weights.items():
            value = (weight * tokens[FIELDS.index(name)]).masked_fill(weight == 0, 0.0)
            loss += value if keep is None else value.masked_fill(~keep, 0.0)
        if gradient_dtype is None:
            return None
        return self.divergence_grad_(student, teacher, state, target, weights, transforms, alpha, keep, gradient_dtype)

    def divergence_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        transforms: tuple[Transform, Transform],
        alpha: float | None,
        keep: Tensor | None,
        tokens: Tensor,
    ) -> Tensor:
        """As `rows_torch.divergence_stats`; `target` is of the whole vocabulary."""
        local = self.shard.local(target, student.shape[1])
        partial = self.rows.partial_statistics(student, teacher, local, transforms, keep)
        numbers = finish(merge(self.shard.gather(partial)), target, self.shard.vocabulary)
        state = state_of(numbers, partial[0])
        self.rows.repivot_(student, teacher, partial, state)
        if alpha is not None:
            sums = self.rows.mixture_sums(student, teacher, state, transforms, alpha, keep)
            kl_student, kl_teacher = self.shard.sum_(sums)
            numbers |= {"jsd": (alpha * kl_teacher + (1 - alpha) * kl_student).clamp_min(0)}
            state = state_of(numbers | {"kl_student_mixture": kl_student}, partial[0])
        for i, name in enumerate(FIELDS):
            if name in numbers:
                tokens[i] = numbers[name] if keep is None else numbers[name].masked_fill(~keep, 0.0)
        return state

    def divergence_grad_(
        self,
        student: Tensor,
        teacher: Tensor,
        state: Tensor,
        target: Tensor | None,
        upstream: dict[str, Tensor],
        transforms: tuple[Transform, Transform],
        alpha: float | None,
        keep: Tensor | None,
        gradient_dtype: torch.dtype,
    ) -> Tensor:
        """As `rows_torch.divergence_grad_`, of this shard's logits; `target` is of the whole vocabulary."""
        local = self.shard.local(target, student.shape[1])
        return self.rows.divergence_grad_(
            student, teacher, state, local, upstream, transforms, alpha, keep, gradient_dtype
        )
