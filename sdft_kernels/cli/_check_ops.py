"""The ops of ``sdft-kernels check``: each runs every mode of its own on one scenario and returns numbers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdft_kernels.testing import DivergenceInputs

Numbers = dict[str, Tensor]

# Support, what becomes of the rest, alpha: TRL's default, SDPO's bucket, both models' tokens, verl's cached teacher
# and the caller's own ids. Together they take every path of the op.
TOPK_MODES = (
    ("student", "renormalize", 0.5),
    ("student", "bucket", 0.3),
    ("union", "renormalize", 1.0),
    ("cached", "drop", 0.0),
    ("given", "renormalize", 0.5),
)
TOPK = 20


@dataclass(frozen=True)
class Op:
    """An op under check.

    Attributes:
        name: in the table.
        dispatched: its name in the table of implementations.
        run: ``(inputs, impl, options, found) -> numbers``; options are those of `linear_divergence`; `found` holds the
            numbers of the implementation under check, None in its own run.
    """

    name: str
    dispatched: str
    run: Callable[[DivergenceInputs, str, dict[str, Any], Numbers | None], Numbers]


def all_ops() -> list[Op]:
    """Every op over an LM head."""
    return [
        Op("linear_divergence", "linear_divergence", _tokens),
        Op("linear_divergence_loss", "linear_divergence", _loss),
        Op("linear_topk_divergence", "linear_topk_divergence", _topk),
        Op("linear_token_logprob", "linear_token_logprob", _logprob),
    ]


def _tokens(inputs: DivergenceInputs, impl: str, options: dict[str, Any], found: Numbers | None) -> Numbers:
    from sdft_kernels.testing import random_upstream, run_divergence

    upstream = random_upstream(inputs.student_input.shape[0], "jsd_alpha" in options)
    return run_divergence(inputs, impl, upstream, **options)


def _loss(inputs: DivergenceInputs, impl: str, options: dict[str, Any], found: Numbers | None) -> Numbers:
    from sdft_kernels import AffineTokenLoss
    from sdft_kernels.testing import run_divergence_loss

    alpha = options.get("jsd_alpha")
    weights: dict[str, Any] = {"kl_teacher_student": 1.0, "kl_student_teacher": 0.5, "student_logprob": -0.1}
    weights |= {"student_entropy": -0.01} if alpha is None else {"jsd": 0.7, "alpha": alpha}
    return run_divergence_loss(inputs, impl, AffineTokenLoss(**weights), **options)


def _topk(inputs: DivergenceInputs, impl: str, options: dict[str, Any], found: Numbers | None) -> Numbers:
    """On the ids of `found`: fp32 and fp64 may break a near tie at the k-th place differently."""
    import torch

    from sdft_kernels.testing import on_the_same_ids, restrict_support, run_topk_divergence

    of_op = {name: value for name, value in options.items() if name != "jsd_alpha"}
    numbers: Numbers = {}
    for support, tail, alpha in TOPK_MODES:
        prefix = f"{support}/{tail} "
        arguments, mode = restrict_support(inputs.tensors(), support, of_op, TOPK, cache_dtype=torch.float32)
        mode |= {"tail": tail, "alpha": alpha}
        if found is not None:
            of_mode = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
            mode = on_the_same_ids(mode, of_mode)
        run = run_topk_divergence(arguments, impl, **mode)
        numbers |= {prefix + name: value for name, value in run.items()}
    return numbers


def _logprob(inputs: DivergenceInputs, impl: str, options: dict[str, Any], found: Numbers | None) -> Numbers:
    """Trained head with all numbers, and the path that keeps dX from forward: frozen head, one number."""
    from sdft_kernels.testing import random_logprob_upstream, run_token_logprob

    upstream = random_logprob_upstream(inputs.student_input.shape[0])
    names = {"temperature": "temperature", "student_logit_scale": "logit_scale", "student_softcap": "softcap"}
    of_op = {name: options[given] for given, name in names.items() if given in options}
    numbers = run_token_logprob(inputs, impl, upstream, **of_op)
    frozen = run_token_logprob(inputs, impl, upstream, ("input",), outputs=("logprob",), **of_op)
    return numbers | {f"frozen head {name}": value for name, value in frozen.items()}
