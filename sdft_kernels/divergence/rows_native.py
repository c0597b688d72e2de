"""Row kernels in C++: one compiled operator over raw logits, `sdft_kernels::divergence_rows_`.

CPU: a row of both models is read twice, the second time from the cache, by the build for the processor's instruction
set. CUDA has the affine kernel alone: a cluster of thread blocks keeps the row in shared memory and reads it once.
Rows of a tile are padded (`_rows.row_stride`); a gradient in bf16 lies in the lower half of the fp32 row that it was
computed from. All else of a row is then 0: library products may read past a row's end, where 0 times NaN would be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._head import Transform
from .._rows import on_device, whole_rows
from .._rows import row_stride as row_stride
from .fields import DIFFERENTIABLE
from .statistics import PARTIAL, STATE

ROUNDS = True  # gradients come out in the dtype of the next product; the driver need not copy them


def scratch_bytes(count: int, vocabulary: int, itemsize: int, device_type: str = "cpu") -> int:
    """Bytes that a call on `count` rows needs beyond the two tiles: none."""
    return 0


def affine_(
    student: Tensor,  # (C, V) raw logits; overwritten if `gradient_dtype`
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,) int64
    weights: dict[str, Tensor],  # field -> (C,)
    old_logprob: Tensor | None,  # (C,)
    importance_clip: float | None,
    transforms: tuple[Transform, Transform],
    alpha: float | None,  # strictly between 0 and 1, or None: no JSD
    keep: Tensor | None,  # (C,) bool; a row that is not kept gets zeros everywhere, whatever it holds
    tokens: Tensor,  # (8, C) of zeros; receives the fields
    loss: Tensor,  # (C,) of zeros; receives ratio * sum_k weights_k field_k
    gradient_dtype: torch.dtype | None,  # None: no gradient
) -> Tensor | None:
    """Statistics, token loss and gradient of a tile; returns dL/dlogits, (C, V), which lies in the student's tile."""
    gradient = None if gradient_dtype is None else whole_rows(student, gradient_dtype)
    clipped = importance_clip is not None and old_logprob is not None
    _run(
        "affine", student, teacher, transforms, alpha, target, keep, weights=_table(weights, student),
        old_logprob=old_logprob if clipped else None, importance_clip=importance_clip if clipped else None,
        tokens=tokens, loss=loss, gradient=gradient,
    )  # fmt: skip
    return None if gradient is None else _sealed(gradient, student.shape[1])


def divergence_stats(
    student: Tensor,  # (C, V) raw logits
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,)
    transforms: tuple[Transform, Transform],
    alpha: float | None,  # strictly between 0 and 1, or None: no JSD
    keep: Tensor | None,  # (C,) bool
    tokens: Tensor,  # (8, C) of zeros; receives the fields
) -> Tensor:
    """All fields of a tile, for a token loss that is not known yet; returns what `divergence_grad_` needs of them."""
    state = tokens.new_zeros(len(STATE), tokens.shape[1], dtype=torch.float64)
    _run("stats", student, teacher, transforms, alpha, target, keep, tokens=tokens, state=state)
    return state


def partial_statistics(
    student: Tensor,  # (C, V) raw logits of a part of the vocabulary
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,) positions within the part; -100 where the target is elsewhere
    transforms: tuple[Transform, Transform],
    keep: Tensor | None,  # (C,) bool; a row that is not kept holds anything
) -> Tensor:
    """(len(PARTIAL), C): the sums of `statistics.PARTIAL` over this part."""
    partial = student.new_zeros(len(PARTIAL), student.shape[0], dtype=torch.float64)
    _run("partial", student, teacher, transforms, None, target, keep, partial=partial)
    return partial


def repivot_(student: Tensor, teacher: Tensor, partial: Tensor, state: Tensor) -> None:
    """Nothing: these kernels leave raw logits, and pivot as they read."""


def mixture_sums(
    student: Tensor,  # (C, V) raw logits
    teacher: Tensor,  # (C, V) likewise
    state: Tensor,  # (len(STATE), C), of any floating dtype
    transforms: tuple[Transform, Transform],
    alpha: float,
    keep: Tensor | None,  # (C,) bool
) -> Tensor:
    """(2, C): this part's share of KL(p_s || m) and KL(p_t || m)."""
    sums = student.new_zeros(2, student.shape[0])
    _run("mixture", student, teacher, transforms, alpha, None, keep, state=state, sums=sums)
    return sums


def divergence_grad_(
    student: Tensor,  # (C, V) as `divergence_stats` left it; overwritten
    teacher: Tensor,  # (C, V) likewise
    state: Tensor,  # what `divergence_stats` returned
    target: Tensor | None,  # (C,)
    upstream: dict[str, Tensor],  # field -> dL/dfield (C,)
    transforms: tuple[Transform, Transform],
    alpha: float | None,
    keep: Tensor | None,  # (C,) bool
    gradient_dtype: torch.dtype,
) -> Tensor:
    """dL/dlogits, (C, V), which lies in the student's tile."""
    gradient = whole_rows(student, gradient_dtype)
    weights = _table(upstream, student)
    _run("gradient", student, teacher, transforms, alpha, target, keep, weights=weights, state=state, gradient=gradient)
    return _sealed(gradient, student.shape[1])


def _table(weights: dict[str, Tensor], like: Tensor) -> Tensor:
    """(5, C) in the order of `DIFFERENTIABLE`; 0, which drops a field, where it has no weight."""
    table = like.new_zeros(len(DIFFERENTIABLE), like.shape[0])
    for name, weight in weights.items():
        table[DIFFERENTIABLE.index(name)] = weight
    return table


def _sealed(whole: Tensor, vocabulary: int) -> Tensor:
    """The gradient in `whole` rows; what follows it is 0, which the CPU kernels write while a row is in the cache."""
    if whole.device.type != "cpu":
        whole[:, vocabulary:].zero_()
    return whole[:, :vocabulary]


def _run(
    stage: str,
    student: Tensor,
    teacher: Tensor,
    transforms: tuple[Transform, Transform],
    alpha: float | None,
    target: Tensor | None,
    keep: Tensor | None,
    *,
    importance_clip: float | None = None,
    weights: Tensor | None = None,
    old_logprob: Tensor | None = None,
    tokens: Tensor | None = None,
    loss: Tensor | None = None,
    state: Tensor | None = None,
    partial: Tensor | None = None,
    sums: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    factors = [factor for transform in transforms for factor in _factors(transform)]
    stream = torch.cuda.current_stream(student.device).cuda_stream if student.device.type == "cuda" else 0
    with on_device(student):
        torch.ops.sdft_kernels.divergence_rows_(
            stage, student, teacher,
            None if target is None else target.contiguous(),
            None if keep is None else keep.contiguous().view(torch.uint8),
            weights, None if old_logprob is None else old_logprob.contiguous(), importance_clip or 0.0,
            *factors, transforms[0].slope, alpha, tokens, loss,
            None if state is None else state.double(), partial, sums, gradient, stream,
        )  # fmt: skip


def _factors(transform: Transform) -> tuple[float, float]:
    """Inner and outer factor of z = outer tanh(inner a); an inner one of 0 says z = outer a."""
    cap = transform.softcap
    return (0.0, transform.slope) if cap is None else (transform.scale / cap, cap / transform.temperature)
