"""One implementation's numbers and gradients by name, and the fp64 truth beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergence import AffineTokenLoss, linear_divergence, linear_divergence_loss
from ..divergence.fields import DIFFERENTIABLE
from ..divergence.token_loss import TokenLoss
from ..token_logprob import TokenLogprob, linear_token_logprob
from ..topk_divergence import linear_topk_divergence
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


def run_token_logprob(
    inputs: DivergenceInputs,
    impl: str,
    upstream: dict[str, Tensor],
    trained: tuple[str, ...] = ("input", "weight", "bias"),
    **options: Any,
) -> dict[str, Tensor]:
    """Every number of `linear_token_logprob` of the student, and ``grad_*`` of sum_k upstream_k . number_k.

    `upstream` may hold more names than `options` asks for; what is not in `trained` is frozen.
    """
    of_op = ("input", "weight", "bias")
    tensors = inputs.to(inputs.student_input.dtype).tensors()
    arguments = {name: tensors[f"student_{name}"] for name in of_op} | {n: tensors[n] for n in ("target", "mask")}
    leaves = {name: x.requires_grad_() for name in trained if (x := arguments[name]) is not None}
    tokens = linear_token_logprob(**arguments, impl=impl, **options)  # type: ignore[arg-type]
    numbers = {name: value for name, value in tokens._asdict().items() if value is not None}
    sum((upstream[name].to(value) * value).sum() for name, value in numbers.items()).backward()
    return _numbers(numbers) | {f"grad_{name}": x.grad for name, x in leaves.items() if x.grad is not None}


def run_topk_divergence(
    arguments: dict[str, Any],
    impl: str,
    trained: tuple[str, ...] = TRAINED,
    weight: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Every number of `linear_topk_divergence`, and ``grad_*`` of sum_n weight_n divergence_n.

    `arguments`, by name, are those of `restrict_support`; `weight` (N,) is random where it is None.
    """
    arguments = cast(arguments, arguments["student_input"].dtype)
    leaves = {name: arguments[name].requires_grad_() for name in trained if arguments.get(name) is not None}
    tokens = linear_topk_divergence(**arguments, impl=impl, **options)
    if weight is None:
        weight = random_weight(arguments["student_input"].shape[0])
    (weight.to(tokens.divergence) * tokens.divergence).sum().backward()
    return _numbers(tokens._asdict()) | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Detached copies of the floating tensors in `dtype`: no gradient leaks from one run into another."""
    return {
        name: x.detach().to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def random_weight(count: int, seed: int = 1) -> Tensor:
    """A weight for one number, fp64 (N,)."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_logprob_upstream(count: int, seed: int = 1) -> dict[str, Tensor]:
    """A weight for every number of `linear_token_logprob`, fp64 (N,)."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, generator=g, dtype=torch.float64) for name in TokenLogprob._fields}


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
