"""Checks of arguments that the ops over an LM head share. One error per bad argument: its name, its value, the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ._dispatch import debug_enabled
from ._head import ABSENT_TARGET

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def accumulate_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of logits, sums and per-token numbers for products of `operand`."""
    return torch.float64 if operand == torch.float64 else torch.float32


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """The same memory read the same way (or both None)."""
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def operand_dtype(input: Tensor) -> torch.dtype:
    """dtype that the operands of the products are rounded to: autocast's where it is on, else the input's own.

    Raises:
        ValueError: it is fp16.
    """
    device = input.device.type
    operand = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if operand == torch.float16:
        raise ValueError("fp16 is not supported (its range ends at 65504): use bf16 or fp32, or autocast to bf16")
    return operand


def check_positive(values: Mapping[str, float | None]) -> None:
    """Scales, softcaps, temperature: positive and finite, or None."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_precision(precision: str | None, input: Tensor) -> None:
    """None, or TF32 where it exists."""
    if precision not in (None, "tf32"):
        raise ValueError(f"precision must be None or 'tf32', got {precision!r}")
    if precision == "tf32" and (input.device.type != "cuda" or input.dtype != torch.float32):
        raise ValueError("precision='tf32' is for fp32 inputs on CUDA")


def check_tensors(values: Mapping[str, object]) -> None:
    """Tensors, or None where the caller has let None through."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def _whole(name: str) -> str:
    """How to pass a sharded head. Plain `full_tensor()` leaves each shard the gradient of its own process, silently."""
    if name.startswith("teacher"):
        return f"pass {name}.detach().full_tensor(), called on every process"
    return (
        "call the loss in the head's own forward if the head is an FSDP2 unit, else in the forward of the unit that "
        f'holds it: the weight is whole there; or pass {name}.full_tensor(grad_placements=[Partial("avg")]), which '
        "averages its gradient over the processes as FSDP2 does (Partial is in torch.distributed.tensor)"
    )


def check_weight(name: str, weight: Tensor) -> None:
    """Whole and local: a head that a wrapper has sharded cannot be read here."""
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{name} is a DTensor: {_whole(name)}")
    if weight.numel() == 0:
        raise ValueError(
            f"{name} is empty, {tuple(weight.shape)}: a sharded parameter (ZeRO-3) must be gathered around this call"
        )


def check_matrices(tensors: Mapping[str, Tensor]) -> None:
    """Two dimensions each."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be 2-D, got {tuple(tensor.shape)}")


def check_shapes(
    tensors: Mapping[str, Tensor | None], expected: Mapping[str, tuple[int, ...]], input: Tensor, input_name: str
) -> None:
    """The expected shape, on the device of the input; None passes."""
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            hint = " (both models must share a vocabulary)" if name == "teacher_weight" else ""
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}{hint}")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device} but {input_name} is on {input.device}")


def check_index_dtypes(target: Tensor | None, mask: Tensor | None) -> None:
    """bool mask, int64 target."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if target is not None and target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")


def check_float_dtypes(tensors: Mapping[str, Tensor | None], input: Tensor, input_name: str) -> None:
    """fp32, bf16 or fp64; outside autocast all the same."""
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be fp32, bf16 or fp64, got {tensor.dtype}")
        if not autocast and tensor.dtype != input.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but {input_name} is {input.dtype}: cast one, or use autocast")


def check_teacher_grad(
    teacher_input: Tensor | None, teachers: Mapping[str, tuple[Tensor | None, Tensor | None]]
) -> None:
    """The teacher gets no gradient: `teachers` maps a parameter's name to it and to the student's."""
    if teacher_input is not None and teacher_input.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_input requires grad: compute the teacher under torch.no_grad(), or detach it")
    for name, (tensor, own) in teachers.items():
        if tensor is not None and tensor.requires_grad and not same_tensor(tensor, own):
            raise ValueError(f"{name} requires grad and is not the student's: it would get none; pass {name}.detach()")


def values_are_visible(tensor: Tensor) -> bool:
    """Whether looking at values is free (CPU, outside compilation) or asked for (debug)."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or debug_enabled())


def check_target_range(target: Tensor | None, mask: Tensor | None, vocabulary: int) -> None:
    """In the vocabulary or absent, where the values are visible."""
    if target is None or not values_are_visible(target):
        return
    wrong = (target != ABSENT_TARGET) & ((target < 0) | (target >= vocabulary))
    if mask is not None:
        wrong &= mask
    if wrong.any():
        where = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target[{where}] is {int(target[where])}: must be in [0, {vocabulary}), or {ABSENT_TARGET} for absent"
        )
