"""The contract of op 1: arguments, checks, and which implementation runs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    accumulate_dtype,
    check_float_dtypes,
    check_index_dtypes,
    check_matrices,
    check_positive,
    check_precision,
    check_shapes,
    check_target_range,
    check_teacher_grad,
    check_tensors,
    check_weight,
    operand_dtype,
    values_are_visible,
)
from .._dispatch import debug_enabled, resolve
from .._head import ABSENT_TARGET
from .driver import Affine
from .fields import NEED_TARGET, TokenDivergence, available_fields
from .operators import LossFunction, Options, Tensors, TokensFunction
from .reference import linear_divergence_reference
from .token_loss import AffineTokenLoss, TokenLoss, sdft_token_loss


def linear_divergence(
    student_input: Tensor,  # (N, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor,  # (N, H_t)
    teacher_weight: Tensor,  # (V, H_t)
    target: Tensor | None = None,  # (N,)
    *,
    mask: Tensor | None = None,  # (N,)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    jsd_alpha: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    outputs: tuple[str, ...] | None = None,
    vocab_group: Any = None,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
    impl: str = "auto",
) -> TokenDivergence:
    """Per-token divergences between two LM heads, from hidden states, without the (N, V) logits.

    z = softcap(scale * (input weight^T + bias)) / temperature on either side; p_s, p_t are the softmaxes of z. Each of
    the first five numbers accepts any upstream gradient; backward projects the logits again chunk by chunk (6 GEMMs of
    2*N*V*H FLOP in all, 5 with a frozen head, 3 with a frozen head and one differentiable output). Where the loss is a
    sum of per-token terms, `linear_divergence_loss` needs 4 (3 frozen).

    Args:
        student_input: (N, H), fp32, bf16 or fp64. Differentiable.
        student_weight: (V, H), same dtype (under autocast any of these). Differentiable.
        teacher_input: (N, H_t). Must not require grad.
        teacher_weight: (V, H_t). May require grad only if it is the student's weight; it gets no gradient as teacher.
        target: (N,) int64, the token whose log-probability is reported; -100 is absent. On CPU (and with
            ``SDFT_KERNELS_DEBUG=1``) an unmasked target out of range raises, on CUDA it gives NaN in that token.
        mask: (N,) bool, False for tokens that are not projected at all: outputs 0, gradients exactly 0.
        student_bias: (V,). Differentiable. -inf masks a vocabulary entry.
        teacher_bias: (V,).
        temperature: divides the logits of both sides; no T^2 factor anywhere.
        jsd_alpha: teacher's share of the mixture; None for no `jsd`. At 0 and 1 `jsd` is the matching KL.
        student_logit_scale, teacher_logit_scale: multiply the raw logits (Cohere; 1/logits_scaling of Granite).
        student_softcap, teacher_softcap: cap * tanh(logit / cap) after the scale (Gemma 2).
        outputs: names to return; None is every number that the arguments allow. The others are None.
        vocab_group: process group over which the vocabulary is sharded: each rank passes its rows of both heads (and
            biases), in rank order, and the same tokens; targets count in the whole vocabulary. Numbers and dX are those
            of the whole, dW and dbias this rank's. Every rank must call, forward and backward, with the same upstream
            gradients. One host synchronisation per call.
        memory_budget: bytes for tiles and scratch beyond inputs, outputs, gradients and one fp32 accumulator of the
            weight's gradient. None is 256 MiB on CPU, 1.5 GiB on CUDA.
        pack: gather the unmasked tokens first (one host synchronisation). False computes all and selects.
        precision: ``"tf32"`` allows TF32 products for fp32 inputs on CUDA; None ignores the global switches.
        impl: ``"auto"`` (Triton row kernels on CUDA, the compiled ones on CPU where they are built, else PyTorch's),
            ``"torch"``, ``"triton"``, ``"native"`` or ``"reference"`` (materialises the logits).

    Returns:
        `TokenDivergence` of (N,) tensors: fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: an argument that does not fit; the message names it, its value and what was expected.
        RuntimeError: an implementation asked for by name that cannot run.

    The gradient and the statistics are derived in the op's README. Objective: SDFT, arXiv 2601.19897.
    """
    tensors = Tensors(
        student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target, mask
    )
    options = _options(
        tensors, jsd_alpha, temperature, student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap,
        memory_budget, pack, precision, vocab_group, impl,
    )  # fmt: skip
    _check(tensors, options)
    names = _output_names(outputs, target is not None, jsd_alpha is not None)
    if options.impl == "reference":
        tokens = _reference(tensors, options)
        return TokenDivergence(**{name: getattr(tokens, name) for name in names})
    values = TokensFunction.apply(*tensors[:3], tensors[3:], options, names, torch.is_grad_enabled())
    return TokenDivergence(**dict(zip(names, values, strict=True)))


def linear_divergence_loss(
    student_input: Tensor,  # (N, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor,  # (N, H_t)
    teacher_weight: Tensor,  # (V, H_t)
    target: Tensor | None = None,  # (N,)
    *,
    token_loss: AffineTokenLoss | TokenLoss | None = None,
    mask: Tensor | None = None,  # (N,)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    jsd_alpha: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_group: Any = None,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, TokenDivergence]:
    """The sum over tokens of a token loss, with value and gradient at 4 GEMMs (3 with a frozen head, 2 without grad).

    Args:
        token_loss: None is the mean over the unmasked tokens of KL(p_t || p_s), SDFT's default. A mean leaves out the
            tokens whose target is -100, as `cross_entropy` does with its `ignore_index`: they count as masked. With
            weights of your own such a token stays, without a log-probability. An `AffineTokenLoss` (or
            `sdft_token_loss`) is data. A callable ``token_loss(tokens, index) -> (C,)`` gets the numbers of one
            chunk, (C,) each, and their positions in the caller's order, (C,) int64; it must be elementwise over tokens
            (``SDFT_KERNELS_DEBUG=1`` checks) and must not use a tensor that requires grad (checked). Under
            `torch.compile` it breaks the graph once; an affine loss does not.
        jsd_alpha: of the JSD in `tokens` and for callables; an affine loss carries its own, which this must equal.

    The other arguments are those of `linear_divergence`.

    Returns:
        The loss, a 0-d tensor in fp32 (fp64 for fp64 inputs), differentiable in `student_input`, `student_weight` and
        `student_bias`, once; and the detached per-token numbers.

    Raises:
        ValueError, RuntimeError: as `linear_divergence`.
    """
    tensors = Tensors(
        student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target, mask
    )
    if token_loss is None:
        token_loss = sdft_token_loss()
    if isinstance(token_loss, AffineTokenLoss):
        jsd_alpha = _merge_alpha(token_loss, jsd_alpha)
    elif not callable(token_loss):
        raise ValueError(f"token_loss must be an AffineTokenLoss or a callable, got {type(token_loss).__name__}")
    options = _options(
        tensors, jsd_alpha, temperature, student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap,
        memory_budget, pack, precision, vocab_group, impl,
    )  # fmt: skip
    _check(tensors, options)
    if isinstance(token_loss, AffineTokenLoss) and token_loss.mean:
        tensors, options = _without_absent(tensors, options)
    resolved = _resolve_loss(token_loss, tensors, options)
    names = available_fields(target is not None, jsd_alpha is not None)
    if options.impl == "reference":
        return _reference_loss(tensors, options, resolved)
    apply = LossFunction.apply if isinstance(resolved, Affine) else _apply_outside_the_graph
    loss, tokens = apply(*tensors[:3], tensors[3:], options, resolved, debug_enabled(), torch.is_grad_enabled())
    return loss, TokenDivergence(**{name: tokens[i] for i, name in enumerate(TokenDivergence._fields) if name in names})


def _apply_outside_the_graph(*arguments: Any) -> tuple[Tensor, Tensor]:
    """One graph break, where tracing the driver's loop would break it at every chunk and unroll the rest."""
    apply = LossFunction.apply
    if "torch._dynamo" in sys.modules:  # else nothing is being compiled, and importing it takes 2 s
        apply = torch.compiler.disable(apply)
    return apply(*arguments)  # type: ignore[no-any-return]


# What `torch.compiler.disable` sets, without the import that its use as a decorator costs everybody.
_apply_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]
_apply_outside_the_graph._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "a callable token_loss runs between two row kernels of each chunk; an AffineTokenLoss does not break the graph"
)


