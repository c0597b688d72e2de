"""Random calls of the ops over an LM head, on tensors of any strides, beside the dense computation of their numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from fuzz_budget import over
from torch import Tensor

from sdft_kernels.divergence import AffineTokenLoss, linear_divergence, linear_divergence_loss
from sdft_kernels.testing import KINDS, make_divergence_inputs
from sdft_kernels.token_logprob import linear_token_logprob
from sdft_kernels.topk_divergence import linear_topk_divergence

OPS = ("tokens", "loss", "topk", "logprob")
STRIDES = ("contiguous", "padded", "transposed", "stepped", "offset")
DTYPES = ("fp32", "fp32", "bf16", "autocast")  # fp64 is what the truth is computed in
FEW = 8  # tokens
WEIGHTED = ("kl_teacher_student", "kl_student_teacher", "jsd", "student_logprob", "student_entropy")


@dataclasses.dataclass(frozen=True)
class OpCase:
    """Everything that a call depends on; its repr is what a failure prints."""

    seed: int
    op: str
    dtype: str
    kind: str
    tokens: int
    vocabulary: int
    hidden: int
    teacher_hidden: int
    one_head: bool
    bias: str
    mask: str
    strides: tuple[str, ...]
    trained: tuple[str, ...]
    budget: str
    options: dict[str, Any]


def draw(seed: int) -> OpCase:
    """The call of a seed."""
    r = random.Random(seed)
    op, one_head = r.choice(OPS), r.random() < 0.3
    hidden = r.choice((16, 31, 33, 64))
    alpha = r.choice((0.0, 1.0, 0.5, 0.13))
    sides = ("student", "teacher") if op != "logprob" else ("student",)
    softcap = r.choice((None, None, 20.0))
    options: dict[str, Any] = {f"{side}_logit_scale": r.choice((1.0, 1.0, 0.3)) for side in sides}
    options |= {f"{side}_softcap": softcap for side in sides}
    options |= dict(temperature=r.choice((1.0, 0.7, 2.0)), pack=r.random() < 0.7)
    dtype = r.choice(DTYPES)
    # The reference rounds softcaps and softmaxes to bf16 where its inputs are: it is the eager run, not held to it.
    options["impl"] = r.choice(("auto", "auto", "torch", *(["reference"] if dtype == "fp32" else [])))
    if op == "topk":
        options |= dict(support=r.choice(("student", "teacher", "union", "intersection")), k=r.choice((1, 4)))
        options |= dict(tail=r.choice(("renormalize", "bucket", "drop")), alpha=alpha)
    elif op != "logprob":
        options["jsd_alpha"] = alpha
    trained = r.choice((("input", "weight", "bias"), ("input",), ("weight",), ("input", "bias")))
    return OpCase(
        seed=seed,
        op=op,
        dtype=dtype,
        kind=r.choice(tuple(KINDS)),
        tokens=r.choice((1, 2, 7, 33)),
        vocabulary=r.choice((61, 203, 1001, 1003)),
        hidden=hidden,
        teacher_hidden=hidden if one_head else r.choice((hidden, 17, 64)),
        one_head=one_head,
        bias=r.choice(("none", "finite", "masked")),
        mask=r.choice(("none", "some", "some", "all")),
        strides=tuple(r.choice(STRIDES) for _ in range(6)),
        trained=trained,
        budget=r.choice(("none", "none", "least", "few")),
        options=options,
    )


def tensors(case: OpCase) -> dict[str, Tensor | None]:
    """The arguments of a call by name; where a mask keeps nothing, it is all False."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    made = make_divergence_inputs(
        case.kind, case.tokens, case.vocabulary, case.hidden, case.teacher_hidden, dtype, bias=case.bias != "none",
        mask=case.mask == "some", seed=case.seed,
    ).tensors()  # fmt: skip
    if case.mask == "all":
        made["mask"] = torch.zeros(case.tokens, dtype=torch.bool)
    if case.one_head:
        made["teacher_weight"] = made["student_weight"]
        made["teacher_bias"] = made["student_bias"]
    if case.bias == "masked":
        _mask_vocabulary(made, case)
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight", "student_bias", "target")
    for name, kind in zip(names, case.strides, strict=True):
        made[name] = made[name] if made[name] is None else strided(made[name], kind)
    if case.one_head:
        made["teacher_weight"], made["teacher_bias"] = made["student_weight"], made["student_bias"]
    return made


