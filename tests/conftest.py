"""Fixtures that every test runs under: a seed, one thread, and uninitialised memory that shows when it is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

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
