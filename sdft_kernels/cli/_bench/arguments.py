"""Types of options that the benchmarks share, and the options that all of them have; imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a parser of strings an argparse type whose ValueError text reaches the user."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"expected a positive integer, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    """A file that can be written once the work is done: better refused before half an hour of work than after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {text!r}: its folder must exist and be writable")
    return path


def add_threads_and_seed(parser: argparse.ArgumentParser) -> None:
    """``--threads`` and ``--seed``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=argument(positive), default=cores, help=f"CPU threads (default {cores})")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--output``."""
    parser.add_argument("--output", type=argument(writable), metavar="CSV", help="write the numbers here (replaced)")
