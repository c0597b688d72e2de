"""`bench attention` and `bench step`: options, cases and the run; imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sdft_kernels.cli._bench.arguments import add_output, add_threads_and_seed, argument, positive
from sdft_kernels.cli._bench.prefix_case import (
    ATTENTION_VARIANTS,
    MODELS,
    STEP_VARIANTS,
    AttentionCase,
    PrefixCase,
    StepCase,
    parse_counts,
)

ATTENTION = """Forward and backward of one layer's attention over a prompt of P tokens and R completions of L tokens.

repeated: every sequence whole, PyTorch's scaled_dot_product_attention (flash). flash_attn: the same, by that library.
shared: this package's op, the prompt once. The predicted speed-up counts visible (query, key) pairs. Each variant runs
in a process of its own, in turns with repeated; speed-ups are medians over these pairs. Peak memory is beyond inputs
and gradients. A variant whose output or gradients are off fp64 is not timed."""

STEP = """A distillation step without generation: student's and teacher's hidden states, loss, backward.

repeated: every sequence whole, in micro-batches. packed: prompts once. packed_cached: the teacher's prompt from a cache
that is warm. The predicted speed-up counts FLOPs of body, attention pairs and head. Measured as `bench attention`."""

STEP_EXAMPLES = """examples:
  sdft-kernels bench step --model tiny --shape 64,4,16
  sdft-kernels bench step --shape 541,8,64 --teacher-prompt 598 --output step.csv
  sdft-kernels bench step --model ./my-model --dtype bf16 --shape 512,2,64 512,8,64 2048,8,64"""

ATTENTION_EXAMPLES = """examples:
  sdft-kernels bench attention --shape 512,8,64
  sdft-kernels bench attention --shape 541,8,64 2048,8,64 --heads 32,8 --head-size 128 --dtype bf16 --output a.csv"""

SHAPE = "P,R,L"


def add_parsers(what: Any) -> None:
    """Add both commands to the sub-parsers of ``bench``."""
    attention = _parser(what, "attention", "shared_prefix_attention beside whole sequences", ATTENTION)
    attention.epilog = ATTENTION_EXAMPLES
    attention.add_argument(
        "--heads", type=argument(parse_counts("Hq,Hkv")), default=(9, 3), metavar="Hq,Hkv", help="default 9,3"
    )
    attention.add_argument("--head-size", type=argument(positive), default=64, metavar="D", help="default 64")
    attention.add_argument("--impl", default="auto", help="of shared (default auto)")
    _add_variants(attention, tuple(ATTENTION_VARIANTS))
    attention.set_defaults(bench=run, cases=_attention_cases)

    step = _parser(what, "step", "a distillation step, prompts once or repeated", STEP)
    step.epilog = STEP_EXAMPLES
    step.add_argument(
        "--model", default="smollm2-135m", help=f"a folder, or random: {', '.join(MODELS)} (default the latter)"
    )
    step.add_argument("--teacher-prompt", type=argument(positive), metavar="N", help="tokens (default P + 57)")
    step.add_argument("--prompts", type=argument(positive), default=1, metavar="B", help="in a step (default 1)")
    step.add_argument(
        "--token-budget", type=argument(positive), default=8192, metavar="N", help="of a micro-batch (default 8192)"
    )
    _add_variants(step, tuple(STEP_VARIANTS))
    step.set_defaults(bench=run, cases=_step_cases)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table per shape, write the file; 1 if one of this package's own variants failed."""
    from sdft_kernels.cli._bench.prefix_report import PREFIX_COLUMNS, csv_rows, print_results
    from sdft_kernels.cli._bench.protocol import measure_case
    from sdft_kernels.cli._bench.report import write_csv
    from sdft_kernels.cli._progress import Progress

    cases: Sequence[PrefixCase] = args.cases(args)
    measured = []
    rows: list[dict[str, str]] = []
    try:
        with Progress(sum(case.steps for case in cases), f"bench {args.what}") as progress:
            for case in cases:
                results = measure_case(case, progress)
                measured.append((case, results))
                rows += csv_rows(results)
                if args.output is not None:
                    write_csv(args.output, rows, PREFIX_COLUMNS)
    finally:
        # A run that is interrupted after minutes keeps, and shows, the cases that it finished.
        for case, results in measured:
            print_results(case, results)
    return int(any(result.failed and result.request.is_ours for _, results in measured for result in results))


def _parser(what: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = what.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        type=argument(parse_counts(SHAPE)),
        required=True,
        metavar=SHAPE,
        help="tokens of a prompt, its completions, tokens of each",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--repeats", type=argument(positive), default=5, help="pairs per variant (default 5)")
    add_threads_and_seed(parser)
    add_output(parser)
    return parser


def _add_variants(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    floor = names[0]
    parser.add_argument(
        "--variants", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"of {', '.join(names)} (default: all); {floor} always runs",
    )  # fmt: skip


def _attention_cases(args: argparse.Namespace) -> list[PrefixCase]:
    heads, key_heads = args.heads
    if heads % key_heads:
        raise ValueError(f"--heads must be Hq,Hkv with Hkv a divisor of Hq, got {heads},{key_heads}")
    return [
        AttentionCase(
            **_common(args, shape), heads=heads, key_heads=key_heads, head_size=args.head_size, impl=args.impl
        )
        for shape in args.shape
    ]


def _step_cases(args: argparse.Namespace) -> list[PrefixCase]:
    # 57 tokens more: the demonstration of the row of tool-use data that the project's bars use, 541 and 598.
    return [
        StepCase(
            **_common(args, shape),
            model=args.model,
            teacher_prompt=args.teacher_prompt or shape[0] + 57,
            prompts=args.prompts,
            token_budget=args.token_budget,
        )
        for shape in args.shape
    ]


def _common(args: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, Any]:
    prompt, completions, tokens = shape
    return dict(
        prompt=prompt, completions=completions, tokens=tokens, dtype=args.dtype, device=args.device,
        variants=tuple(args.variants), repeats=args.repeats, threads=args.threads, seed=args.seed,
    )  # fmt: skip
