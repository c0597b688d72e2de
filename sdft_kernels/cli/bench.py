"""``sdft-kernels bench``: time and peak memory of loss, attention and step, beside what users would run instead."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sdft_kernels.cli._bench.arguments import add_output, add_threads_and_seed, argument, positive, writable
from sdft_kernels.cli._bench.case import VARIANT_NEEDS, Case, design_suite, parse_bytes, parse_shape, parse_variant
from sdft_kernels.cli._bench.prefix_bench import add_parsers

HELP = "Benchmark the fused loss, shared-prefix attention, or a whole step."

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench`` to `parser`."""
    parser.epilog = (
        "examples:\n"
        "  sdft-kernels bench loss --shape 256,256,8192\n"
        "  sdft-kernels bench attention --shape 541,8,64\n"
        "  sdft-kernels bench step --model tiny --shape 64,4,16"
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_loss(what)
    add_parsers(what)


def _add_loss(what: Any) -> None:
    loss = what.add_parser(
        "loss",
        help="linear_divergence_loss and its peers",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = loss.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--shape", nargs="+", type=argument(parse_shape), metavar="N,H,V", help="tokens, hidden size, vocabulary"
    )
    size.add_argument("--suite", choices=("design",), help="the project's own shapes, dtypes, variants and budgets")
    loss.add_argument("--dtype", choices=("fp32", "bf16"), help="of all inputs (default fp32)")
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    loss.add_argument(
        "--variants",
        nargs="+",
        type=argument(parse_variant),
        metavar="NAME",
        help=f"of {', '.join(VARIANT_NEEDS)}, or module:function (default: all); gemm4 always runs",
    )
    loss.add_argument("--repeats", type=argument(positive), help="pairs per variant (default 5; suite: its own)")
    loss.add_argument(
        "--memory-budget",
        nargs="+",
        type=argument(parse_bytes),
        metavar="SIZE",
        help="for sdft variants, one run each, such as 250MiB (default: the op's own)",
    )
    loss.add_argument("--impl", default="auto", help="row kernels of the sdft variants (default auto)")
    add_threads_and_seed(loss)
    loss.add_argument(
        "--gate-tolerance",
        type=float,
        metavar="R",
        help="largest relative error of the loss against fp64, on 64 tokens, of a variant that is timed (default 1e-3;"
        " with bf16 inputs 0.05 for other libraries, most of which round the logits)",
    )
    add_output(loss)
    loss.set_defaults(parser=loss, bench=_run_loss)
    loss.add_argument("--plot", type=argument(writable), metavar="PNG", help="draw the ratios and peaks (matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for, and return its exit status."""
    status: int = args.bench(args)
    return status


def _run_loss(args: argparse.Namespace) -> int:
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
