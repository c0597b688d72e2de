"""One variant in a process of its own: ``python -m sdft_kernels.cli._bench.worker MODE REQUEST``, JSON lines on stdout.

``time``: builds the inputs, checks the variant against fp64, warms up, says so, then times one repetition per line on
stdin. ``memory``: reports the peak after one loss and backward. ``baseline``: the same with the gradients merely
allocated.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from sdft_kernels.cli._bench.case import Request
from sdft_kernels.cli._bench.inputs import LossInputs, forward_kl_truth, make_loss_inputs
from sdft_kernels.cli._bench.variants import Variant, find_variant

# Tokens of the fp64 check: at V = 262144 its two logit tensors take 256 MiB.
GATE_TOKENS = 64

# Enough to load libraries, start threads and JIT kernels; small enough not to set the memory peak.
_WARMUP_SHAPE = (32, 64, 512)


def main() -> int:
    """Serve one request of `bench loss`."""
    return serve(Request.from_json, {"time": serve_time, "memory": serve_memory, "baseline": serve_memory})


def serve(read: Callable[[str], Any], modes: Mapping[str, Callable[[Any, TextIO, str], None]]) -> int:
    """Serve one request of the command line; every failure is answered as ``{"error": …}`` with exit status 1.

    Args:
        read: makes the request of its JSON.
        modes: what each mode does with it.
    """
    mode, text = sys.argv[1:]
    channel = _take_stdout()
    try:
        request = read(text)
        if request.case.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU here (sdft-kernels env says why)")
        torch.set_num_threads(request.case.threads)
        modes[mode](request, channel, mode)
    except Exception as error:
        answer(channel, error=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _take_stdout() -> TextIO:
    """Keep stdout for answers; what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def answer(channel: TextIO, **fields: Any) -> None:
    """Write one line of JSON."""
    channel.write(json.dumps(fields) + "\n")


def build(request: Request) -> tuple[Variant, LossInputs]:
    """Return the variant and the inputs of `request`."""
    variant = find_variant(request.variant)
    case = request.case
    return variant, make_loss_inputs(
        case.shape, case.dtype, case.device, case.seed, request.memory_budget, request.case.impl
    )


def serve_time(request: Request, channel: TextIO, mode: str) -> None:
    """Check, warm up, then answer ``{"seconds": …}`` to each line until stdin closes."""
    variant, inputs = build(request)
    errors = check(variant, inputs, request.gate_tolerance) if variant.is_loss else {}
    loss_and_grad = variant.make(inputs)
    timed(loss_and_grad, inputs)
    answer(channel, device=device_name(request.case.device), threads=torch.get_num_threads(), **errors)
    for _ in sys.stdin:
        answer(channel, seconds=timed(loss_and_grad, inputs))


def check(variant: Variant, inputs: LossInputs, tolerance: float) -> dict[str, float]:
    """Return the relative errors of loss, dH and dW on the first `GATE_TOKENS` tokens against fp64.

    Raises:
        ValueError: the loss is off by more than `tolerance` relative, or a gradient is missing.
    """
    inputs.clear_gradients()
    few = inputs.first_rows(GATE_TOKENS)
    loss = variant.make(few)().item()
    truth = forward_kl_truth(few)
    loss_error = abs(loss - truth.loss) / truth.loss
    # Written so that a NaN fails.
    if not loss_error <= tolerance:
        raise ValueError(
            f"not timed: its loss {loss:.6g} is off the fp64 loss {truth.loss:.6g} by {loss_error:.2g} relative"
            f" (tolerance {tolerance:g}, {few.student_input.shape[0]} tokens)"
        )
    input_error, weight_error = truth.relative_errors(few)
    inputs.clear_gradients()
    return {"loss_error": loss_error, "input_gradient_error": input_error, "weight_gradient_error": weight_error}


def timed(loss_and_grad: Any, inputs: LossInputs) -> float:
    """Return the seconds of one loss and backward, gradients allocated anew."""
    inputs.clear_gradients()
    synchronize(inputs)
    start = time.perf_counter()
    loss_and_grad()
    synchronize(inputs)
    return time.perf_counter() - start


def synchronize(inputs: LossInputs) -> None:
    """Wait for the GPU, if there is one."""
    if inputs.student_input.is_cuda:
        torch.cuda.synchronize()


def serve_memory(request: Request, channel: TextIO, mode: str) -> None:
    """Answer ``{"peak_bytes": …}``; on CUDA also ``baseline_bytes``, since the allocator counts exactly."""
    case = request.case
    variant = find_variant(request.variant)
    warmup = make_loss_inputs(_WARMUP_SHAPE, case.dtype, case.device, case.seed, request.memory_budget, case.impl)
    variant.make(warmup)()
    warmup.clear_gradients()
    variant, inputs = build(request)
    if inputs.student_input.is_cuda:
        gradients = sum(t.numel() * t.element_size() for t in (inputs.student_input, inputs.student_weight))
        baseline = torch.cuda.memory_allocated() + gradients
        torch.cuda.reset_peak_memory_stats()
        variant.make(inputs)()
        torch.cuda.synchronize()
        answer(channel, peak_bytes=torch.cuda.max_memory_allocated(), baseline_bytes=baseline)
        return
    if mode == "baseline":
        inputs.allocate_gradients()
    else:
        variant.make(inputs)()
    answer(channel, peak_bytes=peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Return the peak resident set of this process.

    Linux: VmHWM, because `ru_maxrss` of a freshly started process can begin at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        raise OSError("peak memory is read from VmHWM or getrusage, and this system has neither") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's with its vector units as torch uses them."""
    if device == "cpu":
        from sdft_kernels.cli.env import cpu_model

        return f"{cpu_model()[0]} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    raise SystemExit(main())
