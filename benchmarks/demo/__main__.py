"""``python -m benchmarks.demo``: SDFT on a small instruct model, in one command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="A small instruct model learns tool calls from demonstrations by self-distillation (SDFT): "
        "measures the teacher, trains, and reports held-out tool calls before and after.",
        epilog="example: python -m benchmarks.demo --seed 1 --output demo_output/seed1",
    )
    parser.add_argument("--model", type=Path, help="folder of another chat model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="for results.json and curves.png")
    parser.add_argument("--quick", action="store_true", help="a few tasks, two steps: shows only that everything runs")
    parser.add_argument("--template", choices=("turn", "paper", "trl"), help="of the teacher (default: the better one)")
    parser.add_argument("--epochs", type=_positive_int, default=2)
    parser.add_argument("--batch-size", type=_positive_int, default=10, help="prompts per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0, help="of the data order and the sampling")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 however the scores came out, 1 if it could not run (one line on stderr), 2 on bad usage."""
    args = parse_arguments(argv)
    try:
        from rich.console import Console
        from transformers.utils import logging

        from benchmarks.demo.pipeline import Plan, run
        from benchmarks.demo.training import Settings
    except ImportError as error:
        print(f"demo: {error}; install what it needs with: pip install -e '.[demo]'", file=sys.stderr)
        return 1
    logging.disable_progress_bar()
    settings = Settings(
        epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed
    )
    plan = Plan.quick(settings) if args.quick else Plan(template=args.template, settings=settings)
    try:
        run(args.model, args.output, plan, Console())
    except (FileNotFoundError, ImportError, ValueError, NotImplementedError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
