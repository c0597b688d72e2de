"""Token losses of papers and libraries, a few lines each: affine where weights are known beforehand, else callables.

Each is a `token_loss` of `linear_divergence_loss`, at four GEMMs, and a *sum* over tokens: put 1/n, 1/length or a mask
into `weight`, a float or ``(N,)`` in the caller's token order. With s = log p_s[target] and t = log p_t[target], what
needs `target` says so; give its absent tokens (-100) weight 0 or mask them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .fields import DIFFERENTIABLE, NEED_TARGET, TokenDivergence
from .token_loss import AffineTokenLoss, TokenLoss, Weight

EXPONENT_LIMIT = 20.0  # of a log ratio before exp, as in TRL and verl: e^20 is 5e8, far beyond any useful ratio


def mixed_kl(share: Weight = 0.5, weight: Weight = 1.0) -> AffineTokenLoss:
    """share KL(p_t || p_s) + (1 - share) KL(p_s || p_t). NeMo-RL's `mixed_kl_weight` is `share`.

    Args:
        share: a float in [0, 1], or ``(N,)``.
        weight: of each token.

    Raises:
        ValueError: a float share outside [0, 1]; a tensor that is not floating or not ``(N,)``, or that requires grad.
    """
    if not isinstance(share, Tensor) and not 0 <= share <= 1:
        raise ValueError(f"share must be within [0, 1], got {share}")
    share = _data("share", share)
    weight = _data("weight", weight)
    return AffineTokenLoss(kl_teacher_student=weight * share, kl_student_teacher=weight * (1 - share))


def directed_kl(teacher_student: Tensor, weight: Weight = 1.0) -> AffineTokenLoss:
    """KL(p_t || p_s) at some tokens, KL(p_s || p_t) at the others: TRACE (arXiv 2605.10194), PACED (2603.11178).

    Args:
        teacher_student: ``(N,)`` bool, such as key spans of the demonstration, or a cached teacher's entropy > 1.
        weight: of each token; 0 is a token in neither.

    Raises:
        ValueError: `teacher_student` is not an ``(N,)`` bool tensor.
    """
    if not isinstance(teacher_student, Tensor) or teacher_student.dtype != torch.bool or teacher_student.dim() != 1:
        raise ValueError(f"teacher_student must be an (N,) bool tensor, got {_describe(teacher_student)}")
    weight = _data("weight", weight)
    here = teacher_student.to(weight.dtype if isinstance(weight, Tensor) else torch.float32)
    return AffineTokenLoss(kl_teacher_student=weight * here, kl_student_teacher=weight * (1 - here))


def k1_student_teacher(weight: Weight = 1.0, *, baseline: bool = False) -> TokenLoss:
    """(s - t).detach() s, for targets that the student sampled; needs `target`. REINFORCE-style gradient.

    Its gradient, (s - t) grad s, is in expectation that of KL(p_s || p_t); its value is no KL (k1 itself, s - t, is
    unbiased, but its plain gradient grad s has expectation 0). TRL's and SDPO's `sampled_token`; OPSD's and Thinking
    Machines' policy-gradient mode, -(t - s).detach() s.

    Args:
        weight: of each token.
        baseline: subtract KL(p_s || p_t), the expectation of s - t: same expected gradient, less variance
            (vOPD, arXiv 2605.07865).
    """
    weight = _data("weight", weight)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        s, t = _logprobs(tokens, "k1_student_teacher")
        gap = s - t - tokens.kl_student_teacher if baseline else s - t
        return _times(_at(weight, index, s), gap.detach() * s)

    return token_loss


def k2_student_teacher(weight: Weight = 1.0) -> TokenLoss:
    """(s - t)^2 / 2, for targets that the student sampled; needs `target`. Plain gradient.

    (s - t) grad s: in expectation that of KL(p_s || p_t), exactly; the value is biased (Schulman's k2, `k2` of verl).
    """
    weight = _data("weight", weight)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        s, t = _logprobs(tokens, "k2_student_teacher")
        return _times(_at(weight, index, s), 0.5 * (s - t).square())

    return token_loss


def k3_student_teacher(weight: Weight = 1.0, *, maximum: float | None = None) -> TokenLoss:
    """e^(t-s) - 1 - (t - s), for targets that the student sampled; needs `target`. Plain gradient.

    The value is unbiased for KL(p_s || p_t) and never negative (Schulman's k3, verl's `low_var_kl`, the penalty of
    GRPO, arXiv 2402.03300), **but its gradient, (1 - e^(t-s)) grad s, is in expectation that of KL(p_t || p_s)**.

    Args:
        weight: of each token.
        maximum: of the value; beyond it the gradient is 0 (verl: 10). t - s is limited to +-20 before the exponential.

    Raises:
        ValueError: `maximum` is not positive.
    """
    return _k3("k3_student_teacher", weight, maximum, sign=1)


def k1_teacher_student(weight: Weight = 1.0) -> AffineTokenLoss:
    """-s, for targets that the teacher sampled (or of a dataset); needs `target`. Plain gradient; affine.

    Cross-entropy, k1 = t - s without its constant t: its gradient, -grad s, is in expectation that of KL(p_t || p_s).
    Supervised fine-tuning, in the same units.
    """
    return AffineTokenLoss(student_logprob=-_data("weight", weight))


def k2_teacher_student(weight: Weight = 1.0) -> TokenLoss:
    """(t - s)^2 / 2, for targets that the teacher sampled; needs `target`. Plain gradient.

    -(t - s) grad s: that of KL(p_t || p_s) only to first order in p_s - p_t; where the models are far apart, another.
    """
    return k2_student_teacher(weight)


def k3_teacher_student(weight: Weight = 1.0, *, maximum: float | None = None) -> TokenLoss:
    """e^(s-t) - 1 - (s - t), for targets that the teacher sampled; needs `target`. Plain gradient.

    The value is unbiased for KL(p_t || p_s), and so is its gradient, (e^(s-t) - 1) grad s: that of `k1_teacher_student`
    with a baseline, with far less variance where the models are close.

    Args:
        weight, maximum: as in `k3_student_teacher`.
    """
    return _k3("k3_teacher_student", weight, maximum, sign=-1)


def _k3(name: str, weight: Weight, maximum: float | None, sign: int) -> TokenLoss:
    weight = _data("weight", weight)
    if maximum is not None:
        _positive("maximum", maximum)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        s, t = _logprobs(tokens, name)
        gap = (sign * (t - s)).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
        # expm1: at a gap of 1e-3 the value is 5e-7, and exp(gap) - 1 - gap keeps one digit of it in fp32.
        value = gap.expm1() - gap
        return _times(_at(weight, index, s), value if maximum is None else value.clamp(max=maximum))

    return token_loss


def entropy_aware_kl(threshold: float, weight: Weight = 1.0, *, switch: bool = False) -> TokenLoss:
    """KL(p_s || p_t), and where the teacher's entropy exceeds `threshold` KL(p_t || p_s) too (arXiv 2603.07079).

    With a teacher whose entropy is known beforehand, `directed_kl` is the affine form of `switch`.

    Args:
        threshold: in nats, at the call's temperature.
        weight: of each token.
        switch: KL(p_t || p_s) *instead* at those tokens.

    Raises:
        ValueError: `threshold` is negative or NaN.
    """
    _nonnegative("threshold", threshold)
    weight = _data("weight", weight)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        forward, reverse = tokens.kl_teacher_student, tokens.kl_student_teacher
        open_ = tokens.teacher_entropy > threshold
        kl = forward.where(open_, 0.0) + (reverse.where(~open_, 0.0) if switch else reverse)
        return _times(_at(weight, index, kl), kl)

    return token_loss


def entropy_gate(
    token_loss: AffineTokenLoss | TokenLoss,
    *,
    of: str = "teacher",
    minimum: float | None = None,
    maximum: float | None = None,
) -> TokenLoss:
    """`token_loss` at tokens whose entropy lies within [minimum, maximum], 0 elsewhere, value and gradient.

    A teacher that is sure (`maximum`) or a student that is not (`minimum`: the forking tokens of arXiv 2506.01939).
    A quantile of the batch is no elementwise gate: compute it from `linear_divergence`'s entropies.

    Args:
        token_loss: any. An affine loss with a weight on `jsd` needs `jsd_alpha` in the call too.
        of: ``"teacher"`` or ``"student"``; the gate itself has no gradient.
        minimum, maximum: in nats, at the call's temperature; at least one.

    Raises:
        ValueError: another `of`, no bound, or bounds that exclude everything.
    """
    if of not in ("teacher", "student"):
        raise ValueError(f"of must be 'teacher' or 'student', got {of!r}")
    if minimum is None and maximum is None:
        raise ValueError("minimum or maximum is needed: a gate without bounds keeps every token")
    low, high = 0.0 if minimum is None else minimum, float("inf") if maximum is None else maximum
    if not 0 <= low <= high:
        raise ValueError(f"entropies in [minimum, maximum] = [{minimum}, {maximum}]: expected 0 <= minimum <= maximum")
    inner = as_callable(token_loss)

    def gated(tokens: TokenDivergence, index: Tensor) -> Tensor:
        entropy = (tokens.teacher_entropy if of == "teacher" else tokens.student_entropy).detach()
        return inner(tokens, index).where((entropy >= low) & (entropy <= high), 0.0)

    return gated


def trust_region(
    token_loss: AffineTokenLoss | TokenLoss,
    limit: float,
    *,
    measure: str = "kl_teacher_student",
    drop: bool = False,
) -> TokenLoss:
    """`token_loss` times min(1, limit / D), D the detached `measure` of the token: no token pulls more than at `limit`.

    The safe form of a clip: OPSD's per-vocabulary clip (arXiv 2601.18734) can turn a token's gradient around, a weight
    of the whole token keeps its direction.

    Args:
        token_loss: any. An affine loss with a weight on `jsd` needs `jsd_alpha` in the call too.
        limit: in nats.
        measure: the number that is compared: a KL or ``"jsd"``.
        drop: drop tokens beyond `limit` altogether. A token whose D is infinite is dropped either way.

    Raises:
        ValueError: `limit` is not positive; another `measure`.
    """
    _positive("limit", limit)
    _divergence("measure", measure)
    inner = as_callable(token_loss)

    def weighted(tokens: TokenDivergence, index: Tensor) -> Tensor:
        distance = _number(tokens, measure, "trust_region").detach()
        share = (~(distance > limit)).to(distance.dtype) if drop else (limit / distance).clamp(max=1.0)
        return _times(share, inner(tokens, index))

    return weighted


def importance_weighted(
    token_loss: AffineTokenLoss | TokenLoss, old_logprob: Tensor, importance_clip: float
) -> TokenLoss:
    """`token_loss` times min(exp(s - old), importance_clip) without gradient; needs `target`.

    TRL's `distillation_is_clip` and SDPO's `is_clip` (2.0) around their `sampled_token`. Affine losses carry the ratio
    themselves. s - old is limited to +-20.

    Args:
        token_loss: any. An affine loss with a weight on `jsd` needs `jsd_alpha` in the call too.
        old_logprob: ``(N,)``, log-probability of `target` under the policy that sampled it.
        importance_clip: upper limit of the ratio.

    Raises:
        ValueError: `importance_clip` is not positive; `old_logprob` not ``(N,)`` or with grad.
    """
    _positive("importance_clip", importance_clip)
    old = _old_logprob(old_logprob)
    inner = as_callable(token_loss)

    def weighted(tokens: TokenDivergence, index: Tensor) -> Tensor:
        s = _number(tokens, "student_logprob", "importance_weighted").detach()
        return _ratio(s, old.to(s)[index]).clamp(max=importance_clip) * inner(tokens, index)

    return weighted


def clipped_kl(limit: float, weight: Weight = 1.0, *, name: str = "kl_teacher_student") -> TokenLoss:
    """min(D, limit) per token: beyond `limit` the value is `limit` and the gradient 0 (UniSD, arXiv 2605.06597).

    Args:
        limit: in nats.
        weight: of each token.
        name: of D: a KL or ``"jsd"``.

    Raises:
        ValueError: `limit` is not positive; another `name`.
    """
    _positive("limit", limit)
    _divergence("name", name)
    weight = _data("weight", weight)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        value = _number(tokens, name, "clipped_kl").clamp(max=limit)
        return _times(_at(weight, index, value), value)

    return token_loss


def policy_gradient(
    advantage: Weight,
    weight: Weight = 1.0,
    *,
    old_logprob: Tensor | None = None,
    importance_clip: float | None = None,
) -> AffineTokenLoss:
    """-advantage s, times min(exp(s - old), importance_clip) without gradient if given; needs `target`. Affine.

    REINFORCE; with the ratio, truncated importance sampling. `ppo_clip` differentiates the ratio instead.

    Args:
        advantage: a float or ``(N,)``.
        weight: of each token.
        old_logprob, importance_clip: see `AffineTokenLoss`; both or neither.
    """
    coefficient = _data("advantage", advantage) * _data("weight", weight)
    return AffineTokenLoss(student_logprob=-coefficient, old_logprob=old_logprob, importance_clip=importance_clip)


def ppo_clip(
    advantage: Weight,
    old_logprob: Tensor,
    weight: Weight = 1.0,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(s - old), with gradient through r; needs `target`.

    PPO (arXiv 1707.06347); two limits as in DAPO (2503.14476); `dual_clip` c limits the loss of A < 0 to -c A
    (1912.09729, verl's `clip_ratio_c`). s - old is limited to +-20.

    Args:
        advantage: A, a float or ``(N,)``.
        old_logprob: ``(N,)``, log-probability of `target` under the policy that sampled it.
        weight: of each token.
        clip_low: below 1; in [0, 1).
        clip_high: above 1; None is `clip_low`.
        dual_clip: > 1; None is off.

    Raises:
        ValueError: limits outside those ranges, or `old_logprob` not ``(N,)`` or with grad.
    """
    clip_high = clip_low if clip_high is None else clip_high
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"expected 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    advantage, weight, old = _data("advantage", advantage), _data("weight", weight), _old_logprob(old_logprob)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        s = _number(tokens, "student_logprob", "ppo_clip")
        a = torch.as_tensor(_at(advantage, index, s), dtype=s.dtype, device=s.device)
        ratio = _ratio(s, old.to(s)[index])
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_low, 1 + clip_high))
        if dual_clip is not None:
            loss = torch.minimum(loss, -a * dual_clip).where(a < 0, loss)
        return _times(_at(weight, index, s), loss)

    return token_loss


