"""The matrix products of the head ops, with fp32 results whatever the operands are. Their drivers call nothing else.

No operand has bytes of anything else between its rows, unless they are zeros: the library's bf16 product on AMX reads
each row in whole tiles of 64 bytes and multiplies what lies behind it by 0, which makes NaN of NaN (oneDNN #5717).

"Upcast" below: PyTorch has no bf16 x bf16 -> fp32 product on CPU, so there the vocabulary is walked in slices of rows
that are cast to fp32 one at a time; the weight is never cast whole. The compiled products need no such cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _native

UPCAST_SLICE_BYTES = 8 * 2**20  # long enough for full GEMM speed, short next to any memory_budget

# A thread of the compiled logits product packs 200 rows of at most 768 numbers (csrc/cpu/logits_gemm.h).
NATIVE_THREAD_ROWS, NATIVE_THREAD_COLUMNS = 200, 768
# The compiled dW works on 512 tokens, 2 bytes each (csrc/cpu/weight_grad_gemm.h): a thread packs 192 rows of their
# gradients, and all threads share their hidden states.
NATIVE_GRADIENT_BYTES, NATIVE_BYTES_PER_HIDDEN = 192 * 512 * 2, 512 * 2


@contextmanager
def exact_matmul(precision: str | None) -> Iterator[None]:
    """fp32 products in fp32, whatever `torch.set_float32_matmul_precision` says; ``"tf32"`` opts in on CUDA."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [b.fp32_precision for b in backends]
    try:
        backends[0].fp32_precision = precision or "ieee"
        backends[1].fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements, in any order of dimensions, fill the memory from its first to its last."""
    places = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if tensor.numel() == 0:
        return True
    # A repeated dimension (stride 0) leaves its repetitions' share of the memory to gaps.
    return all(s for _, s in places) and 1 + sum((size - 1) * stride for size, stride in places) == tensor.numel()


def dense(tensor: Tensor) -> Tensor:
    """The tensor where it is dense, else a copy: what lies between a view's rows may never have been written."""
    return tensor if is_dense(tensor) else tensor.contiguous()


