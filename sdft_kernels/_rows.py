"""What row kernels share: the device they launch on; in PyTorch, blocks of rows that stay in cache, and z in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._head import Transform

ALIGNMENT = 32  # elements from row to row: cache lines, the widest vector, and a tile of bf16 operands
# Elements of a block. CPU: 1.5 MiB of fp32 stay in the cache. CUDA: 8 MiB, since launching dominates small blocks: 2
# rows a block at a vocabulary of 151,936 would be 4,000 blocks of some 50 launches at 8,192 tokens.
BLOCK_ELEMENTS = {"cpu": 384 * 1024, "cuda": 2 * 2**20}


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def row_stride(vocabulary: int) -> int:
    """Elements from one row of a tile of a fused kernel to the next: a multiple of 64 bytes of bf16.

    So every access moves whole vectors, and what a library product reads behind a row's last element, its columns
    rounded up to a tile of 64 bytes, is the row's own padding, in the last row too.
    """
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


def whole_rows(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """All bytes of a (C, V) tile's rows, padding included, as a matrix in `dtype`, in which a gradient lies over them.

    Raises:
        ValueError: `dtype` is neither the tile's nor half as wide.
    """
    if dtype != tile.dtype and 2 * dtype.itemsize != tile.dtype.itemsize:
        raise ValueError(f"a gradient in {dtype} does not fit over logits in {tile.dtype}")
    stride = max(tile.stride(0), tile.shape[1])
    return tile.as_strided((tile.shape[0], stride), (stride, 1)).view(dtype)


def block_rows(vocabulary: int, device_type: str = "cpu") -> int:
    """Rows in a block, at least one."""
    return max(1, BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS["cuda"]) // max(vocabulary, 1))


def blocks_bytes(blocks: int, count: int, vocabulary: int, itemsize: int, device_type: str = "cpu") -> int:
    """Bytes of `blocks` scratch blocks for a call on `count` rows."""
    return blocks * min(block_rows(vocabulary, device_type), max(count, 1)) * vocabulary * itemsize


def blocks(tile: Tensor, scratch_blocks: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each block of a (C, V) tile, and (scratch_blocks, R, V) of scratch for them, which is reused."""
    count, vocabulary = tile.shape
    step = block_rows(vocabulary, tile.device.type)
    scratch = tile.new_empty(scratch_blocks, min(step, count), vocabulary)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, scratch[:, : rows.stop - start]


def to_z_(raw: Tensor, transform: Transform) -> Tensor:
    """Raw logits to z in place; -inf survives (the softcap alone would bend it)."""
    if transform.softcap is not None:
        absent = raw == -math.inf
        raw.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
        raw.masked_fill_(absent, -math.inf)
    elif transform.slope != 1.0:
        raw.mul_(transform.slope)
    return raw
