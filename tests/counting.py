"""What an op does beneath its registered operator, where `FlopCounterMode` does not look: products and tensor sizes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_kernels._gemm import Gemm


def counting_gemm(tokens, vocabulary, hidden):
    """A subclass of `Gemm` to put in its place; each product is added to `done`, in units of G = N*V*H.

    Products on fewer than all rows of the head go to `sparse`.
    """

    class CountingGemm(Gemm):
        done: list[float] = []
        sparse: list[float] = []

        def _count(self, n, weight):
            counts = self.done if weight.shape[0] == vocabulary else self.sparse
            counts.append(n * weight.numel() / (tokens * vocabulary * hidden))

        def project(self, hidden, weight, bias, out):
            self._count(hidden.shape[0], weight)
            super().project(hidden, weight, bias, out)

        def grad_input(self, grad, weight, out):
            self._count(grad.shape[0], weight)
            super().grad_input(grad, weight, out)

        def grad_weight(self, grad, hidden, total):
            self._count(grad.shape[0], total)
            super().grad_weight(grad, hidden, total)

    return CountingGemm


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out
