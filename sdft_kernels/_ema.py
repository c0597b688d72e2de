"""Exponential moving averages of parameters: by the compiled operators where they fit, else in PyTorch."""

from __future__ import annotations

import torch

from ._native import has_native


def ema_update_(ema: torch.Tensor, param: torch.Tensor, rate: float) -> torch.Tensor:
    """Move an exponential moving average towards a parameter, in place: ``ema += rate * (param - ema)``.

    The arithmetic is fp32 whatever the parameter's dtype: at rate 0.01 a bf16 average would round most updates away.

    Args:
        ema: any shape, fp32. Changed in place.
        param: the same shape, any floating dtype, any device (moved to `ema`'s).
        rate: in [0, 1]; 0 changes nothing, 1 copies `param` exactly.

    Returns:
        `ema`. Nothing is differentiable; gradients are neither recorded nor required off.

    Raises:
        ValueError: shapes differ, `ema` is not fp32, `param` is not floating, or `rate` is outside [0, 1].
    """
    if ema.dtype != torch.float32:
        raise ValueError(f"ema must be torch.float32, got {ema.dtype}")
    _check_ema(param, rate, ema=ema)
    with torch.no_grad():
        if _fits_native(ema, param) and has_native():
            torch.ops.sdft_kernels.ema_update_(ema, param, rate)
            # The dispatcher does not count in-place changes of operators without an autograd kernel.
            torch.autograd.graph.increment_version(ema)
        else:
            _ema_update_torch(ema, param, rate)
    return ema


def ema_update_hilo_(
    high: torch.Tensor, low: torch.Tensor, param: torch.Tensor, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ema_update_` for an average kept as two bf16 tensors, ``high + low``, in place.

    `high` is the average rounded to bf16, to nearest: what a bf16 model runs with. `low` is the bf16 of the remainder.
    The arithmetic is fp32; between updates the average keeps about 17 bits, so it stands still where an update is below
    2**-18 of it. Where `high` is inf or NaN, `low` is 0. The same bits on every processor.

    Args:
        high: any shape, bf16, as `split_hilo` makes it. Changed in place.
        low: the same. Changed in place.
        param: the same shape, any floating dtype, any device (moved to `high`'s).
        rate: in [0, 1]; 0 changes nothing, 1 splits `param`.

    Returns:
        `high` and `low`. Nothing is differentiable.

    Raises:
        ValueError: shapes differ, `high` or `low` is not bf16, `param` is not floating, or `rate` is outside [0, 1].
    """
    for name, part in (("high", high), ("low", low)):
        if part.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be torch.bfloat16, got {part.dtype}")
    _check_ema(param, rate, high=high, low=low)
    with torch.no_grad():
        if _fits_native(high, low, param) and has_native():
            torch.ops.sdft_kernels.ema_update_hilo_(high, low, param, rate)
            torch.autograd.graph.increment_version((high, low))
        else:
            _ema_update_hilo_torch(high, low, param, rate)
    return high, low


def split_hilo(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`value` (any shape, any floating dtype) as two new bf16 tensors whose fp32 sum it is, to 17 bits."""
    wide = value.detach().float()
    high = wide.bfloat16()
    low = (wide - high.float()).bfloat16()
    return high, torch.where(high.isfinite(), low, 0.0)


def _check_ema(param: torch.Tensor, rate: float, **averages: torch.Tensor) -> None:
    if not param.is_floating_point():
        raise ValueError(f"param must have a floating dtype, got {param.dtype}")
    for name, average in averages.items():
        if average.shape != param.shape:
            raise ValueError(f"param must have {name}'s shape {tuple(average.shape)}, got {tuple(param.shape)}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")


def _fits_native(*tensors: torch.Tensor) -> bool:
    return all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.dtype in (torch.float32, torch.bfloat16)
        for tensor in tensors
    )


def _ema_update_torch(ema: torch.Tensor, param: torch.Tensor, rate: float) -> None:
    value = param.detach().to(device=ema.device, dtype=torch.float32)
    if rate == 1.0:
        ema.copy_(value)  # lerp_ gives NaN for inf: 0 * inf; likewise at rate 0
    elif rate > 0.0:
        ema.lerp_(value, rate)


def _ema_update_hilo_torch(high: torch.Tensor, low: torch.Tensor, param: torch.Tensor, rate: float) -> None:
    """The bits of `csrc/cpu/kernels/ema.cpp`; not by lerp_, which some processors run as a fused multiply-add."""
    if rate == 0.0:
        return
    value = param.detach().to(device=high.device, dtype=torch.float32)
    average = high.float().add_(low)
    if rate < 0.5:
        average.add_((value - average).mul_(rate))
    elif rate < 1.0:
        average = value - (value - average).mul_(1.0 - rate)
    else:
        average = value
    for part, new in zip((high, low), split_hilo(average), strict=True):
        part.copy_(new)
