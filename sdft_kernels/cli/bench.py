"""``sdft-kernels bench loss``: time and peak memory of this package's loss beside the libraries that are installed."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdft_kernels.cli._bench.case import VARIANT_NEEDS, Case, design_suite, parse_bytes, parse_shape, parse_variant

HELP = "Benchmark the fused loss against other libraries and the four GEMMs alone."

DESCRIPTION = """Time and peak memory of the mean KL(teacher‖student) and its gradients of student input and head.

Each variant runs in a process of its own. Repetition r runs gemm4 (the four matrix products alone), then the
variant; the ratio is the median over these pairs. Peak memory is what the variant needs beyond inputs and
gradients, from fresh processes. A variant whose loss is off the fp64 loss is not timed. Libraries that are not
installed are said and skipped."""

EXAMPLES = """examples:
  sdft-kernels bench loss --shape 256,256,8192
  sdft-kernels bench loss --shape 1024,576,49152 --memory-budget 250MiB 64MiB --output loss.csv --plot loss.png
  sdft-kernels bench loss --shape 256,256,8192 --variants plain sdft my_module:make_my_loss
  sdft-kernels bench loss --suite design --output loss_cpu.csv

exit status: 0 this package's variants ran · 1 one of them failed · 2 wrong usage"""


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a parser of strings an argparse type whose ValueError text reaches the user."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"expected a positive integer, got {text!r}")
    return int(text)


def _writable(text: str) -> Path:
    """A file that can be written once the work is done: better refused before half an hour of work than after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {text!r}: its folder must exist and be writable")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench`` to `parser`."""
    parser.epilog = "example:\n  sdft-kernels bench loss --shape 256,256,8192"
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    loss = what.add_parser(
        "loss",
        help="linear_divergence_loss and its peers",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = loss.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--shape", nargs="+", type=_argument(parse_shape), metavar="N,H,V", help="tokens, hidden size, vocabulary"
    )
    size.add_argument("--suite", choices=("design",), help="the project's own shapes, dtypes, variants and budgets")
    loss.add_argument("--dtype", choices=("fp32", "bf16"), help="of all inputs (default fp32)")
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    loss.add_argument(
        "--variants",
        nargs="+",
        type=_argument(parse_variant),
        metavar="NAME",
        help=f"of {', '.join(VARIANT_NEEDS)}, or module:function (default: all); gemm4 always runs",
    )
    loss.add_argument("--repeats", type=_argument(_positive), help="pairs per variant (default 5; suite: its own)")
    loss.add_argument(
        "--memory-budget",
        nargs="+",
        type=_argument(parse_bytes),
        metavar="SIZE",
        help="for sdft variants, one run each, such as 250MiB (default: the op's own)",
    )
    loss.add_argument("--impl", default="auto", help="row kernels of the sdft variants (default auto)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loss.add_argument("--threads", type=_argument(_positive), default=cores, help=f"CPU threads (default {cores})")
    loss.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    loss.add_argument(
        "--gate-tolerance",
        type=float,
        metavar="R",
        help="largest relative error of the loss against fp64, on 64 tokens, of a variant that is timed (default 1e-3;"
        " with bf16 inputs 0.05 for other libraries, most of which round the logits)",
    )
    loss.add_argument("--output", type=_argument(_writable), metavar="CSV", help="write the numbers here (replaced)")
    loss.set_defaults(parser=loss)
    loss.add_argument("--plot", type=_argument(_writable), metavar="PNG", help="draw the ratios and peaks (matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table per shape, write the files; 1 if one of this package's own variants failed."""
    from sdft_kernels.cli._bench.protocol import measure_case
    from sdft_kernels.cli._bench.report import csv_rows, plot, print_results, write_csv
    from sdft_kernels.cli._progress import Progress

    if args.plot is not None:
        _require_matplotlib()
    cases = _cases(args)
    measured = []
    rows: list[dict[str, str]] = []
    try:
        with Progress(sum(case.steps for case in cases), "bench loss") as progress:
            for case in cases:
                results = measure_case(case, progress)
                measured.append((case, results))
                rows += csv_rows(results)
                if args.output is not None:
                    write_csv(args.output, rows)
    finally:
        # A run that is interrupted after minutes keeps, and shows, the cases that it finished.
        for case, results in measured:
            print_results(case, results)
    if args.plot is not None:
        plot(args.plot, measured)
    return int(any(result.failed and result.request.is_ours for _, results in measured for result in results))


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.suite is not None:
        for name in ("dtype", "variants", "memory_budget"):
            if getattr(args, name) is not None:
                args.parser.error(f"--suite has its own {name.replace('_', ' ')}: use --shape to choose it")
        suite = design_suite(args.device, args.threads, args.seed, args.impl, args.gate_tolerance)
        return [case if args.repeats is None else dataclasses.replace(case, repeats=args.repeats) for case in suite]
    return [
        Case(
            shape=shape,
            dtype=args.dtype or "fp32",
            device=args.device,
            variants=tuple(args.variants or VARIANT_NEEDS),
            memory_budgets=tuple(args.memory_budget or (None,)),
            repeats=args.repeats or 5,
            threads=args.threads,
            seed=args.seed,
            impl=args.impl,
            gate_tolerance=args.gate_tolerance,
        )
        for shape in args.shape
    ]


def _require_matplotlib() -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'sdft-kernels[bench]'")
