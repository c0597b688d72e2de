"""The registered operators ``sdft_kernels::linear_topk_divergence`` and its backward, and autograd over them.

Forward saves the gradient on the support, (N, K), for an upstream gradient of 1; backward scales it.
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
from .fields import NUMBERS, Restriction

NAMESPACE = "sdft_kernels"
_OPTIONS = """
    int k, str support, str tail, float alpha, float? per_entry_clip, float temperature,
    float student_logit_scale, float teacher_logit_scale, float? student_softcap, float? teacher_softcap,
    ScalarType operand_dtype, int? memory_budget, bool pack, str? precision"""
SCHEMA = f"""linear_topk_divergence(
    Tensor student_input, Tensor student_weight, Tensor? student_bias, Tensor? target, Tensor? mask,
    Tensor? teacher_input, Tensor? teacher_weight, Tensor? teacher_bias,
    Tensor? teacher_ids, Tensor? teacher_logprobs, Tensor? given,
    str[] outputs, bool keep_grad_input, {_OPTIONS}
) -> (Tensor numbers, Tensor ids, Tensor entries, Tensor rest, Tensor grad_input)"""
BACKWARD_SCHEMA = f"""linear_topk_divergence_backward(
    Tensor student_input, Tensor student_weight, Tensor? student_bias, Tensor? mask,
    Tensor ids, Tensor entries, Tensor rest,
    bool need_input_grad, bool need_weight_grad, bool need_bias_grad, {_OPTIONS}
) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for schema in (SCHEMA, BACKWARD_SCHEMA):
    _library.define(" ".join(schema.split()))


class Options(NamedTuple):
    """The tail of both schemas, in their order."""

    k: int
    support: str
    tail: str
    alpha: float
    per_entry_clip: float | None
    temperature: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    operand_dtype: torch.dtype
    memory_budget: int | None
    pack: bool
    precision: str | None

    @property
    def restriction(self) -> Restriction:
        return Restriction(*self[:5])

    def transforms(self) -> tuple[Transform, Transform]:
        return (
            Transform(self.student_logit_scale, self.student_softcap, self.temperature),
            Transform(self.teacher_logit_scale, self.teacher_softcap, self.temperature),
        )

    def execution(self) -> dict[str, Any]:
        """What the driver needs to know beyond the mathematics."""
        gemm = Gemm(self.operand_dtype, accumulate_dtype(self.operand_dtype))
        return dict(gemm=gemm, memory_budget=self.memory_budget, pack=self.pack, precision=self.precision)


class Tensors(NamedTuple):
    """The head of the first schema, in its order."""

    student_input: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    target: Tensor | None
    mask: Tensor | None
    teacher_input: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    given: Tensor | None

    def teacher(self, transform: Transform) -> Head | driver.Cached:
        if self.teacher_ids is not None and self.teacher_logprobs is not None:
            return driver.Cached(self.teacher_ids, self.teacher_logprobs)
        assert self.teacher_input is not None and self.teacher_weight is not None
        return Head(self.teacher_input, self.teacher_weight, self.teacher_bias, transform)


def drive(t: Tensors, outputs: tuple[str, ...], keep_grad_input: bool, o: Options) -> driver.Result:
    """The driver on the schema's arguments."""
    student_transform, teacher_transform = o.transforms()
    return driver.linear_topk_divergence(
        Head(t.student_input, t.student_weight, t.student_bias, student_transform),
        t.teacher(teacher_transform),
        t.given,
        t.target,
        t.mask,
        restriction=o.restriction,
        outputs=outputs,
        keep_grad_input=keep_grad_input,
        **o.execution(),
    )


def _forward(*args: Any) -> tuple[Tensor, ...]:
    t, outputs, keep_grad_input, o = Tensors(*args[:11]), tuple(args[11]), args[12], Options(*args[13:])
    *result, grad_input = drive(t, outputs, keep_grad_input, o)
    return *result, t.student_input.new_empty(0) if grad_input is None else grad_input


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, keep_grad_input, o = args[0], args[12], Options(*args[13:])
    count, width = x.shape[0], o.restriction.width
    numbers = x.new_empty((len(NUMBERS), count), dtype=accumulate_dtype(o.operand_dtype))
    return (
        numbers,
        x.new_empty((count, width), dtype=torch.int64),
        numbers.new_empty((count, width)),
        numbers.new_empty(count),
        x.new_empty(x.shape if keep_grad_input else (0,)),
    )


def _backward(*args: Any) -> tuple[Tensor, ...]:
    (x, weight, bias, mask, ids, entries, rest), need, o = args[:7], Need(*args[7:10]), Options(*args[10:])
    grads = driver.linear_topk_divergence_backward(
        Head(x, weight, bias, o.transforms()[0]), ids, entries, rest, mask,
        dense=o.restriction.dense, need=need, **o.execution(),
    )  # fmt: skip
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, tensors, need = args[0], args[:3], args[7:10]
    return tuple(t.new_empty(t.shape) if n else x.new_empty(0) for t, n in zip(tensors, need, strict=True))


for name, function, fake in (
    ("linear_topk_divergence", _forward, _forward_fake),
    ("linear_topk_divergence_backward", _backward, _backward_fake),
):
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


class TopkDivergenceFunction(torch.autograd.Function):
    """Numbers and ids; the divergence takes an upstream gradient per token."""

    @staticmethod
    def forward(
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        rest: tuple,
        options: Options,
        outputs: tuple[str, ...],
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        tensors = Tensors(student_input, student_weight, student_bias, *rest)
        need = Need(*(grad_enabled and n for n in ctx.needs_input_grad[:3]))
        # A dense gradient and a frozen head: dX is linear in the upstream gradient, so keep it for a weight of 1 (1
        # GEMM instead of 2).
        ctx.keeps_grad_input = options.restriction.dense and need == (True, False, False)
        operator = getattr(torch.ops, NAMESPACE).linear_topk_divergence
        numbers, ids, entries, remainder, grad_input = operator(*tensors, list(outputs), ctx.keeps_grad_input, *options)
        if ctx.keeps_grad_input:
            ctx.save_for_backward(grad_input)
        elif any(need):
            ctx.save_for_backward(student_input, student_weight, student_bias, tensors.mask, ids, entries, remainder)
        ctx.options, ctx.need = options, need
        ctx.set_materialize_grads(False)
        made = dict(zip(NUMBERS, numbers.unbind(0), strict=True)) | {"ids": ids}
        result = tuple(made[name].clone() for name in outputs)
        ctx.mark_non_differentiable(*(r for name, r in zip(outputs, result, strict=True) if name != "divergence"))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        g = upstream[0]  # `divergence` comes first where it is asked for; nothing else has a gradient
        if g is None or not any(ctx.need):
            return (None,) * 7
        if ctx.keeps_grad_input:
            (grad_input,) = ctx.saved_tensors
            return ((_scale(grad_input, g)).to(grad_input.dtype), *(None,) * 6)
        *tensors, entries, rest = ctx.saved_tensors
        operator = getattr(torch.ops, NAMESPACE).linear_topk_divergence_backward
        grads = operator(*tensors, _scale(entries, g), rest.mul(g).masked_fill(g == 0, 0), *ctx.need, *ctx.options)
        return (*(v if n else None for v, n in zip(grads, ctx.need, strict=True)), *(None,) * 4)


def _scale(rows: Tensor, g: Tensor) -> Tensor:
    """Row n times g_n; a token without upstream gradient gets 0 whatever it holds."""
    return (rows * g[:, None]).masked_fill(g[:, None] == 0, 0)
