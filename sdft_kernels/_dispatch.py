"""Which implementation an op runs: one table, no silent fallback."""

from __future__ import annotations

import importlib.util
import os

import torch

from . import _native

IMPLEMENTATIONS = ("auto", "reference", "torch", "native", "triton")

# Row kernels that exist, by op.
_WRITTEN = {
    "linear_divergence": ("reference", "torch", "native", "triton"),
    "linear_token_logprob": ("reference", "torch"),
    "linear_topk_divergence": ("reference", "torch"),
    "shared_prefix_attention": (
        "reference",
        "torch",
        "native",
        "triton",
    ),  # where "torch" goes by the name "composition"
}
_NAMES = {"native": "C++/CUDA", "triton": "Triton"}
_TRITON_MAJOR = 8  # of the compute capability


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


# Looked up once, here, since `torch.compile` can trace neither the import system nor the loading of a library.
_HAS_TRITON = _installed("triton")
_WHY_NOT_NATIVE = _native.why_not()
_HAS_CUDA_KERNELS = _native.has_cuda_kernels()


def resolve(
    impl: str,
    op: str = "linear_divergence",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Return the implementation that `op` runs for `impl`: any of `IMPLEMENTATIONS` but ``"auto"``.

    Args:
        impl: one of `IMPLEMENTATIONS`; ``"auto"`` is Triton on CUDA and native on CPU where they can run, else PyTorch.
        op: name of the op.
        device: of the tensors; None is CUDA where PyTorch sees a GPU, else CPU.
        dtype: in which the op sums.

    Raises:
        ValueError: `impl` is not one of `IMPLEMENTATIONS`.
        RuntimeError: `impl` was asked for by name and cannot run; the message says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    device = _device(device)
    if impl == "auto":
        best = "triton" if device.type == "cuda" else "native"
        return best if why_not(best, op, device, dtype) is None else "torch"
    why = why_not(impl, op, device, dtype)
    if why is not None:
        raise RuntimeError(f"{op}(impl={impl!r}) cannot run: {why}; use impl='auto'")
    return impl


def why_not(
    impl: str, op: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why `impl` cannot run `op` on tensors of this device and dtype; None if it can."""
    if impl not in _WRITTEN[op]:
        return f"the {_NAMES[impl]} row kernels of this op are not part of this release"
    if impl not in _NAMES:
        return None
    device, attends = _device(device), op == "shared_prefix_attention"
    if impl == "native":
        return (_why_not_native_attention(device, dtype) if attends else None) or _why_not_native(device, dtype)
    return _why_not_triton(device, dtype) or (_why_not_triton_attention(device, dtype) if attends else None)


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if _WHY_NOT_NATIVE:
        return f"the compiled operators are {_WHY_NOT_NATIVE}"
    if device.type == "cuda":
        if not _HAS_CUDA_KERNELS:
            return "the compiled operators were built without CUDA kernels (`sdft-kernels env` says why)"
        return "its CUDA kernel is fp32 only" if dtype == torch.float64 else None
    return None if device.type == "cpu" else f"its kernels run on CPU and CUDA, not on {device.type}"


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Only calls that `torch.compile` folds into constants (its own decorator for that costs 2 s of import)."""
    if not _HAS_TRITON:
        return "triton is not installed (pip install 'sdft-kernels[triton]')"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        return (
            None if interpreted else f"its kernels run on CUDA, not on {device.type} (except with TRITON_INTERPRET=1)"
        )
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < _TRITON_MAJOR:
        return f"its kernels need compute capability {_TRITON_MAJOR}.0"
    if dtype == torch.float64:
        return "Triton passes temperatures, scales and alpha in fp32, which is not enough for fp64 inputs"
    return None


def _why_not_native_attention(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its kernels run on CPU, not on {device.type}"
    return "its kernels sum in fp32, which is not enough for fp64" if dtype == torch.float64 else None


def _why_not_triton_attention(device: torch.device, dtype: torch.dtype) -> str | None:
    """Triton's fp32 products without TF32 spill 5 KiB a thread at tiles of 64 x 32, D = 128 (sm_90)."""
    return "on CUDA its kernels are bf16 only" if device.type == "cuda" and dtype != torch.bfloat16 else None


def available(op: str = "linear_divergence") -> dict[str, str]:
    """Map every implementation of `op` to ``"available"`` or to the reason why it cannot run."""
    return {name: why_not(name, op) or "available" for name in IMPLEMENTATIONS if name != "auto"}


def debug_enabled() -> bool:
    """True if ``SDFT_KERNELS_DEBUG=1``: check what costs a host synchronisation or a second evaluation."""
    return os.environ.get("SDFT_KERNELS_DEBUG", "0") not in ("", "0")


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