def entropy_bonus(coefficient: Weight) -> AffineTokenLoss:
    """-coefficient H(p_s): keeps the student's entropy up (A3C, arXiv 1602.01783). Affine. Add it with `combine`.

    Args:
        coefficient: a float or ``(N,)``; negative sharpens.
    """
    return AffineTokenLoss(student_entropy=-_data("coefficient", coefficient))


def combine(*token_losses: AffineTokenLoss | TokenLoss) -> AffineTokenLoss | TokenLoss:
    """The sum of token losses: affine if all are, none has an importance ratio or a mean, and the alphas agree.

    Raises:
        ValueError: none given; an affine loss with `mean` beside one that is not affine.
    """
    if not token_losses:
        raise ValueError("combine needs at least one token loss")
    affine = [loss for loss in token_losses if isinstance(loss, AffineTokenLoss)]
    plain = all(loss.importance_clip is None and not loss.mean for loss in affine)
    alphas = {loss.alpha for loss in affine if "jsd" in loss.weights()}
    if len(affine) == len(token_losses) and plain and len(alphas) <= 1:
        weights = {name: sum(getattr(loss, name) for loss in affine) for name in DIFFERENTIABLE}
        return AffineTokenLoss(**weights, alpha=alphas.pop() if alphas else None)
    if len(alphas) > 1:
        raise ValueError(f"one call computes the JSD at one alpha, got {sorted(map(str, alphas))}")
    parts = [as_callable(loss) for loss in token_losses]
    return lambda tokens, index: torch.stack([part(tokens, index) for part in parts]).sum(0)


