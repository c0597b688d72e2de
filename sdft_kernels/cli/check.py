"""``sdft-kernels check``: does every op agree with its fp64 reference on this device? A table and an exit status."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdft_kernels.cli._check_ops import Op
    from sdft_kernels.testing import DivergenceInputs

HELP = "Check every op and implementation against its fp64 reference on this device, in seconds."

EPILOG = """examples:
  sdft-kernels check
  sdft-kernels check --device cuda --dtype bf16

An error may be twice that of eager PyTorch in fp32 on the same inputs (bf16: gradients 0.4 %, their rounding).
exit status: 0 everything agrees · 1 something does not, or raised · 2 wrong usage"""

FACTOR = 2.0
ATTENTION_IMPLEMENTATIONS = ("composition", "native", "triton")

# Rounding a gradient to bf16 where it enters the next product costs up to 2^-9 = 0.2 % per element. Eager bf16 logits
# are off by 5 to 200 % at these inputs, so twice their error would check nothing.
BF16_GRADIENT_LIMIT = 0.004

# The error of one sum can be 0 by luck, and twice 0 is no limit: a lone number may be off by this many ulps.
SCALAR_ULPS = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``check`` to `parser`."""
    parser.epilog = EPILOG
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU, else cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="of the inputs (default both)"
    )


