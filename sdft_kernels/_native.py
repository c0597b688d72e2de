"""The compiled parts: `_ops` (operators over torch's stable ABI) and `_host` (pybind11). Only this module knows them.

Both are optional and loaded on first use. Everything here works without them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

_OPS = "sdft_kernels._ops"
_HOST = "sdft_kernels._host"


def has_native() -> bool:
    """True if the compiled operators are built and load in this process."""
    return not why_not()


@functools.cache
def why_not() -> str:
    """Why the compiled operators cannot be used, in one line; the empty string if they can.

    The first call loads the library. A library that exists but does not load (built for another platform, or needing a
    newer torch) is also reported once as a `RuntimeWarning`, because the caller then silently runs slower code.
    """
    spec = importlib.util.find_spec(_OPS)
    if spec is None or spec.origin is None:
        return _not_built()
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        reason = (
            f"{Path(spec.origin).name} is built but does not load in torch {torch.__version__}: {_first_line(error)}; "
            "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
        warnings.warn(f"sdft_kernels runs without its compiled operators: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    for name in ("ema_update_", "ema_update_hilo_", "divergence_rows_"):
        torch.library.register_fake(f"sdft_kernels::{name}", _changes_in_place_only)
    return ""


def has_cuda_kernels() -> bool:
    """True if the compiled operators hold CUDA kernels, whether or not there is a GPU."""
    return has_native() and torch._C._dispatch_has_kernel_for_dispatch_key("sdft_kernels::divergence_rows_", "CUDA")


@functools.cache
def host() -> ModuleType | None:
    """The compiled host code (`python/stubs/_host.pyi`), or None where it is not built."""
    try:
        return importlib.import_module(_HOST)
    except ImportError:
        return None


def build_info() -> dict[str, str]:
    """How the compiled parts were built: compiler, flags, cuda, torch_target, torch_headers. Empty if they were not."""
    compiled = host()
    info: dict[str, str] = compiled.build_info() if compiled is not None else {}
    return info


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


def _changes_in_place_only(*_: object) -> None:
    """The fake of an operator that returns nothing."""


def _not_built() -> str:
    reason = Path(__file__).with_name("_build_reason.txt")
    if reason.is_file():
        return f"not built when this package was installed: {reason.read_text().strip()}"
    return "not built; from a checkout with cmake and a C++ compiler: pip install --no-build-isolation ."


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