@dataclass(frozen=True)
class Gemm:
    """Products of (n, H) hidden states, a (V, H) weight and (n, V) logits or their gradients.

    Attributes:
        operand: dtype the operands are rounded to (autocast's, else the inputs').
        accumulate: dtype of the logits and of every sum: fp32, or fp64 for fp64 inputs.
        native: on CPU use the compiled products where they are faster; only if `_native.has_native()`.
    """

    operand: torch.dtype
    accumulate: torch.dtype
    native: bool = False

    def scratch_bytes(self, device: torch.device, weight: Tensor) -> int:
        """Bytes beyond the operands and results: one upcast slice and what casting it needs, and packed operands."""
        if device.type != "cpu":
            return 0
        own, threads, hidden = 0, torch.get_num_threads(), weight.shape[1]
        if self.compiles_logits(weight):
            own = threads * 4 * NATIVE_THREAD_ROWS * min(hidden + 15, NATIVE_THREAD_COLUMNS)
        if self.gradient_dtype(device) == torch.bfloat16:
            own = max(own, threads * NATIVE_GRADIENT_BYTES + NATIVE_BYTES_PER_HIDDEN * (hidden + 47))
        if weight.dtype == self.operand == self.accumulate and is_dense(weight):
            return own
        return 2 * UPCAST_SLICE_BYTES + own

    def gradient_dtype(self, device: torch.device) -> torch.dtype:
        """Of dL/dlogits as it enters the last two products: rounded once, where they run in `operand`."""
        if device.type != "cpu":
            return self.operand
        bf16 = self.native and self.operand == torch.bfloat16 and _native.cpu_isa() == "avx512_bf16"
        return torch.bfloat16 if bf16 else self.accumulate

    def bytes_per_logit(self, device: torch.device) -> int:
        """Bytes for each element of the gradient tile whose copy in `gradient_dtype` enters the last two products."""
        dtype = self.gradient_dtype(device)
        return 0 if dtype == self.accumulate else dtype.itemsize

    def round_gradient(self, grad: Tensor) -> Tensor:
        """dL/dlogits in `gradient_dtype`."""
        return grad.to(self.gradient_dtype(grad.device))

    def prepare(self, weight: Tensor) -> Tensor:
        """A head as the products read it: on CPU as it is, cast or copied slice by slice; elsewhere once per call.

        fp32 master weights under autocast would else be cast in every chunk, at 60 % of a product's time (2 ps of
        traffic beside 3.3 ps of arithmetic an element at 1,300 tokens, by an H100's data sheet). Autocast keeps the
        same copy.
        """
        return weight if weight.device.type == "cpu" else dense(weight.to(self.operand))

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (n, V) = hidden weight^T + bias."""
        if hidden.device.type == "cpu" and self.compiles_logits(weight):
            hidden = hidden.to(self.operand).contiguous()
            for rows, part in self._slices(weight, self.operand):
                _native.logits_gemm(hidden, part, out[:, rows])
        elif hidden.device.type == "cpu" or self.operand == self.accumulate:
            for rows, part in self._slices(weight, self.accumulate):
                torch.mm(self._cast(hidden), part.t(), out=out[:, rows])
        else:
            torch.mm(dense(hidden.to(self.operand)), weight.to(self.operand).t(), out_dtype=self.accumulate, out=out)
        if bias is not None:
            out += bias.to(self.accumulate)

    def grad_input(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (n, H) = grad weight; `grad` is dense, or followed by zeros in each of its rows."""
        if grad.device.type == "cpu" and grad.dtype == weight.dtype == out.dtype == self.operand and is_dense(weight):
            # bf16 too is summed in fp32 and rounded once: over 49,152 terms its error is that of rounding, 0.17 %.
            torch.mm(grad, weight, out=out)
        elif grad.device.type == "cpu" or self.operand == self.accumulate:
            total = out.new_zeros(out.shape, dtype=self.accumulate)
            for rows, part in self._slices(weight, self.accumulate, beside=grad):
                total.addmm_(grad[:, rows].to(self.accumulate), part)
            out.copy_(total)
        else:
            # fp32 out, rounded once: a bf16 result may be summed from bf16 parts of the vocabulary (split-K).
            out.copy_(torch.mm(grad, weight.to(self.operand), out_dtype=self.accumulate))

    def grad_weight(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None:
        """total (V, H) += grad^T hidden; `grad` as in `grad_input`."""
        if grad.device.type == "cpu" and grad.dtype != self.accumulate:
            _native.weight_grad_gemm(grad, hidden.to(self.operand).contiguous(), total)
        elif grad.device.type == "cpu" or self.operand == self.accumulate:
            total.addmm_(grad.t(), self._cast(hidden))
        else:
            torch.addmm(total, grad.t(), dense(hidden.to(self.operand)), out_dtype=self.accumulate, out=total)

    def _cast(self, operand: Tensor) -> Tensor:
        return dense(operand.to(self.operand).to(self.accumulate))

    def compiles_logits(self, weight: Tensor) -> bool:
        """Whether the compiled logits product takes this head and wins.

        fp32, GFLOP/s of one Zen 4 core, ours and the library's. AVX-512: 61/36 at n=16 H=576 V=49152, 103/75 at 128,
        107/80 at 256, 111/94 at 1024; 103/70 at n=128 H=640 V=65536, 107/82 at n=256 H=2048 V=32768, 107/84 at n=256
        H=4096 V=16384. AVX2: 42/38 to 104/89. The portable build, 32/75, loses to the library everywhere.
        """
        fits = self.native and self.accumulate == torch.float32 and weight.device.type == "cpu"
        return fits and weight.stride(1) == 1 and _native.cpu_isa() not in ("", "portable")

    def _slices(
        self, weight: Tensor, dtype: torch.dtype, beside: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The weight, rounded to `operand`, in `dtype`: whole if it is that already, and dense, else slice by slice.

        Where the matching columns of `beside` are cast too, slices are short enough for both.
        """
        rows, width = weight.shape[0], max(weight.shape[1], 1)
        cast_beside = beside is not None and beside.dtype != dtype
        if weight.dtype == self.operand == dtype and not cast_beside and is_dense(weight):
            yield slice(0, rows), weight
            return
        if beside is not None and cast_beside:
            width = 2 * max(width, beside.shape[0])
        step = max(1, UPCAST_SLICE_BYTES // (width * self.accumulate.itemsize))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, dense(weight[part].to(self.operand).to(dtype))
