"""Inputs that bite: peaked softmaxes, teacher close to student, large logits. Never uniform random logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# name -> (largest |logit| about, relative gap between the two models' hidden states)
KINDS = {
    "peaked": (25.0, 0.3),  # confident tokens, models apart: KL of order 1
    "near": (25.0, 0.02),  # where SDFT lives: KL of order 1e-2 to 1e-3
    "nearer": (40.0, 0.002),  # KL of order 1e-5
    "flat": (2.0, 0.5),
}


@dataclass(frozen=True)
class DivergenceInputs:
    """Arguments of `linear_divergence` by name; `tensors()` is the dictionary to call it with."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    target: Tensor
    mask: Tensor | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None

    def tensors(self) -> dict[str, Tensor | None]:
        return dict(self.__dict__)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> DivergenceInputs:
        """Detached copies in another dtype: a gradient never leaks from one implementation's run into another's."""
        moved = {}
        for name, value in self.__dict__.items():
            if value is not None:
                value = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None, copy=True)
            moved[name] = value
        return DivergenceInputs(**moved)

    def replace(self, **changes: Any) -> DivergenceInputs:
        return replace(self, **changes)


def make_divergence_inputs(
    kind: str = "near",
    tokens: int = 37,
    vocabulary: int = 1003,
    hidden: int = 32,
    teacher_hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = False,
    mask: bool = False,
    seed: int = 0,
) -> DivergenceInputs:
    """Draw inputs in `dtype`; every implementation, and the oracle after `.to(float64)`, sees the same bits.

    Each hidden state points at a few rows of the head (as CCE's tests do), so that softmaxes are peaked. With
    `teacher_hidden` the teacher has a head of its own, built so that its logits stay close to the student's.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    peak, gap = KINDS[kind]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight = normal(vocabulary, hidden) / hidden**0.5
    favourites = torch.randint(vocabulary, (tokens, 4), generator=g)
    state = 0.5 * normal(tokens, hidden)
    for rank in range(4):
        row = weight[favourites[:, rank]]
        state += row * (peak * (1 - 0.06 * rank)) / row.square().sum(-1, keepdim=True).clamp_min(1e-6)
    other = state + gap * normal(tokens, hidden)
    other_weight = weight + 0.02 * gap * normal(vocabulary, hidden) / hidden**0.5
    if teacher_hidden is not None and teacher_hidden != hidden:
        turn = torch.linalg.qr(normal(max(hidden, teacher_hidden), max(hidden, teacher_hidden)))[0]
        turn = turn[:hidden, :teacher_hidden]
        other, other_weight = other @ turn, other_weight @ turn
    target = favourites[:, 0].clone()
    if tokens > 2:
        target[2] = -100
    biases: list[Tensor | None] = [None, None]
    if bias:
        student_bias = 0.3 * normal(vocabulary)
        biases = [student_bias, student_bias + 0.3 * gap * normal(vocabulary)]
    keep = torch.rand(tokens, generator=g, dtype=torch.float32) < 0.7 if mask else None
    drawn = DivergenceInputs(state, weight, other, other_weight, target, keep, *biases)
    return drawn.to(dtype, device)
