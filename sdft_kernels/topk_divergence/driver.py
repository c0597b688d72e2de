"""Walks the tokens in chunks: project what must be searched or summed, reach the rest by its K rows of the head.

Device-independent; sees no autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import same_tensor
from .._chunks import Chunks, Head, Need, Products, cut, hidden_states, prepared, select_tokens
from .._gemm import exact_matmul
from .._rows import to_z_
from . import rows_sparse, rows_support, rows_torch
from .fields import GIVEN, MAX_LOG_MASS, NUMBERS, PADDING, Restriction

SUPPORT_COPIES = 12  # fp64 temporaries of the (C, K) entries in `rows_support`, and their ids


class Cached(NamedTuple):
    """A teacher that was run before: ids (N, K), -1 in padding, and log-probabilities (N, K)."""

    ids: Tensor
    logprobs: Tensor


class Result(NamedTuple):
    numbers: Tensor  # (4, N), rows in the order of NUMBERS; 0 where not computed
    ids: Tensor  # (N, width)
    entries: Tensor  # (N, width) d divergence / d raw logits at `ids`; of a dense restriction d / d log p_s
    rest: Tensor  # (N,) of a dense restriction the sum of `entries`, else 0
    grad_input: Tensor | None  # (N, H) for an upstream gradient of 1


class Gradients(NamedTuple):
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def plan(
    student: Head,
    mask: Tensor | None,
    pack: bool,
    memory_budget: int | None,
    gemm: Products,
    *,
    tiles: int,
    teacher_hidden: int,
    width: int,
    gradient: bool,
) -> Chunks:
    """Cut the call so that `tiles` tiles of logits, the entries and scratch fit `memory_budget` bytes.

    Raises:
        ValueError: not even one token fits.
    """
    device, (vocabulary, hidden), size = student.input.device, student.weight.shape, gemm.accumulate.itemsize
    tokens = select_tokens(student.input.shape[0], mask, pack)
    per_token = vocabulary * (tiles * size + gradient * gemm.bytes_per_logit(device))
    per_token += 3 * size * (hidden + teacher_hidden) + 8 * SUPPORT_COPIES * width
    fixed = gemm.scratch_bytes(device, student.weight) + rows_sparse.scratch_bytes(device)
    fixed += rows_torch.scratch_bytes(tokens[2], vocabulary, size, device.type) if tiles else 0
    return cut(tokens, per_token, fixed, memory_budget, device, vocabulary)


def linear_topk_divergence(
    student: Head,
    teacher: Head | Cached,
    given: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    *,
    restriction: Restriction,
    outputs: tuple[str, ...],
    keep_grad_input: bool,
    gemm: Products,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
) -> Result:
    """The numbers, and what their gradient needs; with `keep_grad_input` (dense only) dX for an upstream of 1."""
    device = student.input.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_matmul(precision):
        projects = restriction.projects(isinstance(teacher, Cached), outputs)
        chunks = plan(
            student, mask, pack, memory_budget, gemm, tiles=sum(projects), width=restriction.width,
            teacher_hidden=teacher.weight.shape[1] if isinstance(teacher, Head) else 0, gradient=keep_grad_input,
        )  # fmt: skip
        call = _Forward(student, teacher, given, target, restriction, outputs, keep_grad_input, gemm, chunks, projects)
        for _, take, keep in chunks.parts():
            call.run(take, keep)
        return Result(call.numbers, call.ids, call.entries, call.rest, call.grad_input)


@dataclass
class _Forward:
    """Buffers and outputs of one call, filled chunk by chunk."""

    student: Head
    teacher: Head | Cached
    given: Tensor | None
    target: Tensor | None
    restriction: Restriction
    outputs: tuple[str, ...]
    keep_grad_input: bool
    gemm: Products
    chunks: Chunks
    projects: tuple[bool, bool]

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Head):
            self.student, self.teacher = prepared(self.gemm, self.student, self.teacher)
        else:
            (self.student,) = prepared(self.gemm, self.student)
        x, vocabulary, width = self.student.input, self.student.weight.shape[0], self.restriction.width
        self.numbers = x.new_zeros(len(NUMBERS), x.shape[0], dtype=self.gemm.accumulate)
        self.ids = torch.full((x.shape[0], width), PADDING, dtype=torch.int64, device=x.device)
        self.entries = self.numbers.new_zeros(x.shape[0], width)
        self.rest = self.numbers.new_zeros(x.shape[0])
        self.grad_input = x.new_zeros(x.shape) if self.keep_grad_input else None
        self.tiles = self.numbers.new_empty(sum(self.projects) * self.chunks.size * vocabulary)
        self.stacked = (
            all(self.projects)
            and isinstance(self.teacher, Head)
            and same_tensor(self.student.weight, self.teacher.weight)
            and same_tensor(self.student.bias, self.teacher.bias)
        )

    def run(self, take: slice | Tensor, keep: Tensor | None) -> None:
        """One chunk: the support, both sides on it, the divergence and its gradient there."""
        r = self.restriction
        hidden = hidden_states(self.student.input, take, keep)
        other = hidden_states(self.teacher.input, take, keep) if isinstance(self.teacher, Head) else None
        student, teacher = self._project(hidden, other)
        ids, broken = self._support(student, teacher, take, keep)
        numbers = self.numbers.new_zeros(len(NUMBERS), ids.shape[0])
        z, statistics = self._look(self.student, hidden, student, ids, "student_mass", "student_logprob")
        if isinstance(self.teacher, Head) and other is not None:
            y, of_teacher = self._look(self.teacher, other, teacher, ids, "teacher_mass")
        else:
            y, of_teacher = self.teacher.logprobs[take], None  # type: ignore[union-attr]
        logprobs, student_rest = (z, None) if statistics is None else statistics.split(z, ids)
        teacher_logprobs, teacher_rest = (y, None) if of_teacher is None else of_teacher.split(y, ids)
        numbers[1] = rows_support.log_mass(logprobs, ids).exp()[:, 0]
        numbers[2] = (mass := rows_support.log_mass(teacher_logprobs, ids)).exp()[:, 0]
        rests = None
        if r.tail == "bucket" and student_rest is not None:
            rests = (
                student_rest,
                rows_support.log_rest(mass.clamp_max(MAX_LOG_MASS)) if teacher_rest is None else teacher_rest,
            )
        if student is not None and statistics is not None and self.target is not None:
            numbers[3] = rows_torch.target_logprob(student, statistics, self.target[take])
        a, b = (logprobs, teacher_logprobs) if r.dense else (z, y)
        value, entries = rows_support.support_divergence(a, b, ids, rests, r)
        numbers[0] = value.masked_fill(broken, torch.nan)
        entries = entries.masked_fill(broken[:, None], torch.nan)
        if keep is not None:
            numbers, entries = numbers.masked_fill(~keep, 0), entries.masked_fill(~keep[:, None], 0)
        self._store(numbers, ids, entries, z, take)
        if self.grad_input is not None and student is not None and statistics is not None:
            rows_torch.gradient_(student, statistics, ids, self.entries[take], self.rest[take], self.student.transform)
            if keep is not None:
                student.masked_fill_(~keep[:, None], 0)
            out = torch.empty_like(hidden)
            self.gemm.grad_input(self.gemm.round_gradient(student), self.student.weight, out)
            self.grad_input[take] = out

    def _store(self, numbers: Tensor, ids: Tensor, entries: Tensor, z: Tensor, take: slice | Tensor) -> None:
        self.numbers[:, take], self.ids[take] = numbers, ids
        if self.restriction.dense:
            self.rest[take] = entries.sum(-1).to(numbers.dtype)
        else:
            entries = rows_support.to_raw(entries, z, self.student.transform)
        self.entries[take] = entries.to(numbers.dtype)

    def _project(self, hidden: Tensor, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Tiles of raw logits, where the whole vocabulary must be seen."""
        count, vocabulary = hidden.shape[0], self.student.weight.shape[0]
        tiles = self.tiles[: sum(self.projects) * count * vocabulary].view(-1, vocabulary)
        student = tiles[:count] if self.projects[0] else None
        teacher = tiles[-count:] if self.projects[1] else None
        if self.stacked and other is not None:  # one product reads the weight once
            self.gemm.project(torch.cat([hidden, other]), self.student.weight, self.student.bias, tiles)
            return student, teacher
        if student is not None:
            self.gemm.project(hidden, self.student.weight, self.student.bias, student)
        if teacher is not None and other is not None and isinstance(self.teacher, Head):
            self.gemm.project(other, self.teacher.weight, self.teacher.bias, teacher)
        return student, teacher

    def _support(
        self, student: Tensor | None, teacher: Tensor | None, take: slice | Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ids (C, width), and (C,) whether a row that was searched has no distribution."""
        r, broken = self.restriction, self.numbers.new_zeros((), dtype=torch.bool)
        student_ids = teacher_ids = None
        if student is not None and r.support not in (GIVEN, "teacher"):
            student_ids, broken = rows_torch.largest(student, r.k)
        if isinstance(self.teacher, Cached):
            teacher_ids = self.teacher.ids[take]
        elif teacher is not None and r.support not in (GIVEN, "student"):
            teacher_ids, no_teacher = rows_torch.largest(teacher, r.k)
            broken = broken | no_teacher
        if self.given is not None:
            ids = self.given[take]
        elif r.support in ("union", "intersection") and student_ids is not None and teacher_ids is not None:
            ids = rows_support.combine(student_ids, teacher_ids, r.support)
        else:
            ids = student_ids if student_ids is not None else teacher_ids  # type: ignore[assignment]
        if keep is not None:
            ids = ids.masked_fill(~keep[:, None], PADDING)
        return ids, broken.expand(ids.shape[0])

    def _look(
        self, head: Head, hidden: Tensor, tile: Tensor | None, ids: Tensor, *names: str
    ) -> tuple[Tensor, rows_torch.Statistics | None]:
        """z at `ids` (C, K); the sums over the vocabulary if a restriction or an output in `names` uses them."""
        if tile is None:
            return to_z_(rows_sparse.logits_at(self.gemm, hidden, head, ids), head.transform), None
        z = to_z_(rows_torch.at(tile, ids), head.transform)
        if self.restriction.dense or any(name in self.outputs for name in names):
            return z, rows_torch.statistics_(tile, ids, head.transform)
        return z, None


def linear_topk_divergence_backward(
    student: Head,
    ids: Tensor,  # (N, width)
    entries: Tensor,  # (N, width) of Result, times the upstream gradient
    rest: Tensor,  # (N,) likewise
    mask: Tensor | None,
    *,
    dense: bool,
    need: Need,
    gemm: Products,
    memory_budget: int | None = None,
    pack: bool = True,
    precision: str | None = None,
) -> Gradients:
    """dX, dW, dbias: from the K entries alone, or (dense) with the student's logits projected again."""
    x, weight, bias, transform = student
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), exact_matmul(precision):
        chunks = plan(
            student, mask, pack, memory_budget, gemm, tiles=int(dense), teacher_hidden=0, width=ids.shape[1],
            gradient=dense,
        )  # fmt: skip
        grad_input = x.new_zeros(x.shape) if need.input else None
        grad_weight = x.new_zeros(weight.shape, dtype=gemm.accumulate) if need.weight else None
        grad_bias = x.new_zeros(weight.shape[0], dtype=gemm.accumulate) if need.bias else None
        read = prepared(gemm, student)[0].weight
        buffer = entries.new_empty(dense * chunks.size * weight.shape[0])
        for _, take, keep in chunks.parts():
            hidden, at = hidden_states(x, take, keep), ids[take]
            if not dense:
                out = rows_sparse.gradients_(gemm, at, entries[take], hidden, read, grad_weight, grad_bias, need.input)
                if grad_input is not None:
                    grad_input[take] = out.to(x.dtype)
                continue
            tile = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], -1)
            gemm.project(hidden, read, bias, tile)
            statistics = rows_torch.statistics_(tile, at, transform)
            rows_torch.gradient_(tile, statistics, at, entries[take], rest[take], transform)
            if keep is not None:
                tile.masked_fill_(~keep[:, None], 0)
            if grad_bias is not None:
                grad_bias += tile.sum(0)
            grad = gemm.round_gradient(tile)
            if grad_input is not None:
                out = torch.empty_like(hidden)
                gemm.grad_input(grad, read, out)
                grad_input[take] = out
            if grad_weight is not None:
                gemm.grad_weight(grad, hidden, grad_weight)
        return Gradients(
            grad_input,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