def _merge_alpha(token_loss: AffineTokenLoss, jsd_alpha: float | None) -> float | None:
    """The affine loss's alpha, where its JSD is used; never one that disagrees with the caller's."""
    if "jsd" not in token_loss.weights():
        return jsd_alpha
    if jsd_alpha is not None and jsd_alpha != token_loss.alpha:
        raise ValueError(f"jsd_alpha={jsd_alpha} disagrees with token_loss.alpha={token_loss.alpha}")
    return token_loss.alpha


def _without_absent(t: Tensors, o: Options) -> tuple[Tensors, Options]:
    """A mean leaves out the tokens whose target is absent: they count as masked."""
    if t.target is None:
        return t, o
    present = t.target != ABSENT_TARGET
    if t.mask is not None:
        return t._replace(mask=t.mask & present), o
    if not values_are_visible(t.target):
        # Packing would wait for the device, which a call without a mask does not (a CUDA graph captures it).
        return t._replace(mask=present), o._replace(pack=False)
    return (t, o) if present.all() else (t._replace(mask=present), o)


def _resolve_loss(token_loss: AffineTokenLoss | TokenLoss, t: Tensors, o: Options) -> Affine | TokenLoss:
    """An affine loss with its weights as (N,) tensors; a callable as it is."""
    if not isinstance(token_loss, AffineTokenLoss):
        return token_loss
    if token_loss.needs_target and t.target is None:
        raise ValueError("token_loss uses student_logprob or an importance ratio: target is needed, got None")
    count = t.student_input.shape[0]
    like = t.student_input.new_empty(0, dtype=accumulate_dtype(o.operand_dtype))
    old = token_loss.old_logprob
    if old is not None:
        if old.shape != (count,):
            raise ValueError(f"token_loss.old_logprob must be ({count},), got {tuple(old.shape)}")
        old = old.to(like)
    return Affine(token_loss.expand(count, t.mask, like), old, token_loss.importance_clip)


