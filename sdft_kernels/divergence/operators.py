"""The registered operator ``sdft_kernels::linear_divergence`` and autograd over it.

One operator serves all: with `weights` it is the affine token loss and its gradients (4 GEMMs); without it computes
the per-token numbers (2 GEMMs), whose backward is again the operator, weighted by the upstream gradient.
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
from .fields import DIFFERENTIABLE, FIELDS
from .token_loss import TokenLoss

NAMESPACE = "sdft_kernels"
SCALE_BLOCK = 2**20  # elements
SCHEMA = """linear_divergence(
    Tensor student_input, Tensor student_weight, Tensor? student_bias,
    Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? mask,
    Tensor? weights, str[] weighted, Tensor? old_logprob, float? importance_clip,
    bool need_input_grad, bool need_weight_grad, bool need_bias_grad,
    float? jsd_alpha, float temperature, float student_logit_scale, float teacher_logit_scale,
    float? student_softcap, float? teacher_softcap, ScalarType operand_dtype,
    int? memory_budget, bool pack, str? precision, str impl, str? vocab_group
) -> (Tensor loss, Tensor tokens, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(" ".join(SCHEMA.split()))


class Options(NamedTuple):
    """The tail of the schema, in its order."""

    jsd_alpha: float | None
    temperature: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    operand_dtype: torch.dtype
    memory_budget: int | None
    pack: bool
    precision: str | None
    impl: str  # resolved: "torch", "native", "triton" or "reference"
    vocab_group: str | None  # name of the process group over which the vocabulary is sharded

    def transforms(self) -> tuple[Transform, Transform]:
        return (
            Transform(self.student_logit_scale, self.student_softcap, self.temperature),
            Transform(self.teacher_logit_scale, self.teacher_softcap, self.temperature),
        )


class Tensors(NamedTuple):
    """The head of the schema, in its order."""

    student_input: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    target: Tensor | None
    mask: Tensor | None


def drive(
    t: Tensors,
    o: Options,
    token_loss: driver.Affine | TokenLoss | None,
    need: Need,
    check_elementwise: bool = False,
) -> driver.Result:
    """The driver on the schema's arguments."""
    student_transform, teacher_transform = o.transforms()
    return driver.linear_divergence(
        Head(t.student_input, t.student_weight, t.student_bias, student_transform),
        Head(t.teacher_input, t.teacher_weight, t.teacher_bias, teacher_transform),
        t.target,
        t.mask,
        alpha=o.jsd_alpha,
        token_loss=token_loss,
        need=need,
        gemm=Gemm(o.operand_dtype, accumulate_dtype(o.operand_dtype), native=o.impl == "native"),
        rows=driver.rows_of(o.impl),
        memory_budget=o.memory_budget,
        pack=o.pack,
        precision=o.precision,
        vocab_group=o.vocab_group,
        check_elementwise=check_elementwise,
    )


def _linear_divergence(*args: Any) -> tuple[Tensor, ...]:
    tensors, (weights, weighted, old, clip), need, options = args[:8], args[8:12], args[12:15], args[15:]
    t = Tensors(*tensors)
    affine = None
    if weights is not None:
        affine = driver.Affine(dict(zip(weighted, weights.unbind(0), strict=True)), old, clip)
    result = drive(t, Options(*options), affine, Need(*need))
    absent = t.student_input.new_empty(0)
    return result.loss, result.tokens, *(absent.clone() if g is None else g for g in result[2:])


def _linear_divergence_fake(*args: Any) -> tuple[Tensor, ...]:
    x, weight, bias, need, operand = args[0], args[1], args[2], args[12:15], args[21]
    dtype = accumulate_dtype(operand)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty((len(FIELDS), x.shape[0]), dtype=dtype),
        x.new_empty(x.shape if need[0] else (0,)),
        weight.new_empty(weight.shape) if need[1] else x.new_empty(0),
        bias.new_empty(bias.shape) if need[2] else x.new_empty(0),
    )


