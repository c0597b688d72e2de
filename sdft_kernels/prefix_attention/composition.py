"""Shared-prefix attention as a walk over parts, merged by their log-sum-exps. The derivation is in the README.

Segments are walked one by one, each with its parts from root to leaf, so that a segment's bits depend on its own path
only. Keys and values are read where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .._gemm import dense
from . import part_dense, part_flash
from .call import Grads, Inputs, Options, grad_of_sinks
from .part_dense import BLOCK_KEYS, BLOCK_ROWS
from .parts import FULL, Merged, Part, blocks, segment_parts


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) in the query's dtype, and the (T, Hq) natural-log LSE in fp32 (fp64 for fp64)."""
    inputs = _dense(inputs)
    query = inputs.query
    wide = accumulate_dtype(query.dtype)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:2], -math.inf, dtype=wide, device=query.device)
    if inputs.sinks is not None:
        lse.copy_(inputs.sinks.expand_as(lse))
    for segment in range(len(options.tree)):
        rows = slice(options.tree.offsets[segment], options.tree.offsets[segment + 1])
        # The sum over parts stays wide until its last part: bf16 rounds once.
        total = out[rows] if query.dtype == wide else out[rows].to(wide)
        for kernel, part in _calls(inputs, options, segment):
            own = slice(part.rows.start - rows.start, part.rows.stop - rows.start)
            result = kernel.forward(query[part.rows], *_keys_of(inputs, part), part, options.scoring)
            _merge_(total[own], lse[part.rows], *result)
        out[rows] = total
    return out, lse


def backward(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients from the saved output and LSE, and the gradients of both (`grad_lse` may be None)."""
    inputs = _dense(inputs)
    query, key, value = inputs[:3]
    wide = accumulate_dtype(query.dtype)
    totals = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)]
    delta = (grad.to(wide) * out).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    merged = Merged(grad, out, lse, delta)
    segments = range(len(options.tree))
    calls = (call for segment in segments for call in _calls(inputs, options, segment, grad_lse is not None))
    for kernel, part in _joined(calls):
        grads = kernel.backward(
            merged.rows(part.rows), query[part.rows], *_keys_of(inputs, part), part, options.scoring
        )
        totals[0][part.rows] += grads[0]
        if not part.cached:
            totals[1][part.keys] += grads[1]
            totals[2][part.keys] += grads[2]
    grad_query, grad_key, grad_value = (total.to(query.dtype) for total in totals)
    return Grads(grad_query, grad_key, grad_value, grad_of_sinks(inputs.sinks, lse, delta))


def _dense(inputs: Inputs) -> Inputs:
    """Without the gaps of views: parts of them enter library products, which may read past a row's end."""
    return Inputs(*(None if x is None else dense(x) for x in inputs))  # type: ignore[arg-type]


def _calls(inputs: Inputs, options: Options, segment: int, dense: bool = False) -> Iterator[tuple[ModuleType, Part]]:
    """The segment's parts and who computes each; `part_dense` gets them in blocks."""
    for part in segment_parts(options.tree, segment, inputs.prefix, options.window):
        if not dense and part_flash.runs(inputs.query, part, options.scoring):
            yield part_flash, part
        else:
            for block in blocks(part, BLOCK_ROWS, BLOCK_KEYS):
                yield part_dense, block


def _joined(calls: Iterable[tuple[ModuleType, Part]]) -> Iterator[tuple[ModuleType, Part]]:
    """The calls, those of adjoining rows that see the same keys, and all of them, made one.

    For a backward pass, whose sums over segments depend on the other segments anyway: 16 completions of 64 tokens over
    a prompt of 2048 take 105 ms in one flash call and 118 to 152 in 16 (by hand, 2 threads, 9 and 3 heads of 64).
    """
    waiting: dict[tuple[int, int, bool], Part] = {}
    for kernel, part in calls:
        if kernel is not part_flash or part.kind != FULL:
            yield kernel, part
            continue
        keys = (part.keys.start, part.keys.stop, part.cached)
        before = waiting.get(keys)
        if before is not None and before.rows.stop == part.rows.start:
            part = part._replace(rows=slice(before.rows.start, part.rows.stop))
        elif before is not None:
            yield part_flash, before
        waiting[keys] = part
    for part in waiting.values():
        yield part_flash, part


def _keys_of(inputs: Inputs, part: Part) -> tuple[Tensor, Tensor]:
    """(S, Hkv, D) views of the part's keys and values."""
    if part.cached:
        assert inputs.cached_key is not None and inputs.cached_value is not None
        return inputs.cached_key[part.keys], inputs.cached_value[part.keys]
    return inputs.key[part.keys], inputs.value[part.keys]


def _merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Take one more part into the running output and LSE, both wide, in place; nothing seen yet is 0 and -inf."""
    total = torch.logaddexp(lse, part_lse)
    # Where nothing is seen still, -inf - -inf would be NaN.
    pivot = total.masked_fill(total == -math.inf, 0.0)
    out.mul_(torch.exp(lse - pivot)[..., None]).addcmul_(part_out, torch.exp(part_lse - pivot)[..., None])
    lse.copy_(total)
