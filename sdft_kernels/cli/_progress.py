"""A progress bar on stderr: tqdm's where it is installed, one line per step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    """Counts steps: ``with Progress(total, "bench") as bar: bar.step("plain")``."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done = total, description, 0
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, desc=description, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, what: str, count: int = 1) -> None:
        """Record that `count` steps, the last of them `what`, are done."""
        self.done += count
        if self.bar is None:
            print(f"{self.description}: {self.done}/{self.total} {what}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(what, refresh=False)
            self.bar.update(count)
