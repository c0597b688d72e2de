"""Token losses: from a token's numbers to its loss. Affine ones are data; any other is a callable on one chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import DIFFERENTIABLE, FIELDS, TokenDivergence

TokenLoss = Callable[[TokenDivergence, Tensor], Tensor]
Weight = float | Tensor


@dataclass(frozen=True, kw_only=True)
class AffineTokenLoss:
    """ratio * (sum of weight * number) per token: what one fused row kernel can do at four GEMMs.

    Each weight is a float or an ``(N,)`` tensor in the caller's token order (masks, lengths, advantages, a direction
    per token); none may require grad. A weight of 0 drops its number, even an infinite one. The loss is the sum over
    tokens, so put 1/N or 1/length into the weights, or set `mean`.

    Attributes:
        kl_teacher_student, kl_student_teacher, jsd, student_logprob, student_entropy: the weights.
        alpha: of the JSD; needed where `jsd` has a weight. At 0 and 1 the JSD is the matching KL.
        old_logprob: ``(N,)`` log-probability of `target` under the policy that sampled it, for the importance ratio.
        importance_clip: upper limit of exp(student_logprob - old_logprob), a factor without gradient (TRL's
            `distillation_is_clip`; the exponent is limited to +-20). Needs `old_logprob` and `target`.
        mean: divide by the number of unmasked tokens, those whose target is -100 left out like masked ones.
    """

    kl_teacher_student: Weight = 0.0
    kl_student_teacher: Weight = 0.0
    jsd: Weight = 0.0
    student_logprob: Weight = 0.0
    student_entropy: Weight = 0.0
    alpha: float | None = None
    old_logprob: Tensor | None = None
    importance_clip: float | None = None
    mean: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {self.alpha}")
        if "jsd" in self.weights() and self.alpha is None:
            raise ValueError("a weight on jsd needs alpha, the mixture's share of the teacher")
        if (self.old_logprob is None) != (self.importance_clip is None):
            raise ValueError("old_logprob and importance_clip go together: give both or neither")
        if self.importance_clip is not None and not self.importance_clip > 0:
            raise ValueError(f"importance_clip must be positive, got {self.importance_clip}")
        for name, value in (*self.weights().items(), ("old_logprob", self.old_logprob)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} requires grad and would get none: detach it, or use linear_divergence")

    def weights(self) -> dict[str, Weight]:
        """The weights that are not the number 0, by field."""
        values = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: v for name, v in values.items() if isinstance(v, Tensor) or v != 0}

    @property
    def needs_target(self) -> bool:
        return "student_logprob" in self.weights() or self.importance_clip is not None

    def expand(self, count: int, mask: Tensor | None, like: Tensor) -> dict[str, Tensor]:
        """The weights as ``(N,)`` tensors of `like`'s dtype and device.

        Raises:
            ValueError: a weight of another shape than ``(N,)``.
        """
        scale: Tensor | float = 1.0
        if self.mean:
            scale = 1.0 / max(count, 1) if mask is None else 1.0 / mask.sum().clamp(min=1).to(like.dtype)
        result = {}
        for name, value in self.weights().items():
            if isinstance(value, Tensor) and value.shape not in ((), (count,)):
                raise ValueError(f"token_loss.{name} must be a float or ({count},), got {tuple(value.shape)}")
            # A float is filled in on the device: copied from the host it would break a CUDA graph's capture.
            weight = value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
            result[name] = (weight * scale).expand(count).contiguous()
        return result


def sdft_token_loss(
    alpha: float = 0.0,
    weight: Weight | None = None,
    old_logprob: Tensor | None = None,
    importance_clip: float | None = None,
) -> AffineTokenLoss:
    """SDFT's token loss: KL(p_t || p_s) at `alpha` 0, KL(p_s || p_t) at 1, the generalized JSD between.

    Args:
        alpha: as in TRL's `distillation_alpha`. Note the jump: the JSD itself tends to 0 at either end.
        weight: a float or ``(N,)``; None is the mean over the unmasked tokens (`AffineTokenLoss.mean`).
        old_logprob, importance_clip: see `AffineTokenLoss`.
    """
    value = 1.0 if weight is None else weight
    name = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}.get(float(alpha), "jsd")
    return AffineTokenLoss(
        **{name: value},
        alpha=float(alpha),
        old_logprob=old_logprob,
        importance_clip=importance_clip,
        mean=weight is None,
    )


def evaluate(
    token_loss: TokenLoss,
    tokens: Tensor,  # (8, C)
    fields: tuple[str, ...],
    positions: Tensor,  # (C,) int64
    need_grad: bool,
    check_elementwise: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one chunk (C,) and its derivative by every differentiable field, (C,) each.

    Raises:
        ValueError: the result is not (C,), or depends on a tensor that requires grad, or (with `check_elementwise`)
            a token's loss depends on its neighbours.
    """
    values = {name: tokens[i].detach().clone() for i, name in enumerate(FIELDS) if name in fields}
    leaves = {name: values[name].requires_grad_() for name in DIFFERENTIABLE if name in values}
    with torch.enable_grad():
        loss = token_loss(TokenDivergence(**values), positions)
    if not isinstance(loss, Tensor) or loss.shape != positions.shape:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"token_loss must return one loss per token, {tuple(positions.shape)}, got {got}")
    _refuse_foreign_leaves(loss, set(map(id, leaves.values())))
    if check_elementwise:
        _check_elementwise(token_loss, values, positions, loss)
    if not need_grad or not loss.requires_grad:
        return loss.detach().to(tokens.dtype), {}
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss), allow_unused=True)
    return loss.detach().to(tokens.dtype), {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}


def _refuse_foreign_leaves(loss: Tensor, own: set[int]) -> None:
    """A captured tensor that requires grad would silently get none: the graph is cut at the chunk's numbers."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise ValueError(
                f"token_loss uses a tensor of shape {tuple(leaf.shape)} that requires grad and would get none: "
                "detach it, or compute the loss outside from linear_divergence's outputs"
            )
        stack.extend(parent for parent, _ in node.next_functions)


def _check_elementwise(token_loss: TokenLoss, values: dict[str, Tensor], positions: Tensor, loss: Tensor) -> None:
    half = positions.shape[0] // 2
    with torch.no_grad():
        parts = [
            token_loss(TokenDivergence(**{k: v[rows] for k, v in values.items()}), positions[rows])
            for rows in (slice(None, half), slice(half, None))
        ]
    if not torch.allclose(torch.cat(parts), loss.detach(), rtol=1e-5, atol=0, equal_nan=True):
        raise ValueError("token_loss is not elementwise: a token's loss changes with the tokens beside it")