def _mask_vocabulary(made: dict[str, Tensor | None], case: OpCase) -> None:
    """-inf for the same few entries on both sides, none of them a target."""
    targets = set(made["target"].tolist())
    free = [v for v in range(case.vocabulary) if v not in targets]
    chosen = random.Random(case.seed).sample(free, min(3, len(free), case.vocabulary - 4))
    for side in ("student", "teacher"):
        made[f"{side}_bias"] = made[f"{side}_bias"].index_fill(0, torch.tensor(chosen, dtype=torch.int64), -torch.inf)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in other memory; what lies between them is NaN, or a token out of range."""
    odd = float("nan") if x.is_floating_point() else 10**6
    if kind == "padded" and x.dim() == 2:
        wide = torch.full((x.shape[0], x.shape[1] + 3), odd, dtype=x.dtype)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    if kind == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if kind == "stepped":
        long = torch.full((2 * x.shape[0], *x.shape[1:]), odd, dtype=x.dtype)
        long[::2] = x
        return long[::2]
    if kind == "offset":
        flat = torch.full((x.numel() + 1,), odd, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x.clone()


# The dense computation


def _log_softmax(made: dict[str, Any], side: str, o: dict[str, Any]) -> Tensor:
    logits = torch.nn.functional.linear(made[f"{side}_input"], made[f"{side}_weight"], made[f"{side}_bias"])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    z = wide * o.get(f"{side}_logit_scale", 1.0)
    if o.get(f"{side}_softcap"):
        z = o[f"{side}_softcap"] * (z / o[f"{side}_softcap"]).tanh()
    return (z.masked_fill(wide == -torch.inf, -1e30) / o["temperature"]).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities; what has none on either side (-1e30) adds 0."""
    return (p.exp() * (p - q).where(p > -1e29, 0.0)).sum(-1)


