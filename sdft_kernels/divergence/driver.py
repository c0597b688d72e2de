"""Walks the tokens in chunks: project, row kernel, two products. Device-independent; sees no autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import check_target_range
from .._gemm import exact_matmul
from .._head import Transform
from .fields import DIFFERENTIABLE, FIELDS, available_fields
from .token_loss import TokenLoss, evaluate
from .vocab_parallel import Shard, ShardedRows

DEFAULT_MEMORY_BUDGET = {"cpu": 256 * 2**20, "cuda": 1536 * 2**20}


class Products(Protocol):
    """What the driver needs of `_gemm.Gemm`; tests pass one that counts."""

    @property
    def accumulate(self) -> torch.dtype: ...
    def scratch_bytes(self, device: torch.device, weight: Tensor) -> int: ...
    def gradient_dtype(self, device: torch.device) -> torch.dtype: ...
    def bytes_per_logit(self, device: torch.device) -> int: ...
    def round_gradient(self, grad: Tensor) -> Tensor: ...
    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None: ...
    def grad_input(self, grad: Tensor, weight: Tensor, out: Tensor) -> None: ...
    def grad_weight(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None: ...


class Rows(Protocol):
    """What an implementation provides: the row kernels, which see two tiles of raw logits and no product."""

    ROUNDS: bool  # writes the gradient in the next product's dtype itself, without a copy

    def row_stride(self, vocabulary: int) -> int: ...
    def scratch_bytes(self, count: int, vocabulary: int, itemsize: int) -> int: ...
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
    from . import rows_torch

    return rows_torch


class Side(NamedTuple):
    """One model's head: (N, H) inputs, (V, H) weight, (V,) bias and what follows the product."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform


class Need(NamedTuple):
    """Which gradients of the student to compute."""

    input: bool = False
    weight: bool = False
    bias: bool = False


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


@dataclass(frozen=True)
class Plan:
    """How a call is cut: which tokens, and how many at a time."""

    index: Tensor | None  # positions of the tokens to project; None: all
    count: int
    chunk: int

    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self.chunk, self.count)) for i in range(0, self.count, self.chunk)]

    def positions(self, part: slice, device: torch.device) -> Tensor:
        return torch.arange(part.start, part.stop, device=device) if self.index is None else self.index[part]