_library.impl("linear_divergence", _linear_divergence, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::linear_divergence", _linear_divergence_fake, lib=_library)


def _call(t: Tensors, o: Options, affine: driver.Affine | None, need: Need) -> tuple[Tensor, ...]:
    """Through the dispatcher."""
    weights = None if affine is None else torch.stack(list(affine.weights.values())) if affine.weights else None
    names = [] if affine is None else list(affine.weights)
    old, clip = (None, None) if affine is None else (affine.old_logprob, affine.importance_clip)
    return getattr(torch.ops, NAMESPACE).linear_divergence(*t, weights, names, old, clip, *need, *o)


class LossFunction(torch.autograd.Function):
    """The summed token loss. Its gradients are computed with it and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        rest: tuple,
        options: Options,
        token_loss: driver.Affine | TokenLoss,
        check_elementwise: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = Tensors(student_input, student_weight, student_bias, *rest)
        need = Need(*(grad_enabled and n for n in ctx.needs_input_grad[:3]))
        if isinstance(token_loss, driver.Affine):
            loss, tokens, *made = _call(tensors, options, token_loss, need)
            grads = [g if n else None for g, n in zip(made, need, strict=True)]
        else:
            loss, tokens, *grads = drive(tensors, options, token_loss, need, check_elementwise)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(tokens)
        return loss, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, scale = ctx.saved_tensors, grad_loss.reshape(1)
        if torch.compiler.is_compiling():
            grads = [None if g is None else (g * scale).to(g.dtype) for g in grads]
        elif _graph_is_kept():
            grads = [None if g is None else _scale_(g.clone(), scale) for g in grads]
        elif grad_loss.device.type != "cpu" or grad_loss.item() != 1:  # asking elsewhere would synchronise
            grads = [None if g is None else _scale_(g, scale) for g in grads]
        return (*grads, None, None, None, None, None)


def _scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """`gradient` times `scale`, (1,) in fp32, in place: the product is made in fp32 and rounded once.

    A 0-d scale would be rounded to bf16 first, which is off by up to 0.4 %.
    """
    whole = gradient.view(-1)
    # On CPU the fp32 product is a tensor of its own.
    for block in whole.split(SCALE_BLOCK) if gradient.device.type == "cpu" else (whole,):
        torch.mul(block, scale, out=block)
    return gradient


def _graph_is_kept() -> bool:
    """Whether this backward was called with retain_graph=True; saved gradients must then stay as they are."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class TokensFunction(torch.autograd.Function):
    """Per-token numbers, each with its own upstream gradient. Backward projects the logits again."""

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
        differentiable = [name for name in outputs if name in DIFFERENTIABLE]
        # One number and a frozen head: dX is linear in the upstream gradient, so keep it for a weight of 1 (3 GEMMs
        # instead of 5).
        affine = None
        ctx.keeps_grad_input = need == (True, False, False) and len(differentiable) == 1
        if ctx.keeps_grad_input:
            ones = student_input.new_ones(student_input.shape[0], dtype=accumulate_dtype(options.operand_dtype))
            affine = driver.Affine({differentiable[0]: ones})
        _, tokens, grad_input, *_ = _call(tensors, options, affine, need if ctx.keeps_grad_input else Need())
        ctx.save_for_backward(*((grad_input,) if ctx.keeps_grad_input else tensors))
        ctx.options, ctx.outputs, ctx.need = options, outputs, need
        ctx.set_materialize_grads(False)
        result = tuple(tokens[FIELDS.index(name)].clone() for name in outputs)
        ctx.mark_non_differentiable(*(r for name, r in zip(outputs, result, strict=True) if name not in DIFFERENTIABLE))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = {
            name: g for name, g in zip(ctx.outputs, upstream, strict=True) if g is not None and name in DIFFERENTIABLE
        }
        if not weights:
            return (None,) * 7
        if ctx.keeps_grad_input:
            (grad_input,) = ctx.saved_tensors
            (g,) = weights.values()
            # Select: a token without upstream gradient stays 0 whatever its number holds.
            scaled = (grad_input * g[:, None]).to(grad_input.dtype).masked_fill(g[:, None] == 0, 0)
            return (scaled, *(None,) * 6)
        tensors = Tensors(*ctx.saved_tensors)
        _, _, *grads = _call(tensors, ctx.options, driver.Affine(weights), ctx.need)
        return (*(g if n else None for g, n in zip(grads, ctx.need, strict=True)), *(None,) * 4)
