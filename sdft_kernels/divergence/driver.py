"""Walks the tokens in chunks: project, row kernel, two products. Device-independent; sees no autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import check_target_range, same_tensor
from .._chunks import Chunks, Head, Need, Products, cut, hidden_states, prepared, select_tokens
from .._gemm import exact_matmul
from .._head import Transform
from .._native import on_huge_pages
from .fields import DIFFERENTIABLE, FIELDS, available_fields
from .token_loss import TokenLoss, evaluate
from .vocab_parallel import Shard, ShardedRows


class Rows(Protocol):
    """What an implementation provides: the row kernels, which see two tiles of raw logits and no product."""

    ROUNDS: bool  # writes the gradient in the next product's dtype itself, without a copy

    def row_stride(self, vocabulary: int) -> int: ...
    def scratch_bytes(self, count: int, vocabulary: int, itemsize: int, device_type: str) -> int: ...
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
    ) -> Tensor | None: ...
    def divergence_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        transforms: tuple[Transform, Transform],
        alpha: float | None,
        keep: Tensor | None,
        tokens: Tensor,
    ) -> Tensor: ...
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
    ) -> Tensor: ...


def rows_of(impl: str) -> Rows:
    """The row kernels of an implementation; only then is what they need imported."""
    if impl == "triton":
        from . import rows_triton

        return rows_triton
    if impl == "native":
        from . import rows_native

        return rows_native
    from . import rows_torch

    return rows_torch


class Affine(NamedTuple):
    """sum_k weights_k field_k per token, times the clipped importance ratio if there is one."""

    weights: dict[str, Tensor]  # of differentiable fields, (N,) each
    old_logprob: Tensor | None = None  # (N,)
    importance_clip: float | None = None


class Result(NamedTuple):
    loss: Tensor  # ()
    tokens: Tensor  # (8, N), rows in the order of FIELDS
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def plan(
    student: Head, teacher: Head, mask: Tensor | None, pack: bool, memory_budget: int | None, gemm: Products, rows: Rows
) -> Chunks:
    """Cut the call so that tiles and scratch fit `memory_budget` bytes.

    Raises:
        ValueError: not even one token fits.
    """
    device, vocabulary, size = student.input.device, student.weight.shape[0], gemm.accumulate.itemsize
    tokens = select_tokens(student.input.shape[0], mask, pack)
    copied = 0 if rows.ROUNDS else gemm.bytes_per_logit(device)
    per_token = rows.row_stride(vocabulary) * (2 * size + copied)
    per_token += 3 * size * (student.input.shape[1] + teacher.input.shape[1])  # a chunk's hidden states and dX
    fixed = max(gemm.scratch_bytes(device, head.weight) for head in (student, teacher))
    fixed += rows.scratch_bytes(tokens[2], vocabulary, size, device.type)
    return cut(tokens, per_token, fixed, memory_budget, device, vocabulary)


def linear_divergence(
    student: Head,
    teacher: Head,
    target: Tensor | None,
    mask: Tensor | None,
    *,
    alpha: float | None,
    token_loss: Affine | TokenLoss | None,
    need: Need,
    gemm: Products,
    rows: Rows,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
    vocab_group: str | None = None,
    check_elementwise: bool = False,
) -> Result:
    """All fields, the summed token loss, and its gradients. `token_loss=None`: no loss, no gradients.

    `alpha` is None (no JSD), 0 or 1 (the JSD field is the matching KL), or between. With `vocab_group`, the name of a
    process group, the heads hold this rank's rows of the vocabulary; dX is summed over the ranks.
    """
    device = student.input.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_matmul(precision):
        shape, shard = (student.input.shape[0], student.weight.shape[0]), None
        try:
            chunks = plan(student, teacher, mask, pack, memory_budget, gemm, rows)
        except ValueError:
            if vocab_group is not None:  # the other ranks must not wait for this one
                Shard.agree(vocab_group, *shape, 0, device)
            raise
        if vocab_group is not None:
            shard = Shard.agree(vocab_group, *shape, chunks.size, device)
            check_target_range(target, mask, shard.vocabulary)
            chunks, rows = replace(chunks, size=shard.chunk), ShardedRows(rows, shard)
        call = _Call(
            student, teacher, target, mask, alpha, token_loss, need, gemm, rows, chunks, check_elementwise, shard
        )
        for place, take, keep in chunks.parts():
            call.run(place, take, keep)
        return call.result()


@dataclass
class _Call:
    """Buffers and outputs of one call, filled chunk by chunk."""

    student: Head
    teacher: Head
    target: Tensor | None
    mask: Tensor | None
    alpha: float | None
    token_loss: Affine | TokenLoss | None
    need: Need
    gemm: Products
    rows: Rows
    chunks: Chunks
    check_elementwise: bool
    shard: Shard | None

    def __post_init__(self) -> None:
        alpha = self.alpha
        self.mixture = alpha if alpha is not None and 0 < alpha < 1 else None
        self.jsd_is = None if alpha is None or self.mixture is not None else DIFFERENTIABLE[int(alpha)]
        if isinstance(self.token_loss, Affine):
            self.token_loss = self._resolve(self.token_loss)
        self.fields = available_fields(self.target is not None, alpha is not None)
        x, w = self.student.input, self.student.weight
        self.weight_dtype = w.dtype
        self.student, self.teacher = prepared(self.gemm, self.student, self.teacher)
        self.stacked = same_tensor(self.student.weight, self.teacher.weight) and same_tensor(
            self.student.bias, self.teacher.bias
        )
        self.tokens = x.new_zeros(len(FIELDS), x.shape[0], dtype=self.gemm.accumulate)
        self.loss = self.tokens.new_zeros(x.shape[0])
        self.tiles = on_huge_pages(self.tokens.new_empty(2 * self.chunks.size * self.rows.row_stride(w.shape[0])))
        self.gradient_dtype = self.gemm.gradient_dtype(x.device) if any(self.need) else None
        self.grad_input = x.new_zeros(x.shape) if self.need.input else None
        self.grad_weight = on_huge_pages(self.tokens.new_empty(w.shape)).zero_() if self.need.weight else None
        self.grad_bias = self.tokens.new_zeros(w.shape[0]) if self.need.bias else None

    def _resolve(self, loss: Affine) -> Affine:
        """A weight on a JSD of alpha 0 or 1 is a weight on the matching KL."""
        weights = dict(loss.weights)
        if self.jsd_is is not None and "jsd" in weights:
            jsd = weights.pop("jsd")
            weights[self.jsd_is] = jsd + weights[self.jsd_is] if self.jsd_is in weights else jsd
        return loss._replace(weights=weights)

    def run(self, place: slice, take: slice | Tensor, keep: Tensor | None) -> None:
        """One chunk: tiles of logits, numbers and dL/dlogits, then the two products."""
        h_s, h_t = (hidden_states(side.input, take, keep) for side in (self.student, self.teacher))
        student, teacher = self._project(h_s, h_t)
        target = None if self.target is None else self.target[take]
        tokens = self.tokens.new_zeros(len(FIELDS), student.shape[0])
        loss = self.loss.new_zeros(student.shape[0])
        if self.token_loss is None or isinstance(self.token_loss, Affine):
            affine = self.token_loss or Affine({})
            grad = self._run_affine(affine, student, teacher, target, take, keep, tokens, loss)
        else:
            positions = (
                torch.arange(place.start, place.stop, dtype=torch.int64, device=loss.device)
                if isinstance(take, slice)
                else take
            )
            grad = self._run_callable(self.token_loss, student, teacher, target, positions, keep, tokens, loss)
        if self.jsd_is is not None:
            tokens[FIELDS.index("jsd")] = tokens[FIELDS.index(self.jsd_is)]
        self.tokens[:, take], self.loss[take] = tokens, loss
        if grad is not None:
            self._accumulate(grad, h_s, take)

    def _project(self, h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
        n, vocabulary = h_s.shape[0], self.student.weight.shape[0]
        stride = self.rows.row_stride(vocabulary)
        both = self.tiles[: 2 * n * stride].view(2 * n, stride)[:, :vocabulary]
        student, teacher = both[:n], both[n:]
        if self.stacked:  # one product reads the weight once
            self.gemm.project(torch.cat([h_s, h_t]), self.student.weight, self.student.bias, both)
        else:
            self.gemm.project(h_s, self.student.weight, self.student.bias, student)
            self.gemm.project(h_t, self.teacher.weight, self.teacher.bias, teacher)
        return student, teacher

    @property
    def _transforms(self) -> tuple[Transform, Transform]:
        return self.student.transform, self.teacher.transform

    def _run_affine(
        self,
        affine: Affine,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        take: slice | Tensor,
        keep: Tensor | None,
        tokens: Tensor,
        loss: Tensor,
    ) -> Tensor | None:
        weights = {name: w[take] for name, w in affine.weights.items()}
        old = None if affine.old_logprob is None else affine.old_logprob[take]
        return self.rows.affine_(
            student, teacher, target, weights, old, affine.importance_clip,
            self._transforms, self.mixture, keep, tokens, loss, self.gradient_dtype,
        )  # fmt: skip

    def _run_callable(
        self,
        token_loss: TokenLoss,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        positions: Tensor,
        keep: Tensor | None,
        tokens: Tensor,
        loss: Tensor,
    ) -> Tensor | None:
        options = self._transforms, self.mixture, keep
        state = self.rows.divergence_stats(student, teacher, target, *options, tokens)
        if self.jsd_is is not None:
            tokens[FIELDS.index("jsd")] = tokens[FIELDS.index(self.jsd_is)]
        value, upstream = evaluate(token_loss, tokens, self.fields, positions, any(self.need), self.check_elementwise)
        loss.copy_(value if keep is None else value.masked_fill(~keep, 0))
        if self.gradient_dtype is None:
            return None
        upstream = self._resolve(Affine(upstream)).weights
        return self.rows.divergence_grad_(student, teacher, state, target, upstream, *options, self.gradient_dtype)

    def _accumulate(self, grad: Tensor, h_s: Tensor, take: slice | Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=self.grad_bias.dtype)
        grad = self.gemm.round_gradient(grad)
        if self.grad_input is not None:
            out = h_s.new_empty(h_s.shape, dtype=h_s.dtype if self.shard is None else self.gemm.accumulate)
            self.gemm.grad_input(grad, self.student.weight, out)
            self.grad_input[take] = (out if self.shard is None else self.shard.sum_(out)).to(h_s.dtype)
        if self.grad_weight is not None:
            self.gemm.grad_weight(grad, h_s, self.grad_weight)

    def _rounded(self, grad_weight: Tensor) -> Tensor:
        if grad_weight.dtype == self.weight_dtype:
            return grad_weight
        return on_huge_pages(grad_weight.new_empty(grad_weight.shape, dtype=self.weight_dtype)).copy_(grad_weight)

    def result(self) -> Result:
        b = self.student.bias
        return Result(
            self.loss.sum(dtype=torch.float64).to(self.loss.dtype),  # N numbers: free, and no order of chunks shows
            self.tokens,
            self.grad_input,
            None if self.grad_weight is None else self._rounded(self.grad_weight),
            None if self.grad_bias is None or b is None else self.grad_bias.to(b.dtype),
        )
