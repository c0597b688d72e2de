"""The measuring parent: one worker per variant, each repetition paired with the floor, peak memory apart.

A machine's speed drifts (clock, neighbours) by more than the differences of interest, so repetition r runs the floor,
then the variant, and the result is the median of the pairwise ratios, not a ratio of medians taken minutes apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from sdft_kernels.cli._progress import Progress

# One repetition of the slowest peer on the largest shape takes minutes on two cores: one silent this long is stuck.
WORKER_TIMEOUT_S = 1800


class WorkerError(Exception):
    """A worker answered with an error, died, or was silent for `WORKER_TIMEOUT_S`."""


class AnyRequest(Protocol):
    """One variant of one case, and the module whose process runs it."""

    @property
    def worker(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def repeats(self) -> int: ...
    def why_absent(self) -> str | None: ...
    def to_json(self) -> str: ...


R = TypeVar("R", bound=AnyRequest)
Requests = TypeVar("Requests", bound=AnyRequest, covariant=True)


class AnyCase(Protocol[Requests]):
    """Variants on one set of inputs, the floor first."""

    def requests(self) -> Sequence[Requests]: ...


class Worker:
    """A running worker process; leaving the context ends it."""

    def __init__(self, mode: str, request: AnyRequest) -> None:
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-m", request.worker, mode, request.to_json()],
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
class Result(Generic[R]):
    """What was measured of one variant. `note` says why numbers are missing; `failed` is True if it should have run.

    seconds, floor_seconds: one per repetition, pair by pair. errors: relative, against fp64. peak_bytes: beyond inputs
    and gradients. predictions: what the variant should cost.
    """

    request: R
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    device_name: str = ""
    note: str = ""
    failed: bool = False

    def take(self, ready: dict[str, Any]) -> None:
        """Keep what a worker said when it was ready."""
        self.device_name = ready["device"]
        self.errors = {name: value for name, value in ready.items() if name.endswith("_error")}
        self.predictions = {name: value for name, value in ready.items() if name.startswith("predicted_")}

    @property
    def ratios(self) -> list[float]:
        """Time over the floor's, pair by pair."""
        return [mine / floor for mine, floor in zip(self.seconds, self.floor_seconds, strict=True)]

    @property
    def median_ratio(self) -> float:
        """Median of `ratios`, NaN if nothing was timed."""
        return median(self.ratios) if self.seconds else float("nan")


def measure_case(case: AnyCase[R], progress: Progress) -> list[Result[R]]:
    """Measure every variant of `case`, the floor first; takes `case.steps` of `progress`.

    Raises:
        RuntimeError: the floor itself cannot run, so that there is nothing to compare with.
    """
    floor_request, *requests = case.requests()
    floor = Result(floor_request)
    try:
        with Worker("time", floor_request) as worker:
            floor.take(worker.read())
            progress.step(f"{floor_request.label}: ready")
            others = [_measure_variant(request, floor_request, worker, progress) for request in requests]
            paired = [seconds for result in others for seconds in result.floor_seconds]
            floor.seconds = paired or [worker.time_once() for _ in range(floor_request.repeats)]
        floor.floor_seconds = floor.seconds
        floor.peak_bytes = measure_peak(floor_request)
    except WorkerError as error:
        raise _no_floor(floor_request, error) from error
    progress.step(f"{floor_request.label}: done")
    for result in others:
        result.device_name = floor.device_name
    return [floor, *others]


def _measure_variant(request: R, floor_request: R, floor_worker: Worker, progress: Progress) -> Result[R]:
    result = Result(request)
    remaining = request.repeats + 2
    result.note = request.why_absent() or ""
    if result.note:
        progress.step(f"{request.label}: skipped", remaining)
        return result
    try:
        with Worker("time", request) as worker:
            result.take(worker.read())
            progress.step(f"{request.label}: ready")
            remaining -= 1
            for repetition in range(request.repeats):
                floor_seconds = _time_floor(floor_worker, floor_request)
                result.seconds.append(worker.time_once())
                result.floor_seconds.append(floor_seconds)
                progress.step(f"{request.label}: {repetition + 1}/{request.repeats}")
                remaining -= 1
        result.peak_bytes = measure_peak(request)
    except WorkerError as error:
        result.failed, result.note = True, str(error)
    progress.step(f"{request.label}: {'failed' if result.failed else 'done'}", remaining)
    return result


def _time_floor(worker: Worker, request: AnyRequest) -> float:
    try:
        return worker.time_once()
    except WorkerError as error:
        raise _no_floor(request, error) from error


def _no_floor(request: AnyRequest, error: WorkerError) -> RuntimeError:
    return RuntimeError(f"the floor {request.label} failed: {error}")


def measure_peak(request: AnyRequest) -> int:
    """Return the peak bytes beyond inputs and gradients, from fresh processes.

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
