"""One batch of self-distillation as token ids, and its flat form."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TokenIds = Sequence[int]


@dataclass
class FlatBatch:
    """A `DistillBatch` with one entry per completion (B of them), and per-token lists packed over completions (N).

    Attributes:
        student_prompts, teacher_prompts, completions: B token-id lists each.
        loss_mask: (N,) bools or None.
        weights, old_logprobs, sampling_logprobs: (N,) floats or None.
        names: B strings such as ``example 3, completion 0``, for error messages.
    """

    student_prompts: list[TokenIds]
    teacher_prompts: list[TokenIds] | None
    completions: list[TokenIds]
    loss_mask: list[bool] | None
    weights: list[float] | None
    old_logprobs: list[float] | None
    sampling_logprobs: list[float] | None
    names: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every completion."""
        return [len(completion) for completion in self.completions]


@dataclass
class DistillBatch:
    """Prompts and completions as token ids; everything is checked on construction.

    Attributes:
        student_prompts: one prompt per example.
        teacher_prompts: per example one prompt, or a list with one prompt per completion. None where no teacher is
            needed (`loss="ce"`).
        completions: per example its R completions (R may differ). An empty completion is fine and contributes nothing.
        loss_mask: like `completions`, a bool per token; False leaves a token out of the loss.
        weights: like `completions`, a factor per token; or one per completion.
        old_logprobs: like `completions`, log-probability (nats) of each token under the trainer's policy at sampling
            time. With `importance_clip` they give the clipped ratio exp(student - old) per token.
        sampling_logprobs: the same under the engine that sampled. They give truncated importance sampling as in the
            released SDFT code: the mean over a completion's tokens of min(exp(old - sampling), clip), one factor per
            completion. Without `old_logprobs` the current student stands in for old (exact on policy). None in place
            of an example's: its completions get the factor 1.

    Raises:
        ValueError, TypeError: lengths that do not fit, or something that is not a token id; the message names the
            field and the example.
    """

    student_prompts: Sequence[TokenIds]
    teacher_prompts: Sequence[TokenIds] | Sequence[Sequence[TokenIds]] | None
    completions: Sequence[Sequence[TokenIds]]
    loss_mask: Sequence[Sequence[Sequence[bool]]] | None = None
    weights: Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]] | None = None
    old_logprobs: Sequence[Sequence[Sequence[float]]] | None = None
    sampling_logprobs: Sequence[Sequence[Sequence[float]] | None] | None = None

    def __post_init__(self) -> None:
        examples = len(self.student_prompts)
        for name in ("teacher_prompts", "completions", "loss_mask", "weights", "old_logprobs", "sampling_logprobs"):
            value = getattr(self, name)
            if value is not None and len(value) != examples:
                raise ValueError(f"{name} has {len(value)} entries for {examples} student_prompts")
        for i, prompt in enumerate(self.student_prompts):
            _check_ids(prompt, f"student_prompts[{i}]", allow_empty=False)
            if len(self.completions[i]) and isinstance(self.completions[i][0], numbers.Integral):
                raise TypeError(f"completions[{i}] must be a list of completions (token-id lists), got token ids")
            for r, completion in enumerate(self.completions[i]):
                _check_ids(completion, f"completions[{i}][{r}]", allow_empty=True)
            if self.teacher_prompts is not None:
                self._check_teacher_prompts(i, self.teacher_prompts[i])
        for name in ("loss_mask", "weights", "old_logprobs", "sampling_logprobs"):
            if getattr(self, name) is not None:
                self._check_per_token(name)

    def _check_teacher_prompts(self, i: int, prompts: Any) -> None:
        if _is_ids(prompts):
            _check_ids(prompts, f"teacher_prompts[{i}]", allow_empty=False)
            return
        if len(prompts) != len(self.completions[i]):
            raise ValueError(
                f"teacher_prompts[{i}] has {len(prompts)} prompts for {len(self.completions[i])} completions; give one "
                "prompt, or one per completion"
            )
        for r, prompt in enumerate(prompts):
            _check_ids(prompt, f"teacher_prompts[{i}][{r}]", allow_empty=False)

    def _check_per_token(self, name: str) -> None:
        for i, (values, completions) in enumerate(zip(getattr(self, name), self.completions, strict=True)):
            if values is None and name == "sampling_logprobs":
                continue
            if len(values) != len(completions):
                raise ValueError(f"{name}[{i}] has {len(values)} entries for {len(completions)} completions")
            for r, (value, completion) in enumerate(zip(values, completions, strict=True)):
                if name == "weights" and isinstance(value, numbers.Real):
                    continue
                if len(value) != len(completion):
                    raise ValueError(f"{name}[{i}][{r}] has {len(value)} entries for {len(completion)} tokens")
                for token in value:
                    if not isinstance(token, numbers.Real):
                        raise TypeError(f"{name}[{i}][{r}] must hold numbers, got {token!r}")

    def __len__(self) -> int:
        """Number of completions."""
        return sum(len(completions) for completions in self.completions)

    def check_context(self, student_limit: int | None, teacher_limit: int | None = None) -> None:
        """Raise ValueError, naming the example and the lengths, where a sequence is longer than its model's context."""
        flat = self.flatten()
        sides = [("student", flat.student_prompts, student_limit)]
        if flat.teacher_prompts is not None:
            sides.append(("teacher", flat.teacher_prompts, teacher_limit))
        for side, prompts, limit in sides:
            for name, prompt, completion in zip(flat.names, prompts, flat.completions, strict=True):
                if limit is not None and len(prompt) + len(completion) > limit:
                    raise ValueError(
                        f"{name}: the {side} prompt has {len(prompt)} tokens and its completion {len(completion)}, "
                        f"more than the model's context of {limit}; shorten it (nothing is truncated)"
                    )

    def flatten(self) -> FlatBatch:
        """One entry per completion, prompts repeated, per-token fields packed."""
        index = [(i, r) for i, completions in enumerate(self.completions) for r in range(len(completions))]
        teacher = None
        if self.teacher_prompts is not None:
            prompts: Any = self.teacher_prompts
            teacher = [prompts[i] if _is_ids(prompts[i]) else prompts[i][r] for i, r in index]
        return FlatBatch(
            student_prompts=[self.student_prompts[i] for i, _ in index],
            teacher_prompts=teacher,
            completions=[self.completions[i][r] for i, r in index],
            loss_mask=self._packed("loss_mask", index),
            weights=self._packed("weights", index),
            old_logprobs=self._packed("old_logprobs", index),
            sampling_logprobs=self._packed("sampling_logprobs", index),
            names=[f"example {i}, completion {r}" for i, r in index],
        )

    def _packed(self, name: str, index: list[tuple[int, int]]) -> list[Any] | None:
        values = getattr(self, name)
        if values is None:
            return None
        packed: list[Any] = []
        for i, r in index:
            value: Any = math.nan if values[i] is None else values[i][r]
            packed.extend([value] * len(self.completions[i][r]) if isinstance(value, numbers.Real) else value)
        return packed


def _is_ids(prompt: Sequence[Any]) -> bool:
    return len(prompt) == 0 or isinstance(prompt[0], numbers.Integral)


def _check_ids(ids: Any, name: str, allow_empty: bool) -> None:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"{name} must be a list of token ids, got {type(ids).__name__}")
    if not ids and not allow_empty:
        raise ValueError(f"{name} is empty; a completion token needs a token before it to be predicted from")
    for token in ids:
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise TypeError(f"{name} must hold token ids (int), got {token!r}")
        if token < 0:
            raise ValueError(f"{name} holds the negative token id {token}")
