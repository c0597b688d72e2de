"""The registered operator ``sdft_kernels::linear_token_logprob`` and autograd over it.

One operator serves both ways: without `upstream` it computes the numbers (1 GEMM), with it their gradients too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import accumulate_dtype
from .._chunks import Head, Need
from .._gemm import Gemm
from .._head import Transform
from . import driver
from .fields import FIELDS

NAMESPACE = "sdft_kernels"
SCHEMA = """linear_token_logprob(
    Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? mask,
    str[] names, Tensor? upstream, bool need_input_grad, bool need_weight_grad, bool need_bias_grad,
    float temperature, float logit_scale, float? softcap, ScalarType operand_dtype,
    int? memory_budget, bool pack, str? precision
) -> (Tensor tokens, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(" ".join(SCHEMA.split()))


class Options(NamedTuple):
    """The tail of the schema, in its order."""

    temperature: float
    logit_scale: float
    softcap: float | None
    operand_dtype: torch.dtype
    memory_budget: int | None
    pack: bool
    precision: str | None

    def transform(self) -> Transform:
        return Transform(self.logit_scale, self.softcap, self.temperature)


class Tensors(NamedTuple):
    """The head of the schema, in its order."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    mask: Tensor | None


def drive(t: Tensors, names: tuple[str, ...], upstream: Tensor | None, need: Need, o: Options) -> driver.Result:
    """The driver on the schema's arguments."""
    return driver.linear_token_logprob(
        Head(t.input, t.weight, t.bias, o.transform()),
        t.target,
        t.mask,
        names=names,
        upstream=upstream,
        need=need,
        gemm=Gemm(o.operand_dtype, accumulate_dtype(o.operand_dtype)),
        memory_budget=o.memory_budget,
        pack=o.pack,
        precision=o.precision,
    )


def _linear_token_logprob(*args: Any) -> tuple[Tensor, ...]:
    tensors, names, upstream, need, options = args[:5], args[5], args[6], args[7:10], args[10:]
    result = drive(Tensors(*tensors), tuple(names), upstream, Need(*need), Options(*options))
    return result.tokens, *(tensors[0].new_empty(0) if g is None else g for g in result[1:])


def _linear_token_logprob_fake(*args: Any) -> tuple[Tensor, ...]:
    x, weight, bias, upstream, need, operand = args[0], args[1], args[2], args[6], args[7:10], args[13]
    need = need if upstream is not None else (False,) * 3
    return (
        x.new_empty((len(FIELDS), x.shape[0]), dtype=accumulate_dtype(operand)),
        x.new_empty(x.shape if need[0] else (0,)),
        weight.new_empty(weight.shape) if need[1] else x.new_empty(0),
        bias.new_empty(bias.shape) if need[2] else x.new_empty(0),
    )


_library.impl("linear_token_logprob", _linear_token_logprob, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::linear_token_logprob", _linear_token_logprob_fake, lib=_library)


def _call(t: Tensors, names: tuple[str, ...], upstream: Tensor | None, need: Need, o: Options) -> tuple[Tensor, ...]:
    """Through the dispatcher."""
    return getattr(torch.ops, NAMESPACE).linear_token_logprob(*t, list(names), upstream, *need, *o)


class TokenLogprobFunction(torch.autograd.Function):
    """The numbers, each with its own upstream gradient. Backward projects the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple,
        options: Options,
        outputs: tuple[str, ...],
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        tensors = Tensors(input, weight, bias, *rest)
        need = Need(*(grad_enabled and n for n in ctx.needs_input_grad[:3]))
        # One number and a frozen head: dX is linear in the upstream gradient, so keep it for a weight of 1 (2 GEMMs
        # instead of 3).
        ctx.keeps_grad_input = need == (True, False, False) and len(outputs) == 1
        ones = None
        if ctx.keeps_grad_input:
            ones = input.new_ones(1, input.shape[0], dtype=accumulate_dtype(options.operand_dtype))
        tokens, grad_input, *_ = _call(tensors, outputs, ones, need if ctx.keeps_grad_input else Need(), options)
        ctx.save_for_backward(*((grad_input,) if ctx.keeps_grad_input else tensors))
        ctx.options, ctx.outputs, ctx.need = options, outputs, need
        ctx.set_materialize_grads(False)
        return tuple(tokens[FIELDS.index(name)].clone() for name in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = {name: g for name, g in zip(ctx.outputs, upstream, strict=True) if g is not None}
        if not weights:
            return (None,) * 7
        if ctx.keeps_grad_input:
            (grad_input,) = ctx.saved_tensors
            (g,) = weights.values()
            # Select: a token without upstream gradient stays 0 whatever its number holds.
            scaled = (grad_input * g[:, None]).to(grad_input.dtype).masked_fill(g[:, None] == 0, 0)
            return (scaled, *(None,) * 6)
        stacked = torch.stack(list(weights.values()))
        _, *grads = _call(Tensors(*ctx.saved_tensors), tuple(weights), stacked, ctx.need, ctx.options)
        return (*(g if n else None for g, n in zip(grads, ctx.need, strict=True)), *(None,) * 4)
