"""The fused attention over a prefix tree: launch parameters, and the launches of the kernels in `kernels_triton`."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .._rows import on_device
from .call import Grads, Inputs, Options, grad_of_sinks
from .kernels_triton import forward_kernel
from .kernels_triton_backward import delta_kernel, grad_key_value_kernel, grad_query_kernel

CONFIGURATIONS = Path(__file__).with_name("fused_triton.json")
LOG2_E = math.log2(math.e)
# fp32, which only the interpreter runs, without TF32; bf16 has one precision.
PRECISION = "ieee"
DELTA_ROWS = 32  # of delta_kernel: 32 x 256 elements of two tensors, 64 of each a thread at 4 warps
MIN_BLOCK_D = 16  # what a product of tiles needs at least


class Configuration(NamedTuple):
    """Launch parameters of one kernel for heads of up to `head_size`."""

    head_size: int
    block_m: int  # query rows
    block_n: int  # key rows
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1)
def configurations() -> dict[str, dict[str, tuple[Configuration, ...]]]:
    """The shipped lines by kernel and matrix instruction; `fused_triton.json` gives each one's reason."""
    tables = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
    del tables["about"]
    return {
        kernel: {
            instruction: tuple(Configuration(*(line[name] for name in Configuration._fields)) for line in lines)
            for instruction, lines in by_instruction.items()
        }
        for kernel, by_instruction in tables.items()
    }


def choose(kernel: str, size: int, capability: int) -> Configuration:
    """The launch parameters for a head size on a device of this capability (90 for sm_90)."""
    instruction = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")
    return next(line for line in configurations()[kernel][instruction] if size <= line.head_size)


def padded(size: int) -> int:
    """Columns of a tile: the power of two that holds a head."""
    return max(MIN_BLOCK_D, 1 << (size - 1).bit_length())


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) in the query's dtype, and the (T, Hq) natural-log LSE in fp32 (fp64 for fp64)."""
    query = inputs.query
    tokens, heads, size = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(tokens, heads, dtype=accumulate_dtype(query.dtype), device=query.device)
    if lse.numel() == 0:
        return out, lse
    configuration = choose("forward", size, _capability(query.device))
    tree = options.tree.to(query.device)
    tiles = tree.tile_table(configuration.block_m)
    with on_device(query):
        forward_kernel[(len(tiles), heads)](
            *inputs, out, lse, tiles, tree.segments, *tree.ancestors, **_strides(inputs), stride_ot=heads * size,
            heads=heads, **_scalars(inputs, options), **_constants(inputs, configuration),
        )  # fmt: skip
    return out, lse


def backward(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients from the saved output and LSE, and the gradients of both (`grad_lse` may be None), all contiguous."""
    query, key, value, sinks, cached_key, cached_value = inputs
    tokens, heads, size = query.shape
    grad_query, grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    delta = torch.empty_like(lse)
    if lse.numel() == 0:
        return Grads(grad_query, grad_key, grad_value, grad_of_sinks(sinks, lse, delta))
    tree, capability = options.tree.to(query.device), _capability(query.device)
    sizes: dict[str, Any] = {"stride_ot": heads * size, "heads": heads}
    scalars = _scalars(inputs, options) | {"scale": options.scoring.scale} | sizes
    by_query, by_key = (choose(name, size, capability) for name in ("grad_query", "grad_key_value"))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    with on_device(query):
        delta_kernel[(-(-tokens // DELTA_ROWS), heads)](
            grad, out, grad_lse, delta, heads * size, tokens=tokens, **sizes, D=size, BLOCK_D=padded(size),
            BLOCK_M=DELTA_ROWS,
        )  # fmt: skip
        tiles = tree.tile_table(by_query.block_m)
        grad_query_kernel[(len(tiles), heads)](
            query, key, value, cached_key, cached_value, grad, lse, delta, grad_query, tiles, tree.segments,
            *tree.ancestors, **_strides(inputs), **scalars, **_constants(inputs, by_query),
        )  # fmt: skip
        tiles, strides = tree.tile_table(by_key.block_n), _strides(inputs, cached=False)
        grad_key_value_kernel[(len(tiles), key.shape[1])](
            query, key, value, grad, lse, delta, grad_key, grad_value, tiles, tree.segments, *tree.descendants,
            **strides, stride_dt=key.shape[1] * size, **scalars, **_constants(inputs, by_key),
        )  # fmt: skip
    return Grads(grad_query, grad_key, grad_value, grad_of_sinks(sinks, lse, delta))


def _strides(inputs: Inputs, cached: bool = True) -> dict[str, int]:
    named = dict(zip(("q", "k", "v", "ck", "cv"), (*inputs[:3], *inputs[4:]), strict=True))
    return {
        f"stride_{name}{axis}": 0 if x is None else x.stride(i)
        for name, x in named.items()
        if cached or name in ("q", "k", "v")
        for i, axis in enumerate("th")
    }


def _scalars(inputs: Inputs, options: Options) -> dict[str, Any]:
    """Sizes, and logits in units of log 2: outer tanh(inner x), or outer x."""
    scale, cap = options.scoring
    return {
        "prefix": inputs.prefix,
        "window": options.window or 0,
        "inner": 1.0 if cap is None else scale / cap,
        "outer": LOG2_E * (scale if cap is None else cap),
        "CAPPED": cap is not None,
        "WINDOWED": options.window is not None,
    }


def _constants(inputs: Inputs, configuration: Configuration) -> dict[str, Any]:
    size = inputs.query.shape[2]
    return {
        "GROUP": inputs.query.shape[1] // inputs.key.shape[1],
        "D": size,
        "BLOCK_D": padded(size),
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "PRECISION": PRECISION,
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
    }


@lru_cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
