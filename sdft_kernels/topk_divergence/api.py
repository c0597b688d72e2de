"""The contract of op 2: arguments, checks, and which implementation runs."""

from __future__ import annotations

import math

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
    check_teacher_grad,
    check_tensors,
    check_weight,
    operand_dtype,
    values_are_visible,
)
from .._dispatch import resolve
from .fields import FIELDS, GIVEN, PADDING, SUPPORTS, TAILS, Restriction, TopkDivergence
from .operators import Options, Tensors, TopkDivergenceFunction
from .reference import linear_topk_divergence_reference


def linear_topk_divergence(
    student_input: Tensor,  # (N, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor | None = None,  # (N, H_t)
    teacher_weight: Tensor | None = None,  # (V, H_t)
    target: Tensor | None = None,  # (N,)
    *,
    k: int | None = None,
    support: str | Tensor | None = None,  # or (N, K)
    tail: str = "renormalize",
    alpha: float = 0.5,
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # (N, K) each
    per_entry_clip: float | None = None,
    mask: Tensor | None = None,  # (N,)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    outputs: tuple[str, ...] | None = None,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
    impl: str = "auto",
) -> TopkDivergence:
    """Per-token divergence between two LM heads on K tokens of the vocabulary, from hidden states.

    z = softcap(scale * (input weight^T + bias)) / temperature on either side; p_s, p_t are the softmaxes of z over the
    whole vocabulary. `alpha` is that of TRL's SDFT (default 0.5): 0 = KL(p_t || p_s), 1 = KL(p_s || p_t), between
    = alpha KL(p_t || m) + (1 - alpha) KL(p_s || m), m = (1 - alpha) p_s + alpha p_t, each over the outcomes that `tail`
    leaves:

    * ``"renormalize"``: the support, both sides renormalised to 1 on it. The log-sum-exps cancel, so the gradient has K
      entries a token: it is found in forward and scaled in backward. One GEMM of 2*N*V*H FLOP to search the student
      (or the teacher), two for a union or an intersection, none for given ids or a cached teacher.
    * ``"bucket"``: the support and one outcome that holds the rest, of at least 1e-7 (TRL, SDPO).
    * ``"drop"``: the support with the raw probabilities p_s, p_t; what is outside is left out. Not a divergence: it can
      be negative, and 0 where p_s is not p_t (verl's top-k forward KL, which verl clamps: ``.clamp_min(0)``).

    The gradient of the last two is dense: 5 GEMMs in all (4 against a cached teacher), 3 (2) with a frozen head, whose
    dX is kept from forward, 2 (1) without grad.

    Args:
        student_input: (N, H), fp32, bf16 or fp64. Differentiable.
        student_weight: (V, H), same dtype (under autocast any of these). Differentiable.
        teacher_input, teacher_weight: (N, H_t), (V, H_t); left out with `teacher_topk`. The teacher gets no gradient:
            teacher_input must not require grad, teacher_weight only if it is the student's weight.
        target: (N,) int64, the token for `student_logprob`; -100 is absent. Range as in `linear_divergence`.
        k: size of the support. None with given ids or a cached teacher, whose K it is.
        support: ``"student"`` or ``"teacher"``: its k most likely tokens; ``"union"``, ``"intersection"`` of both; or
            ids (N, K) int64, distinct in a row, -1 for no entry. None is "student", "teacher" with `teacher_topk`
            (which allows "teacher" and "intersection"). Among equal logits at the k-th place `torch.topk` decides,
            which may differ between devices. The choice carries no gradient.
        tail: see above.
        teacher_topk: a teacher that was run before, ``(ids, logprobs)`` of (N, K): int64, distinct in a row, -1 for no
            entry; log-probabilities over its whole vocabulary at this call's `temperature` (renormalising forgives any
            constant a row). Never differentiable.
        per_entry_clip: at most this much from each outcome's term before the sum, as OPSD does (0.05). For reproduction
            only: terms of a KL have both signs, so the clipped sum can be negative, and where the models disagree the
            gradient can point away from the true one. Safe is a weight per token, which needs nothing of this op:
            ``d = linear_topk_divergence(...).divergence; loss = (d * (tau / d.detach()).clamp(max=1)).sum()``.
        mask: (N,) bool, False for tokens that are not projected at all: outputs 0, gradients exactly 0.
        student_bias: (V,). Differentiable. -inf masks a vocabulary entry.
        teacher_bias: (V,).
        temperature: divides the logits of both sides; no T^2 factor anywhere.
        student_logit_scale, teacher_logit_scale: multiply the raw logits (Cohere; 1/logits_scaling of Granite).
        student_softcap, teacher_softcap: cap * tanh(logit / cap) after the scale (Gemma 2).
        outputs: names to return; None is every number that costs no further GEMM. `student_mass`, `student_logprob` or
            `teacher_mass` by name project that side's whole vocabulary where nothing else does.
        memory_budget: bytes for tiles and scratch beyond inputs, outputs, gradients and one fp32 accumulator of the
            weight's gradient. None is 256 MiB on CPU, 1.5 GiB on CUDA.
        pack: gather the unmasked tokens first (one host synchronisation). False computes all and selects.
        precision: ``"tf32"`` allows TF32 products for fp32 inputs on CUDA; None ignores the global switches.
        impl: ``"auto"``, ``"torch"`` or ``"reference"`` (materialises the logits).

    Returns:
        `TopkDivergence` of (N,) tensors, and ids (N, K). Only `divergence` is differentiable. A support without entries
        has divergence 0; one with entries and no probability NaN, renormalised.

    Raises:
        ValueError: an argument that does not fit; the message names it, its value and what was expected.
        RuntimeError: an implementation asked for by name that cannot run.

    The gradient and what each mode costs are derived in the op's README. Objectives: SDFT in TRL, SDPO, OPSD
    (arXiv 2601.18734), verl.
    """
    ids, logprobs = _pair(teacher_topk)
    given = support if isinstance(support, Tensor) else None
    tensors = Tensors(
        student_input, student_weight, student_bias, target, mask,
        teacher_input, teacher_weight, teacher_bias, ids, logprobs, given,
    )  # fmt: skip
    teachers = {"teacher_logit_scale": teacher_logit_scale, "teacher_softcap": teacher_softcap}
    positive = {"temperature": temperature, "student_logit_scale": student_logit_scale}
    check_positive(positive | {"student_softcap": student_softcap} | teachers)
    _check(tensors, teachers)
    check_precision(precision, student_input)
    restriction = _restriction(tensors, k, support, tail, alpha, per_entry_clip)
    options = Options(
        *restriction, float(temperature), float(student_logit_scale), float(teacher_logit_scale),
        student_softcap, teacher_softcap, operand_dtype(student_input), memory_budget, pack, precision,
    )  # fmt: skip
    names = _output_names(outputs, restriction, tensors)
    if resolve(impl, "linear_topk_divergence") == "reference":
        return _reference(tensors, options, names)
    values = TopkDivergenceFunction.apply(*tensors[:3], tensors[3:], options, names, torch.is_grad_enabled())
    return TopkDivergence(**dict(zip(names, values, strict=True)))


