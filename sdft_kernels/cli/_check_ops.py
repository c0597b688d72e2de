"""The ops of ``sdft-kernels check``: each runs every mode of its own on one scenario and returns numbers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdft_kernels.cli.env import OPS
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
    return [Op(name, OPS[name], run) for name, run in RUNS.items()]


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


RUNS = {
    "linear_divergence": _tokens,
    "linear_divergence_loss": _loss,
    "linear_topk_divergence": _topk,
    "linear_token_logprob": _logprob,
}

ATTENTION_CASES: dict[str, dict[str, Any]] = {"tree": {}, "every option": {"softcap": 5.0, "window": 30}}


def attention(impl: str, case: str, dtype: torch.dtype, device: str) -> tuple[Numbers, Numbers, Numbers]:
    """Values and gradients of `shared_prefix_attention`: of `impl`, of eager PyTorch in `dtype`, and in fp64."""
    from sdft_kernels import PrefixTree, shared_prefix_attention

    tree = PrefixTree([40, 5, 9, 1, 17], [-1, 0, 0, 2, -1])
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    drawn = {
        name: torch.randn(tree.tokens, count, 32, generator=generator, dtype=torch.float32)
        for name, count in heads.items()
    }
    if case == "every option":
        drawn["sinks"] = torch.randn(heads["query"], generator=generator, dtype=torch.float32)
    upstream = torch.randn(tree.tokens, heads["query"], 32, generator=generator, dtype=torch.float32).to(device, dtype)
    inputs = {name: tensor.to(device, dtype) for name, tensor in drawn.items()}

    def run(kind: str, to: torch.dtype) -> Numbers:
        leaves = {name: tensor.detach().to(to).requires_grad_() for name, tensor in inputs.items()}
        options: dict[str, Any] = leaves | ATTENTION_CASES[case]
        out, lse = shared_prefix_attention(**options, tree=tree, return_lse=True, impl=kind)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
        gradients = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        # In bf16 PyTorch's kernel, which the composition calls, sums rounded weights (6e-6): fp32 shows a wrong lse.
        return {"out": out.detach(), **({"lse": lse.detach()} if dtype == torch.float32 else {}), **gradients}

    return run(impl, dtype), run("reference", dtype), run("reference", torch.float64)
