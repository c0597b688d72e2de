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
from typing import NamedTuple

import torch

_OPS = "sdft_kernels._ops"
_HOST = "sdft_kernels._host"
_IN_PLACE = (
    "prefer_huge_pages_",
    "ema_update_",
    "ema_update_hilo_",
    "divergence_rows_",
    "logits_gemm",
    "weight_grad_gemm",
    "prefix_attention",
    "prefix_attention_backward",
)
_HUGE_BYTES = 8 * 2**20  # a buffer this large holds whole pages of 2 MiB wherever it starts


class PrefixOperands(NamedTuple):
    """What forward and backward of the attention over a prefix tree read.

    Attributes:
        query: (T, Hq, D), fp32, D a multiple of 16, adjacent numbers in the last dimension (so for all).
        key, value: (T, Hkv, D), Hkv a divisor of Hq.
        cached_key, cached_value: (P, Hkv, D) of tokens before every root, or None.
        tiles, segments, ancestor_offsets, ancestors: the tables of a `PrefixTree`, int64; the tiles of any size.
        scale: of the products.
        softcap: 0 for none.
        window: keys that a token sees.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cached_key: torch.Tensor | None
    cached_value: torch.Tensor | None
    tiles: torch.Tensor
    segments: torch.Tensor
    ancestor_offsets: torch.Tensor
    ancestors: torch.Tensor
    scale: float
    softcap: float
    window: int


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
        for name in _IN_PLACE:  # a library of an older version lacks some: an error like any other
            torch.library.register_fake(f"sdft_kernels::{name}", _changes_in_place_only)
    except (OSError, RuntimeError) as error:
        reason = (
            f"{Path(spec.origin).name} is built but does not load in torch {torch.__version__}: {_first_line(error)}; "
            "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
        warnings.warn(f"sdft_kernels runs without its compiled operators: {reason}", RuntimeWarning, stacklevel=2)
        return reason
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


def cpu_isa() -> str:
    """Which build of the CPU kernels this processor gets: ``"avx512_bf16"``, ``"avx512"``, ``"avx2"``, ``"portable"``.

    ATEN_CPU_CAPABILITY (``default``, ``avx2``, ``avx512``) lowers it. The empty string without compiled operators.
    """
    if not has_native():
        return ""
    name: str = torch.ops.sdft_kernels.cpu_isa()
    return name


def logits_gemm(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, few: bool = False) -> None:
    """``out = hidden @ weight.T`` on CPU, with fp32 sums; bf16 operands are multiplied exactly.

    A token's logits are the same bits whatever the other tokens and the number of threads. Where `cpu_isa()` is
    ``"avx512_bf16"``, denormal bf16 operands count as zero and denormal sums become zero (VDPBF16PS does so).

    Args:
        hidden: (n, H), fp32 or bf16.
        weight: (V, H), `hidden`'s dtype.
        out: (n, V), fp32. Overwritten.
        few: for up to some 16 tokens, where packing the weight would take longer than reading it. Sums in another
            order, so other bits.

    Rows may be any distance apart, columns must be adjacent. `has_native()` must have been asked: it loads the library.
    Nothing is differentiable.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit.
    """
    torch.ops.sdft_kernels.logits_gemm(hidden, weight, out, few)
    torch.autograd.graph.increment_version(out)


def weight_grad_gemm(grad: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor) -> None:
    """``total += grad.T @ hidden`` on CPU, bf16 operands and fp32 sums; only where `cpu_isa()` is ``"avx512_bf16"``.

    Args:
        grad: (n, V), bf16.
        hidden: (n, H), bf16.
        total: (V, H), fp32. Changed in place.

    Rows may be any distance apart, columns must be adjacent. Denormals count as zero. Nothing is differentiable.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit, or the processor does not.
    """
    torch.ops.sdft_kernels.weight_grad_gemm(grad, hidden, total)
    torch.autograd.graph.increment_version(total)


def prefix_attention(
    operands: PrefixOperands, sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Attention over a prefix tree on CPU: output and natural-log LSE of every packed token.

    A row's bits depend on its own query and the keys that it sees, whatever the other rows and the number of threads.

    Args:
        operands: fp32.
        sinks: (Hq,) fp32, or None.
        out: (T, Hq, D), fp32, contiguous. Overwritten.
        lse: (T, Hq), fp32, contiguous. Overwritten.

    `has_native()` must have been asked: it loads the library. Nothing is differentiable.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit, or the tables do not describe a tree.
    """
    query, key, value, *others = operands
    torch.ops.sdft_kernels.prefix_attention(query, key, value, sinks, *others, out, lse)
    torch.autograd.graph.increment_version((out, lse))


def prefix_attention_backward(
    operands: PrefixOperands,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    grad_query: torch.Tensor,
    partial: torch.Tensor,
) -> None:
    """The gradients of `prefix_attention`, of the same bits whatever the number of threads.

    Args:
        operands: of the forward.
        out, lse: what the forward wrote.
        grad: (T, Hq, D), fp32, adjacent numbers in its last dimension.
        grad_lse: (T, Hq), fp32, contiguous, or None.
        delta: (T, Hq), fp32, contiguous: rowsum(grad * out) - grad_lse. Overwritten.
        grad_query: (T, Hq, D), fp32, contiguous. Overwritten.
        partial: (parts, 2, T, Hkv, D), fp32, contiguous: ``partial[0]`` becomes the gradients of key and value, the
            others are scratch. ``parts * Hkv`` threads can work at a time. Overwritten.

    Raises:
        RuntimeError: as above.
    """
    torch.ops.sdft_kernels.prefix_attention_backward(*operands, out, lse, grad, grad_lse, delta, grad_query, partial)
    torch.autograd.graph.increment_version((delta, grad_query, partial))


def on_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """`fresh`, a contiguous tensor just allocated, with pages of 2 MiB asked for under it if it is large and on CPU.

    glibc returns large tensors to the system, so each call's buffers are mapped anew, page by page at first use: some
    100 ms for 128 MiB in pages of 4 KiB on a virtual machine (measured by hand), a quarter of that in huge ones.
    """
    if fresh.device.type == "cpu" and fresh.numel() * fresh.element_size() >= _HUGE_BYTES and has_native():
        torch.ops.sdft_kernels.prefer_huge_pages_(fresh)
    return fresh


def peak_flops(dtype: str) -> float:
    """FLOP/s of one core multiplying and adding in registers, without a load: a ceiling for the products above.

    Args:
        dtype: ``"fp32"``, or ``"bf16"`` (VDPBF16PS) where `cpu_isa()` is ``"avx512_bf16"``.

    Raises:
        RuntimeError: another dtype, or the processor cannot.
    """
    rate: float = torch.ops.sdft_kernels.peak_flops(dtype)
    return rate


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
