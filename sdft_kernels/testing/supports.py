"""Calls of op 2 on every kind of support, made from one set of inputs; and the same call on ids that a run found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..topk_divergence import TopkDivergence
from ..topk_divergence.fields import PADDING, SUPPORTS

_OF_TEACHER_HEAD = ("teacher_logit_scale", "teacher_softcap")


def teacher_logprobs(arguments: dict[str, Tensor | None], options: dict[str, Any] | None = None) -> Tensor:
    """log p_t (N, V) in fp64, as `linear_topk_divergence` defines it for these arguments and options."""
    options = options or {}
    hidden, weight, bias = (arguments.get(f"teacher_{name}") for name in ("input", "weight", "bias"))
    assert hidden is not None and weight is not None
    raw = hidden.double() @ weight.double().t()
    raw = raw if bias is None else raw + bias.double()
    z = raw * options.get("teacher_logit_scale", 1.0)
    if options.get("teacher_softcap"):
        z = options["teacher_softcap"] * torch.tanh(z / options["teacher_softcap"])
    z = z.masked_fill(raw == -torch.inf, -torch.inf)  # a masked entry, which a softcap would make finite
    return (z / options.get("temperature", 1.0)).log_softmax(-1)


def restrict_support(
    arguments: dict[str, Tensor | None],
    support: str,
    options: dict[str, Any] | None = None,
    k: int = 7,
    seed: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Arguments and options of a call of `linear_topk_divergence` with `k` entries on `support`.

    Args:
        arguments: the tensors of `make_divergence_inputs(...)`, of at least 6 tokens and `k` >= 4 where ids are made.
        support: one of the op's names; ``"given"``: random ids, the two most likely tokens among them, with absent
            entries and a token without any; ``"cached"``, ``"cached-intersection"``: the teacher's own `k` in place of
            its head.
        cache_dtype: of a cached teacher's log-probabilities; None is that of the inputs.
    """
    options = dict(options or {})
    if support in SUPPORTS:
        return arguments, options | {"support": support, "k": k}
    hidden, weight = arguments["student_input"], arguments["student_weight"]
    assert hidden is not None and weight is not None
    if support == "given":
        g = torch.Generator().manual_seed(seed)
        drawn = torch.stack([torch.randperm(weight.shape[0], generator=g)[:k] for _ in range(hidden.shape[0])])
        ids = drawn.to(hidden.device)
        likely = (hidden.double() @ weight.double().t()).topk(2).indices
        ids[:, :2] = torch.where((ids[:, 2:, None] == likely[:, None]).any(1), ids[:, :2], likely)
        ids[3, 2:4] = PADDING
        ids[5] = PADDING
        return arguments, options | {"support": ids}
    if support not in ("cached", "cached-intersection"):
        raise ValueError(f"support must be one of {SUPPORTS}, given, cached or cached-intersection, got {support!r}")
    logprobs, ids = teacher_logprobs(arguments, options).topk(k)
    ids[4, -1] = PADDING
    if support == "cached-intersection":
        options["support"] = "intersection"
    kept = {name: value for name, value in arguments.items() if not name.startswith("teacher_")}
    kept_options = {name: value for name, value in options.items() if name not in _OF_TEACHER_HEAD}
    return kept, kept_options | {"teacher_topk": (ids, logprobs.to(cache_dtype or hidden.dtype))}


def on_the_same_ids(options: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    """`options` with the ids and the outputs of a run whose numbers are `found`.

    fp32 and fp64 may take different tokens where two logits at the k-th place nearly tie: neither is wrong, and their
    divergences cannot be compared.
    """
    options = options | {"outputs": tuple(name for name in TopkDivergence._fields if name in found)}
    return options if "teacher_topk" in options else options | {"k": None, "support": found["ids"]}
