"""Reads tool calls out of answers, and scores a model on the demo's tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft_kernels import linear_token_logprob
from sdft_kernels.distill.rollouts import evaluation_mode, generate_completions, stop_token_ids
from sdft_kernels.distill.templates import as_messages, encode_completion, encode_prompts, teacher_messages
from sdft_kernels.models import completion_hidden_states, head_kwargs

COLUMNS = ("prompt", "privileged_context", "tool", "arguments")
MAX_ANSWER_TOKENS = 48  # the longest expert answer has 40 tokens
BATCH_SIZE = 30

Row = dict[str, Any]


def load_tasks(path: Path) -> list[Row]:
    """Rows of a task file.

    Raises:
        ValueError: a malformed line, or a missing column; the message names file, line and column.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        missing = [column for column in COLUMNS if not isinstance(row, dict) or column not in row]
        if missing:
            raise ValueError(f"{path}:{number}: missing column {missing[0]!r} (needed: {', '.join(COLUMNS)})")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no tasks")
    return rows


def parse_call(answer: str) -> tuple[str, dict[str, Any]] | None:
    """Tool and arguments of an answer that is one JSON object and nothing else; None for any other text."""
    try:
        call = json.loads(answer.strip(), object_pairs_hook=_without_duplicates)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("tool"), str):
        return None
    return call["tool"], {name: value for name, value in call.items() if name != "tool"}


def is_exact(answer: str, tool: str, arguments: dict[str, Any]) -> bool:
    """Whether `answer` is exactly this call: the tool, the same arguments, and their values with their JSON types.

    21 and 21.0 are the same number; true and 1, or 21 and "21", are not the same value. The order of arguments is free.
    """
    call = parse_call(answer)
    return call is not None and call[0] == tool and _same(call[1], arguments)


@dataclass(frozen=True)
class Score:
    """What a model did on a list of tasks.

    Attributes:
        answers: its greedy answers, one per task.
        exact: whether each is the expert's call (`is_exact`).
        expert_logprob: log-probability of the expert's answers in nats, mean over all their tokens; NaN: not measured.
    """

    answers: list[str]
    exact: list[bool]
    expert_logprob: float

    @property
    def correct(self) -> int:
        return sum(self.exact)

    def __str__(self) -> str:
        return f"{self.correct}/{len(self.exact)} exact, expert log-prob {self.expert_logprob:.3f} nats/token"


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Row],
    *,
    template: str | None = None,
    with_logprob: bool = True,
    description: str = "scoring",
) -> Score:
    """Greedy answers and the expert's log-probability, with a progress bar.

    Args:
        model: the model to score; runs in eval mode, which is restored.
        tokenizer: its tokenizer, with a chat template.
        tasks: rows of a task file.
        template: None asks the plain question (the student); a template of `sdft_kernels.distill.templates` shows the
            demonstration too (the teacher).
        with_logprob: measure the expert's log-probability too; it runs every prompt through the model once more.
        description: label of the progress bar.
    """
    prompts = encode_prompts(tokenizer, [_conversation(task, template) for task in tasks])
    experts = [encode_completion(tokenizer, task["prompt"], task["privileged_context"]) for task in tasks]
    stops = stop_token_ids(model, tokenizer)
    answers: list[str] = []
    logprobs: list[float] = []
    with tqdm(total=len(tasks), desc=description, unit="task", leave=False) as bar:
        for start in range(0, len(tasks), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            completions = generate_completions(
                model, prompts[part], max_completion_length=MAX_ANSWER_TOKENS, eos_token_ids=stops, temperature=0.0
            )
            answers += [tokenizer.decode(rollouts[0], skip_special_tokens=True).strip() for rollouts in completions]
            if with_logprob:
                logprobs += expert_logprobs(model, prompts[part], experts[part])
            bar.update(len(completions))
    exact = [is_exact(answer, task["tool"], task["arguments"]) for answer, task in zip(answers, tasks, strict=True)]
    return Score(answers, exact, math.fsum(logprobs) / sum(map(len, experts)) if with_logprob else math.nan)


@torch.no_grad()
def expert_logprobs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], experts: Sequence[Sequence[int]]
) -> list[float]:
    """Log-probability (nats) of each expert answer, the sum over its tokens, after its prompt."""
    head = {name.removeprefix("student_"): value for name, value in head_kwargs(model, side="student").items()}
    with evaluation_mode(model):
        hidden = completion_hidden_states(model, prompts, experts)
    target = torch.tensor([token for expert in experts for token in expert], device=hidden.device)
    tokens = linear_token_logprob(hidden, target=target, outputs=("logprob",), **head)
    return [part.sum().item() for part in tokens.logprob.split([len(expert) for expert in experts])]


def _conversation(task: Row, template: str | None) -> list[dict[str, Any]]:
    if template is None:
        return as_messages(task["prompt"])
    return teacher_messages(task["prompt"], task["privileged_context"], template)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
