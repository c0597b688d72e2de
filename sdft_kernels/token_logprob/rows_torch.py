"""Row kernel in PyTorch: from a tile of raw logits to the per-token numbers and their gradient, on any device.

A tile is (C, V) and is walked in blocks of rows that stay in the processor's cache; the gradient is written over it.
Letters and formulas are those of the op's README.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._head import ABSENT_TARGET, Transform
from .._rows import blocks, blocks_bytes, to_z_
from .fields import FIELDS

SCRATCH_BLOCKS = 2  # e, product


def scratch_bytes(count: int, vocabulary: int, itemsize: int, device_type: str = "cpu") -> int:
    """Bytes that a call on `count` rows needs beyond the tile."""
    return blocks_bytes(SCRATCH_BLOCKS, count, vocabulary, itemsize, device_type)


def token_logprob_(
    tile: Tensor,  # (C, V) raw logits; overwritten, with dL/dlogits if there is an upstream gradient
    target: Tensor,  # (C,) int64
    transform: Transform,
    names: tuple[str, ...],  # of FIELDS, to compute
    tokens: Tensor,  # (3, C) receives them, rows in the order of FIELDS
    upstream: Tensor | None,  # (len(names), C) dL/dnumber
) -> None:
    """Numbers, and gradient, of a tile in one pass over its blocks."""
    for rows, (e, product) in blocks(tile, SCRATCH_BLOCKS):
        _block_(
            tile[rows], e, product, target[rows, None], transform, names, tokens[:, rows],
            None if upstream is None else upstream[:, rows, None],
        )  # fmt: skip


def _block_(
    z: Tensor,  # (R, V)
    e: Tensor,  # (R, V)
    product: Tensor,  # (R, V)
    target: Tensor,  # (R, 1)
    transform: Transform,
    names: tuple[str, ...],
    tokens: Tensor,  # (3, R)
    upstream: Tensor | None,  # (len(names), R, 1)
) -> None:
    to_z_(z, transform)
    top = z.amax(-1, keepdim=True)
    z.sub_(top)
    torch.exp(z, out=e)
    total = e.sum(-1, keepdim=True)
    log_total = total.log()
    inside = target.clamp(0, z.shape[1] - 1)
    label = z.gather(1, inside)
    numbers = {"logprob": _logprob(label - log_total, target, inside), "lse": top + log_total}
    # On CPU the fast sum is tried first: a -inf turns 0 * -inf into NaN and only then the block is summed with
    # selection. Elsewhere asking would cost a synchronisation, so selection is always on.
    careful = z.device.type != "cpu"
    if "entropy" in names:
        first = _expectation(e, z, product, careful)
        if not careful and bool(first.isnan().any()):
            careful = True
            first = _expectation(e, z, product, careful)
        numbers["entropy"] = (log_total - first / total).clamp_min(0)
    for name in names:
        tokens[FIELDS.index(name)] = numbers[name][:, 0]
    if upstream is None:
        return
    g = dict(zip(names, upstream, strict=True))
    if "logprob" in g:
        g["logprob"] = g["logprob"].masked_fill(target == ABSENT_TARGET, 0.0)
    _gradient_(z, e, product, numbers, total, g, transform, careful)
    out = product
    if "logprob" in g:
        # A target of probability 0 has logit -inf whatever the parameters are; one out of range must not pass.
        at_target = g["logprob"].masked_fill(label == -math.inf, 0.0)
        at_target = at_target.masked_fill((target != inside) & (target != ABSENT_TARGET), math.nan)
        out.scatter_add_(1, inside, at_target * transform.slope)
    if transform.softcap is None:
        z.copy_(out)
        return
    # dc/du = 1 - (c / cap)^2, and 0 at a logit of -inf
    z.add_(top).mul_(transform.temperature / transform.softcap).square_().neg_().add_(1).clamp_min_(0).mul_(out)


def _expectation(e: Tensor, value: Tensor, product: Tensor, careful: bool) -> Tensor:
    """sum_v e_v value_v, (R, 1)."""
    torch.mul(e, value, out=product)
    if careful:
        product.masked_fill_(e == 0, 0.0)
    return product.sum(-1, keepdim=True)


def _logprob(value: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """0 where absent, NaN where out of range."""
    return value.masked_fill(target != inside, math.nan).masked_fill(target == ABSENT_TARGET, 0.0)


def _gradient_(
    z: Tensor,  # (R, V) pivoted
    e: Tensor,
    out: Tensor,  # receives p (c - g_H z) slope
    numbers: dict[str, Tensor],
    total: Tensor,
    g: dict[str, Tensor],
    transform: Transform,
    careful: bool,
) -> None:
    constant = torch.zeros_like(total)
    if "lse" in g:
        constant = constant + g["lse"]
    if "logprob" in g:
        constant = constant - g["logprob"]
    g_h = g.get("entropy")
    if g_h is None:
        torch.mul(e, constant * (transform.slope / total), out=out)
        return
    constant = constant - g_h * (numbers["entropy"] - total.log())
    torch.mul(z, -g_h, out=out).add_(constant).mul_(e).mul_(transform.slope / total)
    if careful:
        out.masked_fill_(e == 0, 0.0)
