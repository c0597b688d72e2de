"""What the PyTorch row kernels of every op share: blocks of rows that stay in the processor's cache, and z in place."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ._head import Transform

BLOCK_ELEMENTS = 384 * 1024  # 1.5 MiB of fp32


def block_rows(vocabulary: int) -> int:
    """Rows in a block, at least one."""
    return max(1, BLOCK_ELEMENTS // max(vocabulary, 1))


def blocks_bytes(blocks: int, count: int, vocabulary: int, itemsize: int) -> int:
    """Bytes of `blocks` scratch blocks for a call on `count` rows."""
    return blocks * min(block_rows(vocabulary), max(count, 1)) * vocabulary * itemsize


def blocks(tile: Tensor, scratch_blocks: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each block of a (C, V) tile, and (scratch_blocks, R, V) of scratch for them, which is reused."""
    count, vocabulary = tile.shape
    step = block_rows(vocabulary)
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
