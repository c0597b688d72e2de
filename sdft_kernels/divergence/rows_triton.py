"""Row kernels in Triton: launch parameters, and one program per token of the kernels in `kernels_triton`.

Rows of a tile are padded (`_rows.row_stride`), so that every access moves 16 bytes whatever V is. A gradient in bf16
lies in the upper half of the fp32 row that it was computed from. All else of a row is then 0: a library product may
read past a row's end, where 0 times NaN would be NaN.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._head import Transform
from .._rows import on_device, whole_rows
from .._rows import row_stride as row_stride
from .fields import DIFFERENTIABLE
from .kernels_triton import affine_kernel, grad_kernel, mixture_kernel, partial_kernel, stats_kernel
from .statistics import PARTIAL, STATE

ROUNDS = True  # gradients come out in the dtype of the next product; the driver need not copy them
ALIGNMENT = 16  # elements: what Triton needs to know of a stride to use 16-byte accesses
CONFIGURATIONS = Path(__file__).with_name("rows_triton.json")


class Configuration(NamedTuple):
    """Launch parameters for rows of up to `max_vocabulary` logits (None: any)."""

    max_vocabulary: int | None
    block: int
    num_warps: int
    max_registers: int  # a thread


@lru_cache(maxsize=1)
def configurations() -> dict[int, tuple[Configuration, ...]]:
    """The shipped tables by compute capability, shortest rows first; `rows_triton.json` gives each line's reason."""
    tables = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))["tables"]
    return {
        int(capability): tuple(Configuration(*(line[name] for name in Configuration._fields)) for line in lines)
        for capability, lines in tables.items()
    }


def choose(vocabulary: int, capability: int) -> Configuration:
    """The launch parameters for rows of `vocabulary` logits on a device of this capability (90 for sm_90)."""
    table = max(known for known in configurations() if known <= capability)
    lines = configurations()[table]
    return next(c for c in lines if c.max_vocabulary is None or vocabulary <= c.max_vocabulary)


@lru_cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return min(configurations())
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def scratch_bytes(count: int, vocabulary: int, itemsize: int, device_type: str = "cuda") -> int:
    """Bytes that a call on `count` rows needs beyond the two tiles: none."""
    return 0


def affine_(
    student: Tensor,  # (C, V) raw logits, rows `row_stride` apart; overwritten if `gradient_dtype`
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
    gradient = None if gradient_dtype is None else _gradient_view(student, gradient_dtype)
    _launch(
        affine_kernel, student, teacher, transforms, gradient, target, keep, *_weights(weights), old_logprob,
        tokens, loss, alpha=alpha, clip=importance_clip,
    )  # fmt: skip
    return None if gradient is None else _sealed(gradient, student)


def divergence_stats(
    student: Tensor,  # (C, V) raw logits, rows `row_stride` apart
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,)
    transforms: tuple[Transform, Transform],
    alpha: float | None,  # strictly between 0 and 1, or None: no JSD
    keep: Tensor | None,  # (C,) bool
    tokens: Tensor,  # (8, C) of zeros; receives the fields
) -> Tensor:
    """All fields of a tile, for a token loss that is not known yet; returns what `divergence_grad_` needs of them."""
    state = tokens.new_zeros(len(STATE), tokens.shape[1])
    _launch(stats_kernel, student, teacher, transforms, target, keep, tokens, state, alpha=alpha)
    return state


def partial_statistics(
    student: Tensor,  # (C, V) raw logits of a part of the vocabulary, rows `row_stride` apart
    teacher: Tensor,  # (C, V) likewise
    target: Tensor | None,  # (C,) positions within the part; -100 where the target is elsewhere
    transforms: tuple[Transform, Transform],
    keep: Tensor | None,  # (C,) bool; a row that is not kept holds anything
) -> Tensor:
    """(len(PARTIAL), C): the sums of `statistics.PARTIAL` over this part."""
    partial = student.new_zeros(len(PARTIAL), student.shape[0])
    _launch(partial_kernel, student, teacher, transforms, target, keep, partial)
    return partial


def repivot_(student: Tensor, teacher: Tensor, partial: Tensor, state: Tensor) -> None:
    """Nothing: these kernels leave raw logits, and pivot as they read."""


def mixture_sums(
    student: Tensor,  # (C, V) raw logits
    teacher: Tensor,  # (C, V) likewise
    state: Tensor,  # (len(STATE), C)
    transforms: tuple[Transform, Transform],
    alpha: float,
    keep: Tensor | None,  # (C,) bool
) -> Tensor:
    """(2, C): this part's share of KL(p_s || m) and KL(p_t || m)."""
    sums = student.new_zeros(2, student.shape[0])
    _launch(mixture_kernel, student, teacher, transforms, keep, state, sums, alpha=alpha)
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
    gradient = _gradient_view(student, gradient_dtype)
    weights = _weights(upstream)
    _launch(grad_kernel, student, teacher, transforms, gradient, target, keep, *weights, state, alpha=alpha)
    return _sealed(gradient, student)


def _weights(weights: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """In the order of the kernels' arguments, None where a field has no weight."""
    return tuple(weights[name].contiguous() if name in weights else None for name in DIFFERENTIABLE)


def _gradient_view(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of the student's tile that receives the gradient: all of a row, or its upper half in a 2-byte dtype.

    The kernels write zeros in the padding behind a row.
    """
    return whole_rows(tile, dtype)[:, -tile.stride(0) :][:, : tile.shape[1]]


def _sealed(gradient: Tensor, tile: Tensor) -> Tensor:
    """The gradient, with zeros in place of what is left of the logits before its rows."""
    if gradient.dtype != tile.dtype:
        whole_rows(tile, gradient.dtype)[:, : tile.stride(0)].zero_()
    return gradient


def _launch(
    kernel: Any,
    student: Tensor,
    teacher: Tensor,
    transforms: tuple[Transform, Transform],
    *pointers: Tensor | None,
    **options: float | None,
) -> None:
    """One program per row. `pointers`: the kernel's arguments between the teacher and the sizes."""
    (count, vocabulary), stride = student.shape, student.stride(0)
    if stride % ALIGNMENT or stride < vocabulary or teacher.stride() != student.stride() or student.stride(1) != 1:
        raise ValueError(f"tiles need rows {row_stride(vocabulary)} apart, got strides {student.stride()}")
    if count == 0:
        return
    arguments: dict[str, Any] = dict(zip(kernel.arg_names[2:], pointers, strict=False))
    if arguments.get("keep") is not None:
        arguments["keep"] = arguments["keep"].view(torch.uint8)
    for side, transform in zip("st", transforms, strict=True):
        cap = transform.softcap
        arguments[f"inner_{side}"] = 1.0 if cap is None else transform.scale / cap
        arguments[f"outer_{side}"] = transform.slope if cap is None else cap / transform.temperature
        arguments[f"CAPPED_{side.upper()}"] = cap is not None
    if "gradient" in arguments:
        gradient = arguments["gradient"]
        arguments["slope_s"] = transforms[0].slope
        arguments["gradient_stride"] = stride if gradient is None else gradient.stride(0)
    configuration = choose(vocabulary, _capability(student.device))
    if torch.version.hip is None:
        options["maxnreg"] = configuration.max_registers
    with on_device(student):
        kernel[(count,)](
            student, teacher, count=count, vocabulary=vocabulary, stride=stride, **arguments, **options,
            BLOCK=configuration.block, num_warps=configuration.num_warps,
        )  # fmt: skip
