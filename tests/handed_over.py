"""What library products are handed: the operands of each, seen beneath our operators, and the memory between rows."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_kernels._gemm import is_dense
from sdft_kernels.divergence import operators as divergence
from sdft_kernels.token_logprob import operators as token_logprob
from sdft_kernels.topk_divergence import operators as topk_divergence

TILE_BYTES = 64  # of a row of an AMX tile: what a product may read is rounded up to it
MATRIX_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "mv", "addmv", "linear", "matmul"}
# The operators that are written in Python; a mode sees them as one call, so their implementations run in its sight.
OURS = {
    "linear_divergence": divergence._linear_divergence,
    "linear_token_logprob": token_logprob._linear_token_logprob,
    "linear_topk_divergence": topk_divergence._forward,
    "linear_topk_divergence_backward": topk_divergence._backward,
}


def behind_rows(operand):
    """What of its memory is not the operand's: between its rows, and behind the last up to a whole tile."""
    places = list(zip(operand.shape, operand.stride(), strict=True))
    rows = max((size for size, stride in places if stride == 1), default=1)
    span = 1 + sum((size - 1) * stride for size, stride in places)
    span += -rows % (TILE_BYTES // operand.element_size())
    room = operand.untyped_storage().nbytes() // operand.element_size() - operand.storage_offset()
    memory = operand.as_strided((min(span, room),), (1,))
    own = torch.zeros(memory.shape, dtype=torch.bool)
    own.as_strided(operand.shape, operand.stride()).fill_(True)
    return memory[~own]


def fault(operand, matrix):
    """Why a library product must not be handed this operand; None if it may be.

    Behind the rows of a matrix in bf16 may be zeros only; else what was written, as the other columns of a gradient or
    the other heads of a query.
    """
    if is_dense(operand):
        return None
    others = behind_rows(operand)
    if not bool(others.isfinite().all()):
        return f"{tuple(operand.shape)} {operand.dtype} with strides {operand.stride()}: NaN or inf between its rows"
    if matrix and operand.dtype == torch.bfloat16 and bool(others.ne(0).any()):
        return f"{tuple(operand.shape)} {operand.dtype} with strides {operand.stride()}: not 0 between its rows"
    return None


class HandedOver(TorchDispatchMode):
    """Looks at the operands of every library product, and counts the products; `faults` says what was wrong."""

    def __init__(self):
        super().__init__()
        self.products, self.faults = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "sdft_kernels" and name in OURS:
            with self:
                return OURS[name](*args, **(kwargs or {}))
        attention = name.startswith("_scaled_dot_product")
        if namespace == "aten" and (attention or name in MATRIX_PRODUCTS):
            self.products += 1
            operands = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1]
            self.faults += [f"{name}: {why}" for x in operands if (why := fault(x, not attention))]
        return func(*args, **(kwargs or {}))
