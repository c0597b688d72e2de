"""The attention over a prefix tree in one compiled call on CPU: its tables and buffers, and bf16 by way of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .call import Grads, Inputs, Options, grad_of_sinks
from .parts import UNLIMITED

HEAD_UNIT = 16  # head sizes are multiples of it: whole vectors of every build
# Query rows of a tile, one for each token and each query head that shares a key head. Their queries, sums and scores
# (144 KiB at D = 64) stay in the L2 cache while the keys pass.
TILE_ROWS = 192
# How evenly the pieces of a backward pass must fill the threads.
EVENNESS = 0.85


def why_not(head_size: int) -> str | None:
    """Why the kernels cannot take heads of this size; None if they can."""
    if head_size % HEAD_UNIT:
        return f"its kernels take head sizes of a multiple of {HEAD_UNIT}, got {head_size}"
    return None


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) in the query's dtype, and the (T, Hq) natural-log LSE in fp32."""
    operands = _operands(inputs, options)
    # Not torch.empty: whoever loads a model may have set a default dtype or device.
    out, lse = (operands.query.new_empty(shape) for shape in (operands.query.shape, operands.query.shape[:2]))
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
    _native.prefix_attention(operands, sinks, out, lse)
    return out.to(inputs.query.dtype), lse


def backward(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients from the saved output and LSE, and the gradients of both (`grad_lse` may be None)."""
    operands, dtype = _operands(inputs, options), inputs.query.dtype
    parts = _parts(inputs.query.shape[1], inputs.key.shape[1], len(operands.tiles))
    partial = _native.on_huge_pages(operands.key.new_empty((parts, 2, *inputs.key.shape)))
    delta, grad_query = (operands.query.new_empty(shape) for shape in (lse.shape, inputs.query.shape))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    _native.prefix_attention_backward(operands, out.float(), lse, grad.float(), grad_lse, delta, grad_query, partial)
    grad_key, grad_value = partial[0].to(dtype, copy=parts > 1)  # a view would keep the other parts
    return Grads(grad_query.to(dtype), grad_key, grad_value, grad_of_sinks(inputs.sinks, lse, delta))


def _parts(heads: int, key_heads: int, tiles: int) -> int:
    """Into how many parts, each with buffers for the gradients of keys and values, a backward pass cuts its tiles.

    The fewest whose pieces, one for each part and key head, keep the threads busy: 2 for 3 key heads on 2 threads. At
    most two for each query head that shares a key head: all buffers are then at most four times the query.
    """
    threads, parts = torch.get_num_threads(), 1
    most = min(tiles, 2 * heads // key_heads)
    while parts < most and parts * key_heads < EVENNESS * threads * -(-parts * key_heads // threads):
        parts += 1
    return parts


def _operands(inputs: Inputs, options: Options) -> _native.PrefixOperands:
    tree, scoring = options.tree.to("cpu"), options.scoring
    heads, key_heads = inputs.query.shape[1], inputs.key.shape[1]
    return _native.PrefixOperands(
        inputs.query.float(),
        inputs.key.float(),
        inputs.value.float(),
        None if inputs.cached_key is None else inputs.cached_key.float(),
        None if inputs.cached_value is None else inputs.cached_value.float(),
        tree.tile_table(max(1, TILE_ROWS * key_heads // heads)),
        tree.segments,
        *tree.ancestors,
        scoring.scale,
        scoring.softcap or 0.0,
        options.window or UNLIMITED,
    )
