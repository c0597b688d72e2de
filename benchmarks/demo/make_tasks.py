"""Writes the demo's task files from the tables in `tools.py`: ``python -m benchmarks.demo.make_tasks``.

Columns: `prompt` (chat messages that end in the request), `privileged_context` (the expert's answer, the
demonstration), `tool`, `arguments`. An answer is one JSON object on one line: the tool, then its arguments in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.demo.tools import TOOLS, Task, Tool

DATA_DIRECTORY = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "heldout")
SYSTEM = "Answer with one tool call."
# One format example, of a tool that no task uses. With it the model with the demonstration writes 43 of the first 45
# training calls right (benchmarks/data/demo_seed0.json); every further example is read again in every prompt.
FORMAT_EXAMPLES = (
    (
        "set_reminder(text, day, repeat)",
        "Remind me just once to renew the lease on 2 May 2025.",
        {"tool": "set_reminder", "text": "renew the lease", "day": "2025-05-02", "repeat": False},
    ),
)


def format_call(tool: str, arguments: dict[str, Any]) -> str:
    """The answer text of a call: one line of JSON."""
    return json.dumps({"tool": tool, **arguments}, ensure_ascii=False)


def make_row(tool: Tool, task: Task) -> dict[str, Any]:
    """One row of a task file.

    Raises:
        ValueError: as many values as the tool has parameters are needed.
    """
    request, values = task
    if len(values) != len(tool.parameters):
        raise ValueError(f"{tool.name}: {request!r} has {len(values)} values for {len(tool.parameters)} parameters")
    arguments = dict(zip(tool.parameters, values, strict=True))
    messages = [{"role": "system", "content": SYSTEM}]
    for signature, question, call in FORMAT_EXAMPLES:
        messages.append({"role": "user", "content": f"{signature}\n{question}"})
        messages.append({"role": "assistant", "content": json.dumps(call)})
    messages.append({"role": "user", "content": f"{tool.signature}\n{request}"})
    return {
        "prompt": messages,
        "privileged_context": format_call(tool.name, arguments),
        "tool": tool.name,
        "arguments": arguments,
    }


def make_rows(split: str) -> list[dict[str, Any]]:
    """All rows of `split` ("train" or "heldout"), in rounds over the tools, so that any prefix is balanced."""
    tasks = [getattr(tool, split) for tool in TOOLS]
    rounds = range(max(map(len, tasks)))
    return [
        make_row(tool, group[i]) for i in rounds for tool, group in zip(TOOLS, tasks, strict=True) if i < len(group)
    ]


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    DATA_DIRECTORY.mkdir(exist_ok=True)
    for split in SPLITS:
        rows = make_rows(split)
        write_rows(rows, DATA_DIRECTORY / f"{split}.jsonl")
        print(f"{split}: {len(rows)} tasks, {len({row['tool'] for row in rows})} tools")


if __name__ == "__main__":
    main()
