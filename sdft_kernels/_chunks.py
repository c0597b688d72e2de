"""How the ops over one or two LM heads walk their tokens: which, how many at a time, and with which products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._checks import same_tensor
from ._gemm import dense
from ._head import Transform

DEFAULT_MEMORY_BUDGET = {"cpu": 256 * 2**20, "cuda": 1536 * 2**20}


class Products(Protocol):
    """What a driver needs of `_gemm.Gemm`; tests pass one that counts."""

    @property
    def accumulate(self) -> torch.dtype: ...
    def scratch_bytes(self, device: torch.device, weight: Tensor) -> int: ...
    def gradient_dtype(self, device: torch.device) -> torch.dtype: ...
    def bytes_per_logit(self, device: torch.device) -> int: ...
    def prepare(self, weight: Tensor) -> Tensor: ...
    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None: ...
    def round_gradient(self, grad: Tensor) -> Tensor: ...
    def grad_input(self, grad: Tensor, weight: Tensor, out: Tensor) -> None: ...
    def grad_weight(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None: ...


class Head(NamedTuple):
    """One model's head: (N, H) inputs, (V, H) weight, (V,) bias and what follows the product."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform


def prepared(gemm: Products, *heads: Head) -> tuple[Head, ...]:
    """The heads with their weights as the products read them; one tensor stays one tensor."""
    done: list[tuple[Tensor, Tensor]] = []
    for head in heads:
        known = [copy for weight, copy in done if same_tensor(weight, head.weight)]
        done.append((head.weight, known[0] if known else gemm.prepare(head.weight)))
    return tuple(head._replace(weight=copy) for head, (_, copy) in zip(heads, done, strict=True))


class Need(NamedTuple):
    """Which gradients to compute."""

    input: bool = False
    weight: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Chunks:
    """How a call is cut: which tokens, and how many at a time.

    Attributes:
        index: positions of the tokens to project, (count,) int64; None: all.
        keep: (N,) bool where all are projected and the masked ones' results are dropped (`pack=False`); else None.
        count: tokens to project.
        size: of a chunk.
    """

    index: Tensor | None
    keep: Tensor | None
    count: int
    size: int

    def parts(self) -> list[tuple[slice, slice | Tensor, Tensor | None]]:
        """Of each chunk: its place among the projected tokens, its place in the caller's order, its part of `keep`."""
        cuts = [slice(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]
        return [
            (cut, cut if self.index is None else self.index[cut], None if self.keep is None else self.keep[cut])
            for cut in cuts
        ]


def select_tokens(count: int, mask: Tensor | None, pack: bool) -> tuple[Tensor | None, Tensor | None, int]:
    """`index`, `keep` and `count` of `Chunks`: packing costs one host synchronisation."""
    if mask is None:
        return None, None, count
    if not pack:
        return None, mask, count
    index = mask.nonzero()[:, 0]
    return index, None, index.shape[0]


def cut(
    tokens: tuple[Tensor | None, Tensor | None, int],
    per_token: int,
    fixed: int,
    memory_budget: int | None,
    device: torch.device,
    vocabulary: int,
) -> Chunks:
    """Cut `tokens` so that `fixed` bytes and `per_token` bytes for each token of a chunk fit `memory_budget`.

    Raises:
        ValueError: not even one token fits.
    """
    index, keep, count = tokens
    least = fixed + per_token
    if memory_budget is None:
        memory_budget = max(DEFAULT_MEMORY_BUDGET.get(device.type, DEFAULT_MEMORY_BUDGET["cuda"]), least)
    if memory_budget < least:
        raise ValueError(
            f"memory_budget={memory_budget} bytes holds no token at a vocabulary of {vocabulary}: "
            f"needs at least {least}"
        )
    most = min((memory_budget - fixed) // per_token, max(count, 1))
    parts = -(-max(count, 1) // most)
    return Chunks(index, keep, count, -(-max(count, 1) // parts))


def hidden_states(input: Tensor, take: slice | Tensor, keep: Tensor | None) -> Tensor:
    """A chunk's (C, H) inputs; whatever a masked token holds must not reach a product, not even times 0."""
    hidden = dense(input[take])
    return hidden if keep is None else hidden.masked_fill(~keep[:, None], 0)
