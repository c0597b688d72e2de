"""Which implementation an op runs: one table, no silent fallback."""

from __future__ import annotations

import os

IMPLEMENTATIONS = ("auto", "reference", "torch", "native", "triton")

# Why a row kernel of design's list cannot run in this release. An op asks here before it imports anything.
_UNAVAILABLE = {
    "native": "the C++/CUDA row kernels are not part of this release",
    "triton": "the Triton row kernels are not part of this release",
}


def resolve(impl: str, op: str = "linear_divergence") -> str:
    """Return the implementation that `op` runs for `impl`: ``"reference"`` or ``"torch"``.

    Raises:
        ValueError: `impl` is not one of `IMPLEMENTATIONS`.
        RuntimeError: `impl` was asked for by name and cannot run; the message says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl in _UNAVAILABLE:
        raise RuntimeError(f"{op}(impl={impl!r}) cannot run: {_UNAVAILABLE[impl]}; use impl='auto'")
    return "torch" if impl == "auto" else impl


def available(op: str = "linear_divergence") -> dict[str, str]:
    """Map every implementation of `op` to ``"available"`` or to the reason why it cannot run."""
    return {name: _UNAVAILABLE.get(name, "available") for name in IMPLEMENTATIONS if name != "auto"}


def debug_enabled() -> bool:
    """True if ``SDFT_KERNELS_DEBUG=1``: check what costs a host synchronisation or a second evaluation."""
    return os.environ.get("SDFT_KERNELS_DEBUG", "0") not in ("", "0")