def as_callable(token_loss: AffineTokenLoss | TokenLoss) -> TokenLoss:
    """`token_loss` as a callable. A weight on `jsd` then needs the call's `jsd_alpha`, equal to the loss's alpha.

    Raises:
        ValueError: an affine loss with `mean` (one chunk does not know the number of tokens); not a token loss.
    """
    if not isinstance(token_loss, AffineTokenLoss):
        if not callable(token_loss):
            raise ValueError(f"expected an AffineTokenLoss or a callable, got {type(token_loss).__name__}")
        return token_loss
    affine = token_loss
    if affine.mean:
        raise ValueError("an affine loss with mean=True needs the number of tokens: give it weight=1/n instead")
    old, clip = affine.old_logprob, affine.importance_clip
    if old is not None and clip is not None:
        return importance_weighted(replace(affine, old_logprob=None, importance_clip=None), old, clip)

    def evaluate_affine(tokens: TokenDivergence, index: Tensor) -> Tensor:
        total = torch.zeros_like(tokens.kl_teacher_student)
        for name, weight in affine.weights().items():
            total = total + _times(_at(weight, index, total), _number(tokens, name, "token_loss"))
        return total

    return evaluate_affine


def _data(name: str, value: Weight) -> Weight:
    """A float, or a tensor of one number per token that needs no gradient."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() > 1 or not (value.is_floating_point() or value.dtype in (torch.bool, torch.int64)):
        raise ValueError(f"{name} must be a float or an (N,) tensor of numbers, got {_describe(value)}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad and would get none: detach it, or use linear_divergence")
    return value if value.is_floating_point() else value.to(torch.float32)


def _at(value: Weight, index: Tensor, like: Tensor) -> Weight:
    """Of a chunk's tokens."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like) if value.dim() == 0 else value.to(like)[index]


def _times(weight: Weight, value: Tensor) -> Tensor:
    """weight value; a weight of 0 drops the token, even an infinite one. NaN stays NaN."""
    return weight * value if not isinstance(weight, Tensor) else (weight * value).where(weight != 0, 0.0)


def _ratio(s: Tensor, old: Tensor) -> Tensor:
    return (s - old).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()


def _old_logprob(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 1:
        raise ValueError(f"old_logprob must be an (N,) tensor, got {_describe(value)}")
    value = _data("old_logprob", value)  # type: ignore[assignment]
    return value


def _number(tokens: TokenDivergence, name: str, who: str) -> Tensor:
    value = getattr(tokens, name)
    if value is None:
        raise ValueError(
            f"{who} uses {name}, which needs {'target' if name in NEED_TARGET else 'jsd_alpha'} in the call"
        )
    return value


def _logprobs(tokens: TokenDivergence, who: str) -> tuple[Tensor, Tensor]:
    return _number(tokens, "student_logprob", who), _number(tokens, "teacher_logprob", who)


def _divergence(name: str, value: str) -> None:
    if value not in DIFFERENTIABLE[:3]:
        raise ValueError(f"{name} must be one of {DIFFERENTIABLE[:3]}, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _nonnegative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
