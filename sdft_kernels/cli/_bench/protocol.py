"""The measuring parent: one worker per variant, each repetition paired with the floor, peak memory apart.

A machine's speed drifts (clock, neighbours) by more than the differences of interest, so repetition r runs ``gemm4``,
then the variant, and the result is the median of the pairwise ratios, not a ratio of medians taken minutes apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

from sdft_kernels.cli._bench.case import Case, Request
from sdft_kernels.cli._progress import Progress

# One repetition of the slowest peer on the largest shape takes minutes on two cores: one silent this long is stuck.
WORKER_TIMEOUT_S = 1800


class WorkerError(Exception):
    """A worker answered with an error, died, or was silent for `WORKER_TIMEOUT_S`."""


class Worker:
    """A running worker process; leaving the context ends it."""

    def __init__(self, mode: str, request: Request) -> None:
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sdft_kernels.cli._bench.worker", mode, request.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()

    def read(self) -> dict[str, Any]:
        """Return the worker's next answer.

        Raises:
            WorkerError: there is none, or it is an error.
        """
        assert self.process.stdout is not None
        timer = threading.Timer(WORKER_TIMEOUT_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"its process ended with status {self.process.wait()}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def time_once(self) -> float:
        """Return the seconds of one repetition."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except OSError:
            pass  # The worker is gone: read() says how it ended.
        return float(self.read()["seconds"])

    def _last_words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last}" if last else ""


@dataclass
class Result:
    """What was measured of one variant. `note` says why numbers are missing; `failed` is True if it should have run.

    seconds, floor_seconds: one per repetition, pair by pair. errors: relative, against fp64. peak_bytes: beyond inputs
    and gradients.
    """

    request: Request
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    device_name: str = ""
    note: str = ""
    failed: bool = False

    @property
    def ratios(self) -> list[float]:
        """Time over the floor's, pair by pair."""
        return [mine / floor for mine, floor in zip(self.seconds, self.floor_seconds, strict=True)]

    @property
    def median_ratio(self) -> float:
        """Median of `ratios`, NaN if nothing was timed."""
        return median(self.ratios) if self.seconds else float("nan")


def measure_case(case: Case, progress: Progress) -> list[Result]:
    """Measure every variant of `case`, ``gemm4`` first; takes `case.steps` of `progress`.

    Raises:
        RuntimeError: the floor itself cannot run, so that there is nothing to compare with.
    """
    floor_request, *requests = case.requests()
    floor = Result(floor_request)
    try:
        with Worker("time", floor_request) as worker:
            floor.device_name = worker.read()["device"]
            progress.step("gemm4: ready")
            others = [_measure_variant(request, worker, progress) for request in requests]
            paired = [seconds for result in others for seconds in result.floor_seconds]
            floor.seconds = paired or [worker.time_once() for _ in range(case.repeats)]
        floor.floor_seconds = floor.seconds
        floor.peak_bytes = measure_peak(floor_request)
    except WorkerError as error:
        raise RuntimeError(f"the floor gemm4 failed: {error}") from error
    progress.step("gemm4: done")
    for result in others:
        result.device_name = floor.device_name
    return [floor, *others]


def _measure_variant(request: Request, floor_worker: Worker, progress: Progress) -> Result:
    result = Result(request)
    remaining = request.case.repeats + 2
    result.note = request.why_absent() or ""
    if result.note:
        progress.step(f"{request.label}: skipped", remaining)
        return result
    try:
        with Worker("time", request) as worker:
            ready = worker.read()
            result.errors = {name: value for name, value in ready.items() if name.endswith("_error")}
            progress.step(f"{request.label}: ready")
            remaining -= 1
            for repetition in range(request.case.repeats):
                floor_seconds = _time_floor(floor_worker)
                result.seconds.append(worker.time_once())
                result.floor_seconds.append(floor_seconds)
                progress.step(f"{request.label}: {repetition + 1}/{request.case.repeats}")
                remaining -= 1
        result.peak_bytes = measure_peak(request)
    except WorkerError as error:
        result.failed, result.note = True, str(error)
    progress.step(f"{request.label}: {'failed' if result.failed else 'done'}", remaining)
    return result


def _time_floor(worker: Worker) -> float:
    try:
        return worker.time_once()
    except WorkerError as error:
        raise RuntimeError(f"the floor gemm4 failed: {error}") from error


def measure_peak(request: Request) -> int:
    """Return the peak bytes of loss and backward beyond inputs and gradients, from fresh processes.

    CPU: the peak resident set of a child that runs the variant, minus that of a child that imports, warms up and builds
    the same and only allocates the gradients. CUDA: one child, by PyTorch's allocator.
    """
    with Worker("memory", request) as worker:
        peak = worker.read()
    if "baseline_bytes" in peak:
        return int(peak["peak_bytes"] - peak["baseline_bytes"])
    with Worker("baseline", request) as worker:
        baseline = worker.read()
    return int(peak["peak_bytes"] - baseline["peak_bytes"])
