"""The loss of a `SelfDistiller` by dense logits and plain autograd, written from its documentation and without its ops.

In fp64 it is the truth; in the dtype of a run, what eager PyTorch achieves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """fp64 where a model's code says fp32: norms, rotary angles and softmaxes are written to run in fp32 at least."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@dataclass
class Dense:
    """What one computation gives.

    Attributes:
        loss: 0-d, fp64 in the truth.
        terms: (P, N) of which the loss is the sum: P numbers of every token, each times all its factors.
        kept: (N,) bool, tokens in the loss.
        tokens: (N,) numbers by name.
        gradients: of every trained parameter, by name.
    """

    loss: Tensor
    terms: Tensor
    kept: Tensor
    tokens: dict[str, Tensor]
    gradients: dict[str, Tensor]


def dense(
    student: Any,
    teacher: Any,
    batch: Any,
    options: dict[str, Any],
    num_completions: int | None,
    padded: bool,
    grad: bool,
) -> Dense:
    """Loss and gradients of one batch.

    Args:
        student, teacher: models in eval or train mode without dropout; the teacher None with loss="ce".
        batch: a `DistillBatch`.
        options: those of `SelfDistiller` that change the loss.
        num_completions: as `SelfDistiller.__call__`.
        padded: one right-padded batch in place of one sequence after another.
        grad: compute gradients.
    """
    run = _padded_logits if padded else _lone_logits
    rows = [(i, r) for i, group in enumerate(batch.completions) for r in range(len(group))]
    completions = [list(batch.completions[i][r]) for i, r in rows]
    with torch.set_grad_enabled(grad):
        z_s = run(student, [list(batch.student_prompts[i]) for i, _ in rows], completions)
        z_t = None
        if options.get("loss", "kl") == "kl":
            with torch.no_grad():
                z_t = run(teacher, [_teacher_prompt(batch, i, r) for i, r in rows], completions)
        target = torch.tensor([t for c in completions for t in c], dtype=torch.int64)
        tokens = _numbers(z_s, z_t, target, options)
        kept = _kept(batch, rows, completions, options.get("skip_first_tokens", 3))
        terms = _terms(tokens, batch, rows, kept, options, num_completions)
        loss = terms.sum()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found: Sequence[Tensor | None] = [None] * len(trained)
    if grad and loss.requires_grad:
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}
    return Dense(
        loss.detach(),
        terms.detach(),
        torch.cat([torch.zeros(0, dtype=torch.bool), *kept]),
        {n: v.detach() for n, v in tokens.items()},
        gradients,
    )


def _teacher_prompt(batch: Any, i: int, r: int) -> list[int]:
    prompt = batch.teacher_prompts[i]
    return list(prompt if not prompt or isinstance(prompt[0], int) else prompt[r])


def _lone_logits(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """(N, V) logits that predict the completions, each sequence by itself."""
    logits = [
        model(input_ids=torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1]
        for p, c in zip(prompts, completions, strict=True)
        if c
    ]
    return torch.cat(logits) if logits else _no_logits(model)


def _padded_logits(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """The same from one right-padded batch."""
    used = [(p, c) for p, c in zip(prompts, completions, strict=True) if c]
    if not used:
        return _no_logits(model)
    width = max(len(p) + len(c) for p, c in used)
    ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in used])
    mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in used])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([row[len(p) - 1 : len(p) + len(c) - 1] for row, (p, c) in zip(logits, used, strict=True)])


def _no_logits(model: Any) -> Tensor:
    weight = model.get_output_embeddings().weight
    return weight.new_zeros(0, weight.shape[0])


def _numbers(z_s: Tensor, z_t: Tensor | None, target: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Per-token numbers, (N,) each, from logits (N, V)."""
    temperature = options.get("temperature", 1.0)
    log_s = (z_s.float() / temperature).log_softmax(-1)
    tokens = {
        "student_logprob": log_s.gather(1, target[:, None])[:, 0],
        "student_entropy": -(log_s.exp() * log_s).sum(-1),
    }
    if z_t is None:
        return tokens
    log_t = (z_t.float() / temperature).log_softmax(-1)
    tokens |= {
        "teacher_logprob": log_t.gather(1, target[:, None])[:, 0],
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
        "kl_teacher_student": (log_t.exp() * (log_t - log_s)).sum(-1),
        "kl_student_teacher": (log_s.exp() * (log_s - log_t)).sum(-1),
    }
    affine = options.get("token_loss")
    alpha = affine.alpha if getattr(affine, "alpha", None) is not None else options.get("alpha", 0.0)
    if 0 < alpha < 1:
        mixture = ((1 - alpha) * log_s.exp() + alpha * log_t.exp()).log()
        of_teacher, of_student = (log_t.exp() * (log_t - mixture)).sum(-1), (log_s.exp() * (log_s - mixture)).sum(-1)
        tokens["jsd"] = alpha * of_teacher + (1 - alpha) * of_student
    return tokens


def _kept(batch: Any, rows: list[tuple[int, int]], completions: list[list[int]], skip: int) -> list[Tensor]:
    """A bool per token of every completion: it is in the loss."""
    return [
        torch.tensor(
            [t >= skip and (batch.loss_mask is None or batch.loss_mask[i][r][t]) for t in range(len(c))]
        ).bool()
        for (i, r), c in zip(rows, completions, strict=True)
    ]


def _terms(
    tokens: dict[str, Tensor],
    batch: Any,
    rows: list[tuple[int, int]],
    kept: list[Tensor],
    options: dict[str, Any],
    num_completions: int | None,
) -> Tensor:
    """(P, N): weight * ratios * what the token loss is a sum of, 0 where a token is left out."""
    value = _token_loss(tokens, options)  # (P, N)
    clip = options.get("importance_clip")
    weights, start = [], 0
    for (i, r), keep in zip(rows, kept, strict=True):
        length = len(keep)
        logprob = tokens["student_logprob"][start : start + length].detach()
        start += length
        weight = keep.to(value) / max(int(keep.sum()), 1) / max(num_completions or len(rows), 1)
        if batch.weights is not None:
            weight = weight * value.new_tensor(batch.weights[i][r])
        old = None if batch.old_logprobs is None else value.new_tensor(batch.old_logprobs[i][r])
        if clip is not None and old is not None:
            weight = weight * (logprob - old).clamp(-20, 20).exp().clamp(max=clip)
        if batch.sampling_logprobs is not None:
            gap = (logprob if old is None else old) - value.new_tensor(batch.sampling_logprobs[i][r])
            truncated = gap.clamp(-20, 20).exp().clamp(max=options.get("sampling_clip", 2.0))
            weight = weight * (truncated.sum() / max(length, 1))
        weights.append(weight)
    return value * torch.cat(weights) if weights else value


def _token_loss(tokens: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """(P, N), to be summed over P."""
    if options.get("loss", "kl") == "ce":
        return -tokens["student_logprob"][None]
    chosen: Any = options.get("token_loss")
    if chosen is None:
        alpha = options.get("alpha", 0.0)
        return tokens[{0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}.get(alpha, "jsd")][None]
    if callable(chosen):
        return chosen(SimpleNamespace(**tokens), torch.arange(len(tokens["student_logprob"])))[None]
    return torch.stack([weight * tokens[name] for name, weight in chosen.weights().items()])