def make_plan(
    student: Side, teacher: Side, mask: Tensor | None, pack: bool, memory_budget: int | None, gemm: Products, rows: Rows
) -> Plan:
    """Cut the call so that tiles and scratch fit `memory_budget` bytes.

    Raises:
        ValueError: not even one token fits.
    """
    device, vocabulary = student.input.device, student.weight.shape[0]
    index = mask.nonzero()[:, 0] if mask is not None and pack else None
    count = student.input.shape[0] if index is None else index.shape[0]
    size = gemm.accumulate.itemsize
    copied = 0 if rows.ROUNDS else gemm.bytes_per_logit(device)
    per_token = rows.row_stride(vocabulary) * (2 * size + copied)
    per_token += 3 * size * (student.input.shape[1] + teacher.input.shape[1])  # a chunk's hidden states and dX
    fixed = gemm.scratch_bytes(device, student.weight) + rows.scratch_bytes(count, vocabulary, size)
    if memory_budget is None:
        memory_budget = max(DEFAULT_MEMORY_BUDGET.get(device.type, DEFAULT_MEMORY_BUDGET["cuda"]), fixed + per_token)
    if memory_budget < fixed + per_token:
        raise ValueError(
            f"memory_budget={memory_budget} bytes holds no token at a vocabulary of {vocabulary}: "
            f"needs at least {fixed + per_token}"
        )
    most = min((memory_budget - fixed) // per_token, max(count, 1))
    parts = -(-max(count, 1) // most)
    return Plan(index, count, -(-max(count, 1) // parts))


def linear_divergence(
    student: Side,
    teacher: Side,
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
        plan = make_plan(student, teacher, mask, pack, memory_budget, gemm, rows)
        shard = None
        if vocab_group is not None:
            shape = student.weight.shape
            shard = Shard.agree(vocab_group, student.input.shape[0], shape[0], plan.chunk, device)
            check_target_range(target, mask, shard.vocabulary)
            plan, rows = replace(plan, chunk=shard.chunk), ShardedRows(rows, shard)
        call = _Call(
            student, teacher, target, mask, alpha, token_loss, need, gemm, rows, plan, check_elementwise, shard
        )
        for part in plan.chunks():
            call.run(part)
        return call.result()


@dataclass
class _Call:
    """Buffers and outputs of one call, filled chunk by chunk."""

    student: Side
    teacher: Side
    target: Tensor | None
    mask: Tensor | None
    alpha: float | None
    token_loss: Affine | TokenLoss | None
    need: Need
    gemm: Products
    rows: Rows
    plan: Plan
    check_elementwise: bool
    shard: Shard | None

    def __post_init__(self) -> None:
        alpha = self.alpha
        self.mixture = alpha if alpha is not None and 0 < alpha < 1 else None
        self.jsd_is = None if alpha is None or self.mixture is not None else DIFFERENTIABLE[int(alpha)]
        if isinstance(self.token_loss, Affine):
            self.token_loss = self._resolve(self.token_loss)
        self.select = self.mask if self.mask is not None and self.plan.index is None else None
        self.fields = available_fields(self.target is not None, alpha is not None)
        self.stacked = same_tensor(self.student.weight, self.teacher.weight) and same_tensor(
            self.student.bias, self.teacher.bias
        )
        x, w = self.student.input, self.student.weight
        self.tokens = x.new_zeros(len(FIELDS), x.shape[0], dtype=self.gemm.accumulate)
        self.loss = self.tokens.new_zeros(x.shape[0])
        self.tiles = self.tokens.new_empty(2 * self.plan.chunk * self.rows.row_stride(w.shape[0]))
        self.gradient_dtype = self.gemm.gradient_dtype(x.device) if any(self.need) else None
        self.grad_input = x.new_zeros(x.shape) if self.need.input else None
        self.grad_weight = self.tokens.new_zeros(w.shape) if self.need.weight else None
        self.grad_bias = self.tokens.new_zeros(w.shape[0]) if self.need.bias else None

    def _resolve(self, loss: Affine) -> Affine:
        """A weight on a JSD of alpha 0 or 1 is a weight on the matching KL."""
        weights = dict(loss.weights)
        if self.jsd_is is not None and "jsd" in weights:
            jsd = weights.pop("jsd")
            weights[self.jsd_is] = jsd + weights[self.jsd_is] if self.jsd_is in weights else jsd
        return loss._replace(weights=weights)

    def run(self, part: slice) -> None:
        """One chunk: tiles of logits, numbers and dL/dlogits, then the two products."""
        positions = self.plan.positions(part, self.tokens.device)
        take = part if self.plan.index is None else positions
        h_s, h_t = self.student.input[take], self.teacher.input[take]
        keep = None if self.select is None else self.select[part]
        if keep is not None:  # whatever a masked token holds must not reach a product, not even times 0
            h_s, h_t = h_s.masked_fill(~keep[:, None], 0), h_t.masked_fill(~keep[:, None], 0)
        student, teacher = self._project(h_s, h_t)
        target = None if self.target is None else self.target[take]
        tokens = self.tokens.new_zeros(len(FIELDS), student.shape[0])
        loss = self.loss.new_zeros(student.shape[0])
        if self.token_loss is None or isinstance(self.token_loss, Affine):
            affine = self.token_loss or Affine({})
            grad = self._run_affine(affine, student, teacher, target, take, keep, tokens, loss)
        else:
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

    def result(self) -> Result:
        w, b = self.student.weight, self.student.bias
        return Result(
            self.loss.sum(dtype=torch.float64).to(self.loss.dtype),  # N numbers: free, and no order of chunks shows
            self.tokens,
            self.grad_input,
            None if self.grad_weight is None else self.grad_weight.to(w.dtype),
            None if self.grad_bias is None or b is None else self.grad_bias.to(b.dtype),
        )


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """The same memory read the same way (or both None)."""
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
