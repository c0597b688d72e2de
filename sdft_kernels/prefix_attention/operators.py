"""Autograd over whoever computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._gemm import exact_matmul
from .call import Inputs, Options


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32, whatever autocast and `torch.set_float32_matmul_precision` say.

    `torch.compile` cannot trace a change of the latter: what it compiles follows the caller's setting.
    """
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():
            yield
        else:
            with exact_matmul(None):
                yield


class SharedPrefixAttentionFunction(torch.autograd.Function):
    """(query, key, value, sinks, cached key, cached value, options, kernels) -> output and LSE, both differentiable.

    `kernels` is `composition`, `fused_native` or `fused_triton`. Saves the inputs, the output and the LSE: the
    probabilities are computed again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        cached_key: Tensor | None,
        cached_value: Tensor | None,
        options: Options,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(query, key, value, sinks, cached_key, cached_value)
        with exact_products(query.device):
            out, lse = kernels.forward(inputs, options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options, ctx.kernels = options, kernels
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 8
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        with exact_products(out.device):
            grads = ctx.kernels.backward(Inputs(*tensors), ctx.options, out, lse, grad, grad_lse)
        return *grads, None, None, None, None