def _pair(teacher_topk: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if teacher_topk is None:
        return None, None
    if not isinstance(teacher_topk, (tuple, list)) or len(teacher_topk) != 2:
        raise ValueError(f"teacher_topk must be (ids, logprobs), got {type(teacher_topk).__name__}")
    for i, value in enumerate(teacher_topk):
        check_tensors({f"teacher_topk[{i}]": value})
    return teacher_topk[0], teacher_topk[1]


def _restriction(
    t: Tensors, k: int | None, support: str | Tensor | None, tail: str, alpha: float, per_entry_clip: float | None
) -> Restriction:
    """The named support and its k, checked against what is there."""
    cached, vocabulary = t.teacher_ids is not None, t.student_weight.shape[0]
    name = GIVEN if isinstance(support, Tensor) else support or ("teacher" if cached else "student")
    if name != GIVEN and name not in SUPPORTS:
        raise ValueError(f"support must be one of {SUPPORTS} or ids (N, K), got {support!r}")
    if cached and name not in ("teacher", "intersection"):
        raise ValueError(
            f"support={name!r} needs the teacher's log-probability outside teacher_topk: use 'teacher' or "
            "'intersection', or pass teacher_input and teacher_weight"
        )
    entries = t.given if t.given is not None else t.teacher_ids
    if entries is not None:
        if k is not None and k != entries.shape[1]:
            raise ValueError(f"k must be None or {entries.shape[1]}, the number of ids, got {k}")
        k = entries.shape[1]
    if k is None:
        raise ValueError(f"k is needed with support={name!r}: the number of tokens in it")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be within [1, {vocabulary}], the vocabulary, got {k}")
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], got {alpha}")
    if per_entry_clip is not None and not 0 <= per_entry_clip < math.inf:
        raise ValueError(f"per_entry_clip must be finite and not negative, got {per_entry_clip}")
    return Restriction(int(k), name, tail, float(alpha), None if per_entry_clip is None else float(per_entry_clip))


def _output_names(outputs: tuple[str, ...] | None, r: Restriction, t: Tensors) -> tuple[str, ...]:
    if outputs is None:
        return r.free_outputs(t.teacher_ids is not None, t.target is not None)
    for name in outputs:
        if name not in FIELDS:
            raise ValueError(f"outputs names {name!r}; the numbers are {FIELDS}")
        if name == "student_logprob" and t.target is None:
            raise ValueError("outputs asks for 'student_logprob', which needs target")
    return tuple(name for name in FIELDS if name in outputs)


