"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


def give_back_freed_memory(device: torch.device) -> None:
    """On CPU under glibc, return the memory of freed tensors to the system; elsewhere nothing.

    glibc keeps freed blocks of up to 32 MiB, between live ones too, and what comes next does not always fit into them.
    Before the backward pass of one step of SmolLM2-135M this takes 0.03 to 0.05 s and lowers the peak of the process by
    some 250 MiB (by hand: 3,810 to 3,551 MiB with activation checkpointing, 4,790 to 4,602 without).
    """
    trim = _malloc_trim() if device.type == "cpu" else None
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
