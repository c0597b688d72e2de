"""The linear layers while `generate` decodes on CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels import _native
from sdft_kernels._gemm import Gemm
from sdft_kernels.models.hidden import is_compiled

# At 16 rows, what is timed below takes the library 52 to 64 ms and the compiled product 32; at 64 rows, 107 and 121.
FEW_ROWS = 16


@contextlib.contextmanager
def compiled_linears(model: nn.Module) -> Iterator[None]:
    """Inside, fp32 linear layers on CPU multiply few rows by the compiled product, where that is the faster one.

    Decoding reads every weight for a few rows. The 210 layers of SmolLM2-135M (424 MB), one after the other, take the
    library 42 to 68 ms at 8 rows and the compiled product 20 to 25; the head, 17 and 7 (by hand; 2 threads, Zen 4 with
    AVX-512).

    Args:
        model: layers that are adapted, hooked or subclassed stay as they are, and so does a model that is compiled.
    """
    elsewhere = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_compiled(model)
    if elsewhere or not _native.has_native():
        yield
        return
    gemm = Gemm(torch.float32, torch.float32, native=True)
    layers: list[Any] = [module for module in model.modules() if _fits(module, gemm)]
    for layer in layers:
        layer.forward = _forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fits(module: Any, gemm: Gemm) -> bool:
    # A subclass, or an instance with a forward of its own (offloading), computes something else.
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and gemm.compiles_logits(weight)


def _forward_of(layer: nn.Linear) -> Any:
    def forward(input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if input.dtype != torch.float32 or not 0 < len(rows) <= FEW_ROWS:
            return nn.functional.linear(input, layer.weight, layer.bias)
        out = rows.new_empty(len(rows), layer.weight.shape[0])
        _native.logits_gemm(rows, layer.weight, out, few=True)
        if layer.bias is not None:
            out += layer.bias
        return out.view(*input.shape[:-1], -1)

    return forward