def _reference(t: Tensors, o: Options, names: tuple[str, ...]) -> TopkDivergence:
    student_transform, teacher_transform = o.transforms()
    cached = t.teacher_ids is not None and t.teacher_logprobs is not None
    tokens = linear_topk_divergence_reference(
        t.student_input, t.student_weight, t.teacher_input, t.teacher_weight, t.target,
        restriction=o.restriction,
        given=t.given,
        teacher_topk=(t.teacher_ids, t.teacher_logprobs) if cached else None,  # type: ignore[arg-type]
        mask=t.mask,
        student_bias=t.student_bias,
        teacher_bias=t.teacher_bias,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
    )  # fmt: skip
    return TopkDivergence(**{name: getattr(tokens, name) for name in names})


def _check(t: Tensors, teachers: dict[str, float | None]) -> None:
    """Shapes, dtypes, devices, who may require grad, and that there is one teacher."""
    tensors: dict[str, Tensor | None] = t._asdict()
    tensors["teacher_topk[0]"], tensors["teacher_topk[1]"] = tensors.pop("teacher_ids"), tensors.pop("teacher_logprobs")
    tensors["support"] = tensors.pop("given")
    cached = t.teacher_ids is not None
    required = ["student_input", "student_weight", *(() if cached else ("teacher_input", "teacher_weight"))]
    live = [n for n in ("teacher_input", "teacher_weight", "teacher_bias") if tensors[n] is not None]
    if cached and (live or teachers != {"teacher_logit_scale": 1.0, "teacher_softcap": None}):
        named = live or [n for n, v in teachers.items() if v not in (1.0, None)]
        raise ValueError(f"{named[0]} has no use beside teacher_topk, whose log-probabilities are final: leave it out")
    check_tensors({name: value for name, value in tensors.items() if value is not None or name in required})
    for name in ("student_weight", "teacher_weight"):
        if (weight := tensors[name]) is not None:
            check_weight(name, weight)
    matrices = ("student_input", "student_weight", "teacher_input", "teacher_weight", *list(tensors)[-3:])
    check_matrices({name: v for name in matrices if (v := tensors[name]) is not None})
    _check_sizes(t, tensors)
    check_index_dtypes(t.target, t.mask)
    floats = {name: v for name, v in tensors.items() if name in Tensors._fields[:8] and name not in ("target", "mask")}
    check_float_dtypes(floats, t.student_input, "student_input")
    check_teacher_grad(
        t.teacher_input,
        {"teacher_weight": (t.teacher_weight, t.student_weight), "teacher_bias": (t.teacher_bias, t.student_bias)},
    )
    if t.teacher_logprobs is not None and t.teacher_logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_topk[1] requires grad: the teacher gets none; detach it")
    check_target_range(t.target, t.mask, t.student_weight.shape[0])
    for name in ("support", "teacher_topk[0]"):
        _check_ids(name, tensors[name], t.mask, t.student_weight.shape[0])


def _check_sizes(t: Tensors, tensors: dict[str, Tensor | None]) -> None:
    count, vocabulary = t.student_input.shape[0], t.student_weight.shape[0]
    expected: dict[str, tuple[int, ...]] = dict(
        student_weight=(vocabulary, t.student_input.shape[1]), student_bias=(vocabulary,), teacher_bias=(vocabulary,),
        target=(count,), mask=(count,),
    )  # fmt: skip
    if t.teacher_input is not None:
        expected |= dict(
            teacher_input=(count, t.teacher_input.shape[1]), teacher_weight=(vocabulary, t.teacher_input.shape[1])
        )
    for name, like in (("support", t.given), ("teacher_topk[0]", t.teacher_ids), ("teacher_topk[1]", t.teacher_ids)):
        if like is not None:
            expected[name] = (count, like.shape[1])
    check_shapes(tensors, expected, t.student_input, "student_input")
    if t.teacher_logprobs is not None and not t.teacher_logprobs.is_floating_point():
        raise ValueError(f"teacher_topk[1] must be floating, got {t.teacher_logprobs.dtype}")


def _check_ids(name: str, ids: Tensor | None, mask: Tensor | None, vocabulary: int) -> None:
    """int64; in the vocabulary and distinct, where the values are visible."""
    if ids is None:
        return
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {ids.dtype}")
    if not values_are_visible(ids):
        return
    ids = ids if mask is None else ids.masked_fill(~mask[:, None], PADDING)
    wrong = (ids < PADDING) | (ids >= vocabulary)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] is {int(ids[row, column])}: must be in [0, {vocabulary}), "
            f"or {PADDING} for no entry"
        )
    ordered = ids.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)).any(-1)
    if twice.any():
        raise ValueError(f"{name}[{int(twice.nonzero()[0, 0])}] holds an id twice: it would count twice")
