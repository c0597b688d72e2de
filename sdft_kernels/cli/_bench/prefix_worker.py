"""One variant of `bench attention` or `bench step` in a process of its own; modes and answers as those of `worker`."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from sdft_kernels.cli._bench.prefix_case import GATE_TOLERANCE, PrefixRequest
from sdft_kernels.cli._bench.worker import answer, device_name, peak_resident_bytes, serve


class Workload(Protocol):
    """What is timed: `run` leaves gradients behind, `clear` drops them."""

    def run(self) -> Any: ...
    def clear(self) -> None: ...
    def allocate_gradients(self) -> None: ...
    def results(self) -> dict[str, Tensor]: ...
    def predictions(self) -> dict[str, float]: ...


def build(request: PrefixRequest, *, small: bool = False, exact: bool = False) -> Workload:
    """The workload of `request`; `small`: with few tokens; `exact`: the floor's in fp64."""
    case = request.case.small() if small else request.case
    make = importlib.import_module(f"sdft_kernels.cli._bench.{case.kind}").build
    workload: Workload = make(case, request.variant, exact=exact)
    return workload


def check(request: PrefixRequest) -> dict[str, float]:
    """Relative errors of the variant on few tokens against whole sequences in fp64.

    Raises:
        ValueError: one is larger than `GATE_TOLERANCE`.
    """
    truth = build(request, small=True, exact=True).results()
    found = build(request, small=True).results()
    errors = {}
    for name, wanted in truth.items():
        error = ((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()
        # Written so that a NaN fails.
        if not error <= GATE_TOLERANCE[request.case.dtype]:
            raise ValueError(f"not timed: its {name} is off fp64 by {error:.2g} relative, on few tokens")
        errors[f"{name}_error"] = error
    return errors


def timed(workload: Workload, device: str) -> float:
    """Return the seconds of one repetition, gradients allocated anew."""
    workload.clear()
    _synchronize(device)
    start = time.perf_counter()
    workload.run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def serve_time(request: PrefixRequest, channel: TextIO, mode: str) -> None:
    """Check, warm up, then answer ``{"seconds": …}`` to each line until stdin closes."""
    device = request.case.device
    errors = check(request)
    workload = build(request)
    timed(workload, device)
    told = {"device": device_name(device), "threads": torch.get_num_threads()}
    answer(channel, **told, **errors, **workload.predictions())
    for _ in sys.stdin:
        answer(channel, seconds=timed(workload, device))


def serve_memory(request: PrefixRequest, channel: TextIO, mode: str) -> None:
    """Answer ``{"peak_bytes": …}``; on CUDA also ``baseline_bytes``, since the allocator counts exactly."""
    warmup = build(request, small=True)
    warmup.run()
    warmup.clear()
    workload = build(request)
    if request.case.device == "cuda":
        workload.allocate_gradients()
        baseline = torch.cuda.memory_allocated()
        workload.clear()
        torch.cuda.reset_peak_memory_stats()
        workload.run()
        torch.cuda.synchronize()
        answer(channel, peak_bytes=torch.cuda.max_memory_allocated(), baseline_bytes=baseline)
        return
    workload.allocate_gradients() if mode == "baseline" else workload.run()
    answer(channel, peak_bytes=peak_resident_bytes())


if __name__ == "__main__":
    modes = {"time": serve_time, "memory": serve_memory, "baseline": serve_memory}
    raise SystemExit(serve(PrefixRequest.from_json, modes))
