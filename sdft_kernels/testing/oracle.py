"""One implementation's numbers and gradients by name, and the fp64 truth beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergence import AffineTokenLoss, linear_divergence, linear_divergence_loss
from ..divergence.fields import DIFFERENTIABLE
from ..divergence.token_loss import TokenLoss
from .inputs import DivergenceInputs

TRAINED = ("student_input", "student_weight", "student_bias")


def run_divergence(
    inputs: DivergenceInputs, impl: str, upstream: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Every number of `linear_divergence`, and ``grad_*`` of sum_k upstream_k . number_k."""
    arguments = _with_grad(inputs)
    tokens = linear_divergence(**arguments, impl=impl, **options)
    total = torch.zeros((), dtype=torch.float64, device=inputs.student_input.device)
    for name, weight in upstream.items():
        total = total + (weight.to(total) * getattr(tokens, name).double()).sum()
    total.backward()
    return _numbers(tokens._asdict()) | _grads(arguments)


def run_divergence_loss(
    inputs: DivergenceInputs, impl: str, token_loss: AffineTokenLoss | TokenLoss | None = None, **options: Any
) -> dict[str, Tensor]:
    """The loss, every number, and ``grad_*`` of `linear_divergence_loss`."""
    arguments = _with_grad(inputs)
    loss, tokens = linear_divergence_loss(**arguments, impl=impl, token_loss=token_loss, **options)
    loss.backward()
    return {"loss": loss.detach()} | _numbers(tokens._asdict()) | _grads(arguments)


def random_upstream(count: int, jsd: bool, target: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """A weight of every differentiable number, fp64 (N,)."""
    g = torch.Generator().manual_seed(seed)
    names = [n for n in DIFFERENTIABLE if (jsd or n != "jsd") and (target or n != "student_logprob")]
    return {name: torch.randn(count, generator=g, dtype=torch.float64) for name in names}


def _with_grad(inputs: DivergenceInputs) -> dict[str, Any]:
    arguments = inputs.to(inputs.student_input.dtype).tensors()
    for name in TRAINED:
        tensor = arguments[name]
        if tensor is not None:
            tensor.requires_grad_()
    return arguments


def _numbers(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items() if value is not None}


def _grads(arguments: dict[str, Any]) -> dict[str, Tensor]:
    grads = {f"grad_{name}": arguments[name].grad for name in TRAINED if arguments[name] is not None}
    return {name: grad for name, grad in grads.items() if grad is not None}
