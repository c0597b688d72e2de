"""The matrix products of the head ops, with fp32 results whatever the operands are. Their drivers call nothing else.

"Upcast" below: PyTorch has no bf16 x bf16 -> fp32 product on CPU, so there the vocabulary is walked in slices of rows
that are cast to fp32 one at a time; the weight is never cast whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

UPCAST_SLICE_BYTES = 8 * 2**20  # long enough for full GEMM speed, short next to any memory_budget


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


@dataclass(frozen=True)
class Gemm:
    """Products of (n, H) hidden states, a (V, H) weight and (n, V) logits or their gradients.

    Attributes:
        operand: dtype the operands are rounded to (autocast's, else the inputs').
        accumulate: dtype of the logits and of every sum: fp32, or fp64 for fp64 inputs.
    """

    operand: torch.dtype
    accumulate: torch.dtype

    def scratch_bytes(self, device: torch.device, weight: Tensor) -> int:
        """Bytes beyond the operands and results: one upcast slice, and what casting it needs."""
        if device.type != "cpu" or weight.dtype == self.operand == self.accumulate:
            return 0
        return 2 * UPCAST_SLICE_BYTES

    def gradient_dtype(self, device: torch.device) -> torch.dtype:
        """Of dL/dlogits as it enters the last two products: rounded once, where they run in `operand`."""
        return self.accumulate if device.type == "cpu" else self.operand

    def bytes_per_logit(self, device: torch.device) -> int:
        """Bytes for each element of the gradient tile whose copy in `gradient_dtype` enters the last two products."""
        dtype = self.gradient_dtype(device)
        return 0 if dtype == self.accumulate else dtype.itemsize

    def round_gradient(self, grad: Tensor) -> Tensor:
        """dL/dlogits in `gradient_dtype`."""
        return grad.to(self.gradient_dtype(grad.device))

    def prepare(self, weight: Tensor) -> Tensor:
        """A head as the products read it: on CPU as it is, cast slice by slice; elsewhere cast once per call.

        fp32 master weights under autocast would else be cast in every chunk, at 60 % of a product's time (2 ps of
        traffic beside 3.3 ps of arithmetic an element at 1,300 tokens, by an H100's data sheet). Autocast keeps the
        same copy.
        """
        return weight if weight.device.type == "cpu" else weight.to(self.operand)

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (n, V) = hidden weight^T + bias."""
        if hidden.device.type == "cpu" or self.operand == self.accumulate:
            for rows, part in self._slices(weight):
                torch.mm(self._cast(hidden), part.t(), out=out[:, rows])
        else:
            torch.mm(hidden.to(self.operand), weight.to(self.operand).t(), out_dtype=self.accumulate, out=out)
        if bias is not None:
            out += bias.to(self.accumulate)

    def grad_input(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (n, H) = grad weight."""
        if grad.device.type == "cpu" or self.operand == self.accumulate:
            total = grad.new_zeros(out.shape)
            for rows, part in self._slices(weight):
                total.addmm_(grad[:, rows], part)
            out.copy_(total)
        else:
            # fp32 out, rounded once: a bf16 result may be summed from bf16 parts of the vocabulary (split-K).
            out.copy_(torch.mm(grad, weight.to(self.operand), out_dtype=self.accumulate))

    def grad_weight(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None:
        """total (V, H) += grad^T hidden."""
        if grad.device.type == "cpu" or self.operand == self.accumulate:
            total.addmm_(grad.t(), self._cast(hidden))
        else:
            torch.addmm(total, grad.t(), hidden.to(self.operand), out_dtype=self.accumulate, out=total)

    def _cast(self, operand: Tensor) -> Tensor:
        return operand.to(self.operand).to(self.accumulate)

    def _slices(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `accumulate`, whole if it is already, else slice by slice."""
        rows = weight.shape[0]
        if weight.dtype == self.operand == self.accumulate:
            yield slice(0, rows), weight
            return
        step = max(1, UPCAST_SLICE_BYTES // (max(weight.shape[1], 1) * self.accumulate.itemsize))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, self._cast(weight[part])