@dataclass(frozen=True)
class Scenario:
    """Inputs that bite, by name: arguments of `make_divergence_inputs`, of the op, and a last change to the inputs."""

    name: str
    kind: str
    drawn: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[DivergenceInputs], DivergenceInputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Row:
    """One line of the table: the quantity that comes closest to its limit, or what was raised."""

    op: str
    impl: str
    dtype: str
    case: str
    quantity: str = ""
    error: float = math.nan
    eager: float = math.nan
    limit: float = math.nan
    raised: str = ""

    @property
    def ok(self) -> bool:
        """False for a NaN error too."""
        return self.error <= self.limit

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        if self.raised:
            return (self.op, self.impl, self.dtype, self.case, f"raised {self.raised}", "", "", "", "FAILED")
        numbers = (f"{value:.1e}" for value in (self.error, self.eager, self.limit))
        return (self.op, self.impl, self.dtype, self.case, self.quantity, *numbers, "ok" if self.ok else "FAILED")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a row is not ok."""
    import torch

    from sdft_kernels.cli._progress import Progress
    from sdft_kernels.cli._table import print_table

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch sees no GPU here (sdft-kernels env says why)")
    jobs = list(check_jobs(device, args.dtype))
    rows = []
    with Progress(len(jobs), "check") as progress:
        for job in jobs:
            rows.append(job())
            progress.step(f"{rows[-1].op} {rows[-1].case}")
    columns = ("op", "impl", "dtype", "case", "worst", "error", "eager error", "limit", "")
    print_table(f"relative errors against the fp64 reference on {device}", columns, [row.cells() for row in rows])
    for line in not_available(device):
        print(line)
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} ok" + (f", {failed} FAILED" if failed else ""))
    return int(failed > 0)


def check_jobs(device: str, dtypes: Sequence[str]) -> Iterator[Callable[[], Row]]:
    """Yield a function per op, available implementation, dtype and scenario; each computes one row."""
    from sdft_kernels import _dispatch, _native
    from sdft_kernels.cli._check_ops import all_ops

    for op in all_ops():
        for impl in _dispatch.IMPLEMENTATIONS:
            if impl in ("auto", "reference") or _dispatch.why_not(impl, op.dispatched, device):
                continue
            for dtype in dtypes:
                for scenario in scenarios():
                    yield partial(_check_op, op, impl, dtype, device, scenario)
    yield from _attention_jobs(device, dtypes)
    for dtype in dtypes:
        yield partial(_check_ema, "torch", dtype, device)
        if device == "cpu" and _native.has_native():
            yield partial(_check_ema, "native", dtype, device)


def _attention_jobs(device: str, dtypes: Sequence[str]) -> Iterator[Callable[[], Row]]:
    import torch

    from sdft_kernels import _dispatch
    from sdft_kernels.cli._check_ops import ATTENTION_CASES

    of = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for impl in ATTENTION_IMPLEMENTATIONS:
        for dtype in dtypes:
            if not _dispatch.why_not(_dispatched(impl), "shared_prefix_attention", device, of[dtype]):
                for case in ATTENTION_CASES:
                    yield partial(_check_attention, impl, dtype, device, case, of[dtype])


def _dispatched(impl: str) -> str:
    """The name of an implementation of attention in the table of implementations."""
    return "torch" if impl == "composition" else impl


def not_available(device: str) -> list[str]:
    """Return a line per implementation that was not checked on `device`, with the reason."""
    from sdft_kernels import _dispatch, _native
    from sdft_kernels.cli._check_ops import all_ops

    reasons = {
        f"{op.name}, impl {impl}: not checked, {why}"
        for op in all_ops()
        for impl in _dispatch.IMPLEMENTATIONS
        if impl != "auto" and (why := _dispatch.why_not(impl, op.dispatched, device))
    }
    for impl in ATTENTION_IMPLEMENTATIONS:
        if why := _dispatch.why_not(_dispatched(impl), "shared_prefix_attention", device):
            reasons.add(f"shared_prefix_attention, impl {impl}: not checked, {why}")
    if not _native.has_native():
        reasons.add(f"ema_update_, impl native: not checked, {_native.why_not()}")
    return sorted(reasons)


def scenarios() -> list[Scenario]:
    """Return the inputs that are known to break kernels; none is uniform random logits."""
    everything = {
        "jsd_alpha": 0.3,
        "temperature": 0.7,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 0.5,
        "student_softcap": 20.0,
        "teacher_softcap": 30.0,
    }
    return [
        Scenario("peaked", "peaked", {"teacher_hidden": 24}),
        Scenario("near", "near"),
        Scenario("nearer", "nearer"),
        Scenario("every option", "near", {"bias": True, "mask": True, "teacher_hidden": 24}, everything),
        Scenario("heads 300 apart", "near", {"bias": True}, change=_shift_teacher),
        Scenario("-inf logits", "near", {"bias": True}, change=_mask_vocabulary),
    ]


def _shift_teacher(inputs: DivergenceInputs) -> DivergenceInputs:
    assert inputs.teacher_bias is not None
    return inputs.replace(teacher_bias=inputs.teacher_bias + 300.0)


def _mask_vocabulary(inputs: DivergenceInputs) -> DivergenceInputs:
    """-inf in both heads on a fifth of the vocabulary, the targets excepted: their log-probability would be -inf."""
    import torch

    assert inputs.student_bias is not None and inputs.teacher_bias is not None
    masked = torch.arange(inputs.student_bias.shape[0], dtype=torch.int64, device=inputs.student_bias.device) % 5 == 1
    masked[inputs.target[inputs.target >= 0]] = False
    return inputs.replace(
        student_bias=inputs.student_bias.masked_fill(masked, -math.inf),
        teacher_bias=inputs.teacher_bias.masked_fill(masked, -math.inf),
    )


def _check_op(op: Op, impl: str, dtype: str, device: str, scenario: Scenario) -> Row:
    import torch

    from sdft_kernels.testing import make_divergence_inputs

    row = Row(op.name, impl, dtype, scenario.name)
    of = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    drawn = make_divergence_inputs(scenario.kind, dtype=of, device=device, **scenario.drawn)
    inputs = scenario.change(drawn)
    try:
        actual = op.run(inputs, impl, scenario.options, None)
    except Exception as error:
        return replace(row, raised=_raised(error))
    eager = op.run(inputs.to(torch.float32), "reference", scenario.options, actual)
    truth = op.run(inputs.to(torch.float64), "reference", scenario.options, actual)
    return _worst(row, actual, eager, truth)


def _raised(error: Exception) -> str:
    """In a table of health, what an implementation raises is a finding, not the end of the check."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _worst(
    row: Row,
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    truth: dict[str, Tensor],
    bf16_gradient_limit: float | None = BF16_GRADIENT_LIMIT,
) -> Row:
    """Return `row` with the quantity whose error is largest over its limit; a quantity missing or NaN is the worst.

    `bf16_gradient_limit` None holds gradients in bf16 to `eager` too, which then rounds as they do.
    """
    import torch

    from sdft_kernels.testing import relative_error

    rows = []
    for name, expected in truth.items():
        if not expected.is_floating_point():  # ids, which are those of `actual`
            continue
        if name not in actual:
            return replace(row, raised=f"nothing for {name}")
        error, eager_error = relative_error(actual[name], expected), relative_error(eager[name], expected)
        eps = torch.finfo(torch.float32).eps
        limit = FACTOR * max(eager_error, eps)
        if expected.numel() == 1:
            limit = max(limit, SCALAR_ULPS * eps)
        if row.dtype == "bf16" and "grad_" in name and bf16_gradient_limit is not None:
            limit = bf16_gradient_limit
        rows.append(replace(row, quantity=name, error=error, eager=eager_error, limit=limit))
    return max(
        rows, key=lambda candidate: math.inf if math.isnan(candidate.error) else candidate.error / candidate.limit
    )


def _check_attention(impl: str, dtype: str, device: str, case: str, of: torch.dtype) -> Row:
    from sdft_kernels.cli._check_ops import attention

    row = Row("shared_prefix_attention", impl, dtype, case)
    try:
        return _worst(row, *attention(impl, case, of, device), bf16_gradient_limit=None)
    except Exception as error:
        return replace(row, raised=_raised(error))


def _check_ema(impl: str, dtype: str, device: str) -> Row:
    """The compiled update takes contiguous tensors, its PyTorch twin all others: a transposed view selects the twin."""
    import torch

    from sdft_kernels import _ema

    row = Row("ema_update_", impl, dtype, "rate 0.01")
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randn(2, 64, 1003, generator=generator, dtype=torch.float32).to(device)
    param = (start + 0.01 * step).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    truth = start.double().lerp(param.double(), 0.01)
    eager = start + 0.01 * (param.float() - start)
    actual = start.clone()
    try:
        _ema.ema_update_(*((actual, param) if impl == "native" else (actual.T, param.T)), 0.01)
    except Exception as error:
        return replace(row, raised=_raised(error))
    return _worst(row, {"ema": actual}, {"ema": eager}, {"ema": truth})
