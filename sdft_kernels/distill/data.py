"""From data rows (columns `prompt` and `privileged_context`) to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdft_kernels.distill.templates import (
    Template,
    as_messages,
    encode_completion,
    encode_prompts,
    resolve_template,
    teacher_messages,
)

REQUIRED_COLUMNS = ("prompt", "privileged_context")


@dataclass(frozen=True)
class PromptEncoder:
    """Student prompts, teacher prompts and expert completions of data rows, as token ids.

    Attributes:
        tokenizer: a transformers tokenizer.
        template: see `resolve_template`.
        chat_template_kwargs: passed to `apply_chat_template`.
        max_prompt_length: a longer student prompt raises; None is no limit of its own.
        context_length: of the model in tokens; None is unknown.
        completion_reserve: tokens kept free for a completion when prompts are checked.
    """

    tokenizer: Any
    template: str | Template = "turn"
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_prompt_length: int | None = None
    context_length: int | None = None
    completion_reserve: int = 0

    def student(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[list[int]]:
        """Student prompts; raises ValueError, naming the row and the lengths, where one is too long."""
        names = names or [f"example {i}" for i in range(len(rows))]
        conversations = [as_messages(row["prompt"], f"{name}: prompt") for row, name in zip(rows, names, strict=True)]
        prompts = encode_prompts(self.tokenizer, conversations, self.chat_template_kwargs)
        for name, prompt in zip(names, prompts, strict=True):
            if self.max_prompt_length is not None and len(prompt) > self.max_prompt_length:
                raise ValueError(
                    f"{name}: the student prompt has {len(prompt)} tokens, more than max_prompt_length="
                    f"{self.max_prompt_length} (nothing is truncated)"
                )
            self._check(name, "student", prompt)
        return prompts

    def teacher(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[list[int]]:
        """Teacher prompts; raises ValueError, naming the row and the lengths, where one is too long."""
        names = names or [f"example {i}" for i in range(len(rows))]
        template = resolve_template(self.template)
        conversations = [teacher_messages(row["prompt"], row["privileged_context"], template) for row in rows]
        prompts = encode_prompts(self.tokenizer, conversations, self.chat_template_kwargs)
        for name, prompt in zip(names, prompts, strict=True):
            self._check(name, "teacher", prompt)
        return prompts

    def expert(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The expert's completions: column `completion` where a row has one, else the demonstration itself."""
        return [
            encode_completion(
                self.tokenizer,
                row["prompt"],
                row["completion"] if row.get("completion") is not None else row["privileged_context"],
                self.chat_template_kwargs,
            )
            for row in rows
        ]

    def _check(self, name: str, side: str, prompt: list[int]) -> None:
        limit = self.context_length
        if limit is not None and len(prompt) + self.completion_reserve > limit:
            raise ValueError(
                f"{name}: the {side} prompt has {len(prompt)} tokens, which with {self.completion_reserve} for the "
                f"completion is more than the model's context of {limit} (nothing is truncated)"
            )


def check_columns(row: Mapping[str, Any], name: str = "the dataset", extra: Sequence[str] = ()) -> None:
    """Raise ValueError naming the first missing column of `row`."""
    for column in (*REQUIRED_COLUMNS, *extra):
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}; it has {sorted(row)}")
