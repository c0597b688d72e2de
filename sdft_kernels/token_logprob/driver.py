"""Walks the tokens in chunks: project, row kernel, two products. Device-independent; sees no autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._chunks import Chunks, Head, Need, Products, cut, hidden_states, prepared, select_tokens
from .._gemm import exact_matmul
from . import rows_torch
from .fields import FIELDS


class Result(NamedTuple):
    tokens: Tensor  # (3, N), rows in the order of FIELDS; 0 where not asked for
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def plan(head: Head, mask: Tensor | None, pack: bool, memory_budget: int | None, gemm: Products) -> Chunks:
    """Cut the call so that the tile and scratch fit `memory_budget` bytes.

    Raises:
        ValueError: not even one token fits.
    """
    device, (vocabulary, hidden), size = head.input.device, head.weight.shape, gemm.accumulate.itemsize
    tokens = select_tokens(head.input.shape[0], mask, pack)
    per_token = vocabulary * (size + gemm.bytes_per_logit(device)) + 3 * size * hidden  # hidden states, dX, its sum
    fixed = gemm.scratch_bytes(device, head.weight) + rows_torch.scratch_bytes(tokens[2], vocabulary, size, device.type)
    return cut(tokens, per_token, fixed, memory_budget, device, vocabulary)


def linear_token_logprob(
    head: Head,
    target: Tensor,
    mask: Tensor | None,
    *,
    names: tuple[str, ...],
    upstream: Tensor | None,  # (len(names), N)
    need: Need,
    gemm: Products,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
) -> Result:
    """The named numbers; with `upstream`, also the gradients of sum_k upstream_k . number_k."""
    device = head.input.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_matmul(precision):
        chunks = plan(head, mask, pack, memory_budget, gemm)
        call = _Call(head, target, names, upstream, need if upstream is not None else Need(), gemm, chunks)
        for _, take, keep in chunks.parts():
            call.run(take, keep)
        return call.result()


@dataclass
class _Call:
    """Buffers and outputs of one call, filled chunk by chunk."""

    head: Head
    target: Tensor
    names: tuple[str, ...]
    upstream: Tensor | None
    need: Need
    gemm: Products
    chunks: Chunks

    def __post_init__(self) -> None:
        x, w = self.head.input, self.head.weight
        self.weight_dtype = w.dtype
        (self.head,) = prepared(self.gemm, self.head)
        self.tokens = x.new_zeros(len(FIELDS), x.shape[0], dtype=self.gemm.accumulate)
        self.tile = self.tokens.new_empty(self.chunks.size * w.shape[0])
        self.grad_input = x.new_zeros(x.shape) if self.need.input else None
        self.grad_weight = self.tokens.new_zeros(w.shape) if self.need.weight else None
        self.grad_bias = self.tokens.new_zeros(w.shape[0]) if self.need.bias else None

    def run(self, take: slice | Tensor, keep: Tensor | None) -> None:
        """One chunk: a tile of logits, numbers and dL/dlogits, then the two products."""
        head = self.head
        hidden = hidden_states(head.input, take, keep)
        tile = self.tile[: hidden.shape[0] * head.weight.shape[0]].view(hidden.shape[0], -1)
        self.gemm.project(hidden, head.weight, head.bias, tile)
        tokens = self.tokens.new_zeros(len(FIELDS), hidden.shape[0])
        target, upstream = self.target[take], None if self.upstream is None else self.upstream[:, take]
        if keep is not None:
            target = target.masked_fill(~keep, 0)
            upstream = None if upstream is None else upstream.masked_fill(~keep, 0)
        rows_torch.token_logprob_(tile, target, head.transform, self.names, tokens, upstream)
        self.tokens[:, take] = tokens if keep is None else tokens.masked_fill(~keep, 0)
        if any(self.need):
            if keep is not None:
                tile.masked_fill_(~keep[:, None], 0)
            self._accumulate(tile, hidden, take)

    def _accumulate(self, grad: Tensor, hidden: Tensor, take: slice | Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        grad = self.gemm.round_gradient(grad)
        if self.grad_input is not None:
            out = torch.empty_like(hidden)
            self.gemm.grad_input(grad, self.head.weight, out)
            self.grad_input[take] = out
        if self.grad_weight is not None:
            self.gemm.grad_weight(grad, hidden, self.grad_weight)

    def result(self) -> Result:
        bias = self.head.bias
        return Result(
            self.tokens,
            self.grad_input,
            None if self.grad_weight is None else self.grad_weight.to(self.weight_dtype),
            None if self.grad_bias is None or bias is None else self.grad_bias.to(bias.dtype),
        )
