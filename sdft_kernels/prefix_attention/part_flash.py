"""One part of the attention by a flash kernel: PyTorch's own on CPU; flash-attn, else PyTorch's own, on CUDA.

The traps of PyTorch's CPU kernel, and who keeps clear of them: a length of 0 kills the process and a row that sees no
key gets a log-sum-exp of 0 (`parts` makes neither); "causal" aligns the first row with the first key (only squares are
causal here); a mask must be additive and have the query's dtype (fp32 with fp64 rows is read as garbage, bool raises);
there is no softcap (`part_dense`).

The CUDA calls have not been run: no GPU was at hand when they were written.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .part_dense import band_mask
from .parts import BAND, CAUSAL, Merged, Part, Scoring

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def runs(query: Tensor, part: Part, scoring: Scoring) -> bool:
    """Whether a flash kernel computes this part."""
    if query.device.type == "cpu":
        return scoring.softcap is None
    if query.device.type != "cuda" or query.dtype != torch.bfloat16 or query.shape[-1] % 8 or part.kind == BAND:
        return False
    return scoring.softcap is None or _flash_attn() is not None


def forward(query: Tensor, key: Tensor, value: Tensor, part: Part, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """(L, Hq, D) in the query's dtype and the (L, Hq) natural-log LSE, of one part; every row must see a key.

    Args:
        query: (L, Hq, D), any strides but 1 in the last dimension.
        key, value: (S, Hkv, D), the same.
    """
    causal = part.kind == CAUSAL
    if query.device.type == "cpu":
        rows, scale = _scaled(query, scoring)
        mask = _additive_mask(part, query.dtype)
        out, lse = _CPU(*_by_head(rows, key, value), 0.0, causal, attn_mask=mask, scale=scale)
        return out[0].transpose(0, 1), lse[0].t()
    batch = (query[None], key[None], value[None])
    flash_attn = _flash_attn()
    if flash_attn is not None:
        out, lse, *_ = flash_attn._flash_attn_forward(
            *batch, 0.0, scoring.scale, causal=causal, window_size_left=-1, window_size_right=-1,
            softcap=scoring.softcap or 0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *batch, None, None, *part.size, 0.0, causal, False, scale=scoring.scale
        )
    return out[0], lse[0].t()


def backward(
    merged: Merged, query: Tensor, key: Tensor, value: Tensor, part: Part, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, Hq, D), (S, Hkv, D), (S, Hkv, D): gradients of query, key and value, on CPU wide.

    The kernel takes output and LSE of all parts for those of its own, and computes rowsum(grad * out) itself: so it
    cannot take a gradient of the LSE.
    """
    causal = part.kind == CAUSAL
    if query.device.type == "cpu":
        # In bf16 the kernel sums dK and dV in bf16, over query heads and blocks of rows: with 8 heads to a key head and
        # 4096 rows 1.3e-2 off, where plain bf16 PyTorch is 0.5e-2 and fp32 2e-4, at 1.25 times the time (AVX-512).
        wide = accumulate_dtype(query.dtype)
        grad, rows, scale, *others = (merged.grad, *_scaled(query, scoring), key, value, merged.out)
        grads = _CPU_BACKWARD(
            *_by_head(*(x.to(wide) for x in (grad, rows, *others))), merged.lse.t()[None], 0.0, causal,
            attn_mask=_additive_mask(part, wide), scale=scale,
        )  # fmt: skip
        grad_query, grad_key, grad_value = (x[0].transpose(0, 1) for x in grads)
        return grad_query if rows is query else grad_query.mul_(scoring.scale), grad_key, grad_value
    batch = [x[None] for x in (merged.grad, query, key, value, merged.out)]
    lse = merged.lse.t().contiguous()[None]
    flash_attn = _flash_attn()
    if flash_attn is not None:
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in batch[1:4])
        flash_attn._flash_attn_backward(
            *batch, lse, *grads, 0.0, scoring.scale, causal, -1, -1, scoring.softcap or 0.0, None, True
        )
    else:
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is 0
        grads = torch.ops.aten._flash_attention_backward(
            *batch, lse, None, None, *part.size, 0.0, causal, unused, unused[:0], scale=scoring.scale
        )
    return tuple(x[0] for x in grads)


def _scaled(query: Tensor, scoring: Scoring) -> tuple[Tensor, float]:
    """Rows and scale for the CPU kernel.

    Its forward and its backward round scale * product differently, unless the scale is a power of two: a row that looks
    at one key then has a probability of 1 + 2e-6 there, and gradients twice as far off as plain PyTorch's. Scaled rows
    are rounded once for both. In bf16 that would cost more than it gains.
    """
    if query.dtype == torch.bfloat16 or math.frexp(scoring.scale)[0] == 0.5:
        return query, scoring.scale
    return query * scoring.scale, 1.0


def _by_head(*rows: Tensor) -> tuple[Tensor, ...]:
    """(L, H, D) to the CPU kernel's (1, H, L, D): views."""
    return tuple(x.transpose(0, 1)[None] for x in rows)


def _additive_mask(part: Part, dtype: torch.dtype) -> Tensor | None:
    if part.kind != BAND:
        return None
    seen = band_mask(part, torch.device("cpu"))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)


@functools.cache
def _flash_attn() -> Any:
    """flash-attn's module of raw kernels, or None."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:
        return None
    return flash_attn_interface