def _jsd(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    if alpha in (0.0, 1.0):
        return _kl(log_t, log_s) if alpha == 0.0 else _kl(log_s, log_t)
    m = torch.logaddexp(log_s + math.log(1 - alpha), log_t + math.log(alpha))
    return alpha * _kl(log_t, m) + (1 - alpha) * _kl(log_s, m)


def numbers(case: OpCase, made: dict[str, Any], ids: Tensor | None) -> dict[str, Tensor]:
    """What the op returns, (N,) each, of the tokens that the mask keeps; others 0. `ids` is the support, of topk."""
    o, mask, target = case.options, made["mask"], made["target"]
    log_s = _log_softmax(made, "student", o)
    present = target != -100
    chosen = log_s.gather(1, target.where(present, 0)[:, None])[:, 0].where(present, 0.0)
    entropy = -(log_s.exp() * log_s.where(log_s > -1e29, 0.0)).sum(-1)
    if case.op == "logprob":
        result = {"logprob": chosen, "entropy": entropy}
    else:
        with torch.no_grad():
            log_t = _log_softmax(made, "teacher", o)
        result = {"student_logprob": chosen}
        if case.op == "topk":
            result["divergence"] = _on_support(log_s, log_t, ids, o["tail"], o["alpha"])
        else:
            result |= {
                "kl_teacher_student": _kl(log_t, log_s),
                "kl_student_teacher": _kl(log_s, log_t),
                "jsd": _jsd(log_s, log_t, o["jsd_alpha"]),
                "student_entropy": entropy,
                "teacher_logprob": log_t.gather(1, target.where(present, 0)[:, None])[:, 0].where(present, 0.0),
                "teacher_entropy": -(log_t.exp() * log_t.where(log_t > -1e29, 0.0)).sum(-1),
            }
    return result if mask is None else {name: value.where(mask, 0.0) for name, value in result.items()}


def _on_support(log_s: Tensor, log_t: Tensor, ids: Tensor, tail: str, alpha: float) -> Tensor:
    """Row by row, over the entries that there are."""
    rows = []
    for n in range(len(ids)):
        own = ids[n][ids[n] >= 0]
        a, b = log_s[n, own], log_t[n, own]
        if not len(own):
            rows.append(log_s.new_zeros(()))
            continue
        if tail == "renormalize":
            a, b = a - a.logsumexp(0), b - b.logsumexp(0)
        if tail == "bucket":
            a, b = (torch.cat([x, (-torch.expm1(x.logsumexp(0).clamp(max=-1e-7))).log()[None]]) for x in (a, b))
        rows.append(_jsd(a, b, alpha))
    return torch.stack(rows)


# A call and its check


@dataclasses.dataclass
class Result:
    """Numbers and gradients of one computation; the total is the sum of `weights` times the numbers."""

    total: Tensor
    numbers: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _weights(case: OpCase) -> dict[str, Tensor]:
    """Of every differentiable number, fp64 (N,)."""
    g = torch.Generator().manual_seed(case.seed)
    names = {"topk": ("divergence",), "logprob": ("logprob", "entropy")}.get(case.op, WEIGHTED)
    return {name: torch.randn(case.tokens, generator=g, dtype=torch.float64) for name in names}


def _with_leaves(
    case: OpCase, made: dict[str, Tensor | None], dtype: torch.dtype | None
) -> tuple[Any, dict[str, Tensor]]:
    made = {
        name: x.detach() if x is None or dtype is None or not x.is_floating_point() else x.detach().to(dtype)
        for name, x in made.items()
        if x is not None
    } | {name: None for name, x in made.items() if x is None}
    if case.one_head:
        made["teacher_weight"], made["teacher_bias"] = made["student_weight"], made["student_bias"]
    leaves = {f"student_{n}": made[f"student_{n}"] for n in case.trained if made[f"student_{n}"] is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return made, leaves


def dense(case: OpCase, made: dict[str, Tensor | None], dtype: torch.dtype | None, ids: Tensor | None) -> Result:
    """The dense computation, in fp64 or (None) in the case's own dtype."""
    made, leaves = _with_leaves(case, made, dtype)
    with _autocast(case, dtype is None):
        found = numbers(case, made, ids)
    total = sum((w.to(found[name]) * found[name]).sum() for name, w in _weights(case).items())
    return _result(total, found, leaves)


def call(case: OpCase, made: dict[str, Tensor | None]) -> tuple[Result, Tensor | None]:
    """The op on these tensors, and the support that it took (topk)."""
    made, leaves = _with_leaves(case, made, None)
    run = {"tokens": _tokens, "loss": _loss, "topk": _topk, "logprob": _logprob}[case.op]
    with _autocast(case, True):
        budget = None if case.budget == "none" else _least_budget(lambda b: run(case, made, b))
        if case.budget == "few":
            budget += case.seed % 5000
        total, found = run(case, made, budget)
    ids = found.pop("ids", None)
    return _result(total, found, leaves), ids


def _result(total: Tensor, found: dict[str, Tensor], leaves: dict[str, Tensor]) -> Result:
    given: Any = [None] * len(leaves)
    if leaves and total.requires_grad:
        given = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), given, strict=True)}
    return Result(total.detach(), {n: v.detach() for n, v in found.items()}, gradients)


def _summed(case: OpCase, found: dict[str, Tensor]) -> Tensor:
    return sum((w.to(found[name]) * found[name]).sum() for name, w in _weights(case).items())


def _named(tokens: Any) -> dict[str, Tensor]:
    return {name: value for name, value in tokens._asdict().items() if value is not None}


