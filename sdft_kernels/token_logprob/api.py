"""The contract of op 3: arguments, checks, and which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    check_float_dtypes,
    check_index_dtypes,
    check_matrices,
    check_positive,
    check_precision,
    check_shapes,
    check_target_range,
    check_tensors,
    check_weight,
    operand_dtype,
)
from .._dispatch import resolve
from .fields import FIELDS, TokenLogprob
from .operators import Options, Tensors, TokenLogprobFunction
from .reference import linear_token_logprob_reference


def linear_token_logprob(
    input: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    *,
    mask: Tensor | None = None,  # (N,)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] | None = None,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
    impl: str = "auto",
) -> TokenLogprob:
    """Log-probability of given tokens, entropy and log-sum-exp, from hidden states, without the (N, V) logits.

    z = softcap(logit_scale * (input weight^T + bias)) / temperature; p is the softmax of z. Each number accepts any
    upstream gradient; backward projects the logits again chunk by chunk: 4 GEMMs of 2*N*V*H FLOP in all, 3 with a
    frozen head, 2 with a frozen head and one output (dX is then kept from forward), 1 without grad.

    Args:
        input: (N, H), fp32, bf16 or fp64. Differentiable.
        weight: (V, H), same dtype (under autocast any of these). Differentiable.
        target: (N,) int64, the token whose log-probability is reported; -100 is absent. On CPU (and with
            ``SDFT_KERNELS_DEBUG=1``) an unmasked target out of range raises, on CUDA it gives NaN in that token.
        mask: (N,) bool, False for tokens that are not projected at all: outputs 0, gradients exactly 0.
        bias: (V,). Differentiable. -inf masks a vocabulary entry.
        temperature: divides the logits; all outputs are at this temperature.
        logit_scale: multiplies the raw logits (Cohere; 1/logits_scaling of Granite).
        softcap: cap * tanh(logit / cap) after the scale (Gemma 2).
        outputs: names to return, of ``("logprob", "entropy", "lse")``; None is all. The others are None.
        memory_budget: bytes for the tile and scratch beyond inputs, outputs, gradients and one fp32 accumulator of the
            weight's gradient. None is 256 MiB on CPU, 1.5 GiB on CUDA.
        pack: gather the unmasked tokens first (one host synchronisation). False computes all and selects.
        precision: ``"tf32"`` allows TF32 products for fp32 inputs on CUDA; None ignores the global switches.
        impl: ``"auto"``, ``"torch"`` or ``"reference"`` (materialises the logits).

    Returns:
        `TokenLogprob` of (N,) tensors: fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: an argument that does not fit; the message names it, its value and what was expected.
        RuntimeError: an implementation asked for by name that cannot run.

    The gradient is derived in the op's README. The numbers are those of a policy gradient: log pi(y), H(pi).
    """
    tensors = Tensors(input, weight, bias, target, mask)
    check_positive({"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap})
    _check(tensors)
    check_precision(precision, input)
    options = Options(
        float(temperature), float(logit_scale), softcap, operand_dtype(input), memory_budget, pack, precision
    )
    names = _output_names(outputs)
    if resolve(impl, "linear_token_logprob") == "reference":
        tokens = linear_token_logprob_reference(
            input, weight, target, mask=mask, bias=bias, transform=options.transform()
        )
        return TokenLogprob(**{name: getattr(tokens, name) for name in names})
    values = TokenLogprobFunction.apply(*tensors[:3], tensors[3:], options, names, torch.is_grad_enabled())
    return TokenLogprob(**dict(zip(names, values, strict=True)))


def _output_names(outputs: tuple[str, ...] | None) -> tuple[str, ...]:
    for name in outputs or ():
        if name not in FIELDS:
            raise ValueError(f"outputs names {name!r}; the numbers are {FIELDS}")
    return FIELDS if outputs is None else tuple(name for name in FIELDS if name in outputs)


def _check(t: Tensors) -> None:
    """Shapes, dtypes and devices."""
    tensors = t._asdict()
    optional = ("bias", "mask")
    check_tensors({name: value for name, value in tensors.items() if value is not None or name not in optional})
    check_weight("weight", t.weight)
    check_matrices({"input": t.input, "weight": t.weight})
    count, vocabulary = t.input.shape[0], t.weight.shape[0]
    expected: dict[str, tuple[int, ...]] = dict(
        weight=(vocabulary, t.input.shape[1]), bias=(vocabulary,), target=(count,), mask=(count,)
    )
    check_shapes(tensors, expected, t.input, "input")
    check_index_dtypes(t.target, t.mask)
    check_float_dtypes({name: tensors[name] for name in ("input", "weight", "bias")}, t.input, "input")
    check_target_range(t.target, t.mask, vocabulary)
