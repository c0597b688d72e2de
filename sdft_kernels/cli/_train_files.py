"""Files of ``sdft-kernels train``: the JSONL of demonstrations it reads, the metrics.jsonl it writes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path, extra_columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each with its `line` number.

    Raises:
        ValueError: naming file and line: a line that is not a JSON object, a missing column, a prompt that does not
            end in a user turn, a demonstration that is neither text nor messages; a file without rows.
    """
    from sdft_kernels.distill.data import check_columns
    from sdft_kernels.distill.templates import teacher_messages

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{name}: expected a JSON object, got {type(row).__name__}")
            check_columns(row, name, extra_columns)
            try:
                teacher_messages(row["prompt"], row["privileged_context"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
            rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


class MetricsFile:
    """metrics.jsonl: one line per optimizer step (and per evaluation), flushed at once.

    Args:
        path: of the file; an older one is replaced, or on resume cut back to `resumed_step`.
        resumed_step: step of the checkpoint the run continues from; 0 is a new run.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = _lines_up_to(path, resumed_step) if resumed_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def callback(self) -> Any:
        """A Trainer callback that writes the lines and drives a progress bar on stderr."""
        from transformers import TrainerCallback

        from sdft_kernels.cli._progress import Progress

        path = self.path

        class Metrics(TrainerCallback):
            bar: Progress | None = None

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.bar = Progress(state.max_steps, "train")
                if state.global_step:
                    self.bar.step("resumed", state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
                if "loss" not in logs and "eval_loss" not in logs:
                    return
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
                if "loss" in logs and self.bar is not None:
                    self.bar.step(f"loss {logs['loss']:.4f}")

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if self.bar is not None:
                    self.bar.__exit__(None, None, None)

        return Metrics()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to `step`; what a killed run wrote after its last checkpoint goes."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    return kept
