"""Entry point of ``sdft-kernels``: parses arguments, runs one sub-command, turns errors into one line and a status.

Exit status: 0 done · 1 the work failed · 2 wrong usage · 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from sdft_kernels._version import __version__

COMMANDS = ("train", "bench", "check", "env")

# What bad input, a missing extra, a full disk or an op that refuses raises.
# Anything else is a bug and keeps its traceback.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError)

EPILOG = """examples:
  sdft-kernels env                                    what to paste into a bug report
  sdft-kernels check                                  does every op agree with its fp64 reference here?
  sdft-kernels bench loss --shape 256,256,8192        time and peak memory beside other libraries
  sdft-kernels train --help                           self-distillation fine-tuning of a model

`sdft-kernels COMMAND --help` shows the options of one command. SDFT_KERNELS_DEBUG=1 shows the traceback of an error."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every sub-command; needs no package beyond the standard library."""
    parser = argparse.ArgumentParser(
        prog="sdft-kernels",
        description="Kernels and a trainer for self-distillation fine-tuning (SDFT).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sdft-kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"sdft_kernels.cli.{name}")
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: of this process) and return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"sdft-kernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) has what it wanted; a second write at interpreter exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED_ERRORS as error:
        if os.environ.get("SDFT_KERNELS_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"sdft-kernels {args.command}: error: {message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