def _output_names(outputs: tuple[str, ...] | None, has_target: bool, has_jsd: bool) -> tuple[str, ...]:
    possible = available_fields(has_target, has_jsd)
    if outputs is None:
        return possible
    for name in outputs:
        if name not in TokenDivergence._fields:
            raise ValueError(f"outputs names {name!r}; the numbers are {TokenDivergence._fields}")
        if name not in possible:
            missing = "target" if name in NEED_TARGET else "jsd_alpha"
            raise ValueError(f"outputs asks for {name!r}, which needs {missing}")
    return tuple(name for name in possible if name in outputs)


def _reference(t: Tensors, o: Options) -> TokenDivergence:
    student_transform, teacher_transform = o.transforms()
    return linear_divergence_reference(
        *(t.student_input, t.student_weight, t.teacher_input, t.teacher_weight, t.target),
        mask=t.mask,
        student_bias=t.student_bias,
        teacher_bias=t.teacher_bias,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        jsd_alpha=o.jsd_alpha,
    )


def _reference_loss(t: Tensors, o: Options, token_loss: Affine | TokenLoss) -> tuple[Tensor, TokenDivergence]:
    every = _reference(t, o)
    index = torch.arange(t.student_input.shape[0], dtype=torch.int64, device=t.student_input.device)
    if t.mask is not None:
        index = index[t.mask]
    tokens = every.apply(lambda f: f[index])
    if isinstance(token_loss, Affine):
        loss = torch.zeros_like(tokens.kl_teacher_student)
        for name, weight in token_loss.weights.items():
            used = weight[index] != 0
            loss = loss + weight[index] * getattr(tokens, name).where(used, 0.0)
        if token_loss.old_logprob is not None and tokens.student_logprob is not None:
            gap = tokens.student_logprob.detach() - token_loss.old_logprob[index]
            loss = loss * gap.clamp(-20, 20).exp().clamp(max=token_loss.importance_clip)
    else:
        loss = token_loss(tokens, index)
    return loss.sum(), every.apply(torch.Tensor.detach)


def _options(
    t: Tensors,
    jsd_alpha: float | None,
    temperature: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    memory_budget: int | None,
    pack: bool,
    precision: str | None,
    vocab_group: Any,
    impl: str,
) -> Options:
    if jsd_alpha is not None and not 0 <= jsd_alpha <= 1:
        raise ValueError(f"jsd_alpha must be within [0, 1], got {jsd_alpha}")
    positive = dict(
        temperature=temperature, student_logit_scale=student_logit_scale, teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    check_positive(positive)
    check_precision(precision, t.student_input)
    operand = operand_dtype(t.student_input)
    impl = resolve(impl, "linear_divergence", device=t.student_input.device, dtype=accumulate_dtype(operand))
    if vocab_group is not None and not hasattr(vocab_group, "group_name"):
        raise ValueError(f"vocab_group must be a torch.distributed process group, got {type(vocab_group).__name__}")
    if vocab_group is not None and impl == "reference":
        raise ValueError("vocab_group: impl='reference' needs the whole heads; gather them, or use impl='auto'")
    return Options(
        jsd_alpha, float(temperature), float(student_logit_scale), float(teacher_logit_scale),
        student_softcap, teacher_softcap, operand, memory_budget, pack, precision,
        impl, None if vocab_group is None else vocab_group.group_name,
    )  # fmt: skip


def _check(t: Tensors, o: Options) -> None:
    """Shapes, dtypes, devices, and who may require grad."""
    tensors = t._asdict()
    check_tensors({name: value for name, value in tensors.items() if value is not None})
    for name in ("student_weight", "teacher_weight"):
        check_weight(name, tensors[name])
    matrices = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    check_matrices({name: tensors[name] for name in matrices})
    count, vocabulary = t.student_input.shape[0], t.student_weight.shape[0]
    expected: dict[str, tuple[int, ...]] = dict(
        student_weight=(vocabulary, t.student_input.shape[1]),
        teacher_input=(count, t.teacher_input.shape[1]),
        teacher_weight=(vocabulary, t.teacher_input.shape[1]),
        student_bias=(vocabulary,),
        teacher_bias=(vocabulary,),
        target=(count,),
        mask=(count,),
    )
    check_shapes(tensors, expected, t.student_input, "student_input")
    check_index_dtypes(t.target, t.mask)
    check_float_dtypes({name: tensors[name] for name in Tensors._fields[:6]}, t.student_input, "student_input")
    check_teacher_grad(
        t.teacher_input,
        {"teacher_weight": (t.teacher_weight, t.student_weight), "teacher_bias": (t.teacher_bias, t.student_bias)},
    )
    if o.vocab_group is None:  # else only the driver knows the whole vocabulary
        check_target_range(t.target, t.mask, vocabulary)
