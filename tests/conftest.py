"""Fixtures that every test runs under: a seed, one thread, and uninitialised memory that shows when it is used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Triton decides while it is imported, and again at each kernel's decorator, whether it compiles or interprets. The
    # variable goes again, so that no other test and no child process sees it; `interpreted` sets it for one test.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("sdft_kernels.divergence.rows_triton")
    importlib.import_module("sdft_kernels.prefix_attention.fused_triton")
    del os.environ["TRITON_INTERPRET"]

# Cached by torch at its first use: it must hold the allocators themselves, not those that a test has patched, or
# `torch.device("meta")` has no effect on them afterwards.
importlib.import_module("torch.utils._device")._device_constructors()

THREADS = 1  # tiny tensors: a second thread only waits at barriers, for minutes if the machine is busy


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        if out.is_floating_point() and out.device.type != "meta":
            with torch.no_grad():
                out.detach().fill_(float("nan"))
        return out

    return allocate_nan


@pytest.fixture(autouse=True)
def _poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floating memory from the allocators holds NaN, so an element that is never written reaches an assertion.

    Fresh memory is zero more often than not: without this, a row that a kernel forgets passes on a quiet machine.
    `@pytest.mark.unpoisoned` is for torch.compile, which does not trace through a patched allocator.
    """
    if request.node.get_closest_marker("unpoisoned"):
        return
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton kernels run: a GPU, as they ship; else the CPU, interpreted, with blocks of 128 logits."""
    rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    small = rows_triton.Configuration(None, 128, 4, 64)
    monkeypatch.setattr(rows_triton, "choose", lambda vocabulary, capability: small)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", _fused_multiply_add)
    return torch.device("cpu")


def _fused_multiply_add(_: object, x: Any, y: Any, z: Any) -> Any:
    """The interpreter rounds the product too, which is what the kernels' exp uses an fma to avoid."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return type(z)(exact.astype(z.data.dtype), z.dtype.scalar)