def _tokens(case: OpCase, made: dict[str, Any], budget: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    found = _named(linear_divergence(**made, memory_budget=budget, **case.options))
    return _summed(case, found), found


def _loss(case: OpCase, made: dict[str, Any], budget: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    weights = _weights(case)
    loss: Any = AffineTokenLoss(**weights, alpha=case.options["jsd_alpha"])
    if case.seed % 3 == 0:  # the same as a callable
        loss = lambda tokens, index: sum(w.to(tokens.jsd)[index] * getattr(tokens, n) for n, w in weights.items())  # noqa: E731
    total, tokens = linear_divergence_loss(**made, token_loss=loss, memory_budget=budget, **case.options)
    return total, _named(tokens)


def _topk(case: OpCase, made: dict[str, Any], budget: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    found = _named(linear_topk_divergence(**made, memory_budget=budget, **case.options))
    return _summed(case, found), found


def _logprob(case: OpCase, made: dict[str, Any], budget: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    own = {name.removeprefix("student_"): x for name, x in made.items() if not name.startswith("teacher_")}
    options = {name.removeprefix("student_"): value for name, value in case.options.items()}
    found = _named(linear_token_logprob(**own, memory_budget=budget, **options))
    return _summed(case, found), found


def _least_budget(run: Callable[[int], Any]) -> int:
    """The smallest memory budget that a call takes, as its error says: chunks of one token."""
    try:
        run(1)
    except ValueError as error:
        match = re.search(r"needs at least (\d+)", str(error))
        assert match is not None, error
        return int(match[1])
    return 1


def _autocast(case: OpCase, on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on and case.dtype == "autocast" else contextlib.nullcontext()


def check(case: OpCase) -> dict[str, float]:
    """Run a case; error over budget, by what is compared.

    Raises:
        AssertionError: naming the number and the case, where one is above 1.
    """
    made = tensors(case)
    ours, ids = call(case, made)
    truth = dense(case, made, torch.float64, ids)
    eager = [dense(case, made, None, ids)]
    ratios = _ratios(case, made, ours, truth, eager)
    if max(ratios.values()) > 1:  # one eager run may be lucky
        eager += [dense(case, _jittered(case, made, i), None, ids) for i in range(7)]
        eager += [_by_rows(case, made, ids)]
        ratios = _ratios(case, made, ours, truth, eager)
    worst = max(ratios, key=lambda name: ratios[name])
    assert ratios[worst] <= 1, f"the error of {worst} is {ratios[worst]:.3g} times its budget; {case}"
    return ratios


def _by_rows(case: OpCase, made: dict[str, Tensor | None], ids: Tensor | None) -> Result:
    """The eager run token by token: products of one row add in another order, as those of a small chunk do."""
    whole: Result | None = None
    for n in range(case.tokens):
        rows = torch.arange(case.tokens) == n
        kept = rows if made["mask"] is None else rows & made["mask"]
        part = dense(case, made | {"mask": kept}, None, ids)
        if whole is None:
            whole = part
            continue
        whole.numbers = {name: value + part.numbers[name] for name, value in whole.numbers.items()}
        whole.gradients = {name: value + part.gradients[name] for name, value in whole.gradients.items()}
    assert whole is not None
    return whole


def _jittered(case: OpCase, made: dict[str, Tensor | None], i: int) -> dict[str, Tensor | None]:
    """Every floating input moved by up to an ulp of the dtype that it is multiplied in (half of one rounds away)."""
    g = torch.Generator().manual_seed(case.seed * 100 + i)
    result = {}
    for name, x in made.items():
        if x is not None and x.is_floating_point():
            eps = torch.finfo(torch.bfloat16 if case.dtype == "autocast" else x.dtype).eps
            x = (x.double() * (1 + eps * (2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1))).to(x.dtype)
        result[name] = x
    return result


def _ratios(case: OpCase, made: dict[str, Any], ours: Result, truth: Result, eager: list[Result]) -> dict[str, float]:
    ulp = torch.finfo(ours.total.dtype).eps
    weights = _weights(case)
    # The loss is the sum of the numbers that came with it.
    terms = torch.cat([w * ours.numbers[n].double() for n, w in weights.items()])
    ratios = {"total": over(ours.total, terms.sum(), [terms.float().sum()], 2 * ulp * terms.abs().sum().item())}
    kept = case.tokens if made["mask"] is None else int(made["mask"].sum())
    # And where eager runs have few numbers to be unlucky in, an ulp of the largest logit.
    lost = 1 + (KINDS[case.kind][0] / case.options["temperature"] if kept < FEW else 0)
    for name, exact in truth.numbers.items():
        if name in ours.numbers:
            # Each contains the logarithm of a sum of at least 1, which has an ulp of 1 to lose.
            floor = ulp * (exact.norm().item() + kept**0.5 * lost)
            ratios[name] = over(ours.numbers[name], exact, [e.numbers[name] for e in eager], floor)
    for name, exact in truth.gradients.items():
        value = ours.gradients[name]
        assert value.dtype == eager[0].gradients[name].dtype, f"the gradient of {name} is {value.dtype}"
        # And so has the softmax that a gradient is a sum with.
        floor = torch.finfo(value.dtype).eps * exact.norm().item() + ulp * lost * _term(case, made, name)
        ratios[f"gradient of {name}"] = over(value, exact, [e.gradients[name] for e in eager], floor)
    return ratios


def _term(case: OpCase, made: dict[str, Any], name: str) -> float:
    """The size of one term of a gradient: a weight, the slope of z, and what stands beside it in the product."""
    slope = case.options["student_logit_scale"] / case.options["temperature"]
    weights = torch.stack(list(_weights(case).values())).norm().item()
    other = {"student_input": "student_weight", "student_weight": "student_input"}.get(name)
    beside = made[other].double().norm(dim=1).max().item() if other else 1.0
    return slope * weights * beside
