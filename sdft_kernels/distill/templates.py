"""Teacher prompts: where the demonstration goes, and how messages become token ids.

A template is a function (messages, demonstration) -> messages. `messages` are chat messages ending in a user turn;
`demonstration` is a string, or chat messages (an agent's whole trace).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, TypeGuard

Messages = list[dict[str, Any]]
Template = Callable[[Messages, Any], Messages]

PAPER_FORMAT = (
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process.\n"
)
TRL_FORMAT = "{prompt}\n\n{privileged_context}"


def turn(messages: Messages, demonstration: Any) -> Messages:
    """The question, the demonstration as the assistant's answer, then the question again. The default.

    Small instruct models follow it where they do not follow a demonstration inside one message: a 135M model writes 15
    of 20 tool calls right with it, none with `paper`.
    """
    question = _question(messages)
    if not isinstance(demonstration, str):
        return [*messages, *demonstration, question]
    return [*messages, {"role": "assistant", "content": demonstration}, question]


def paper(messages: Messages, demonstration: Any) -> Messages:
    """The prompt of the paper's code (arXiv 2601.19897), one user message, without its leading newline.

    That newline changes the tokens right after the role header, so student and teacher prompt share no prefix.
    """
    return _formatted(PAPER_FORMAT, messages, demonstration)


def trl(messages: Messages, demonstration: Any) -> Messages:
    """TRL's default `teacher_prompt_template`: the question, a blank line, the demonstration."""
    return _formatted(TRL_FORMAT, messages, demonstration)


TEMPLATES: Mapping[str, Template] = {"turn": turn, "paper": paper, "trl": trl}


def resolve_template(template: str | Template) -> Template:
    """A template by name, by a format string with {prompt} and {privileged_context} (as in TRL), or as it is.

    Raises:
        ValueError: neither a known name nor such a format string.
    """
    if callable(template):
        return template
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{prompt}" in template and "{privileged_context}" in template:
        return lambda messages, demonstration: _formatted(template, messages, demonstration)
    raise ValueError(
        f"template must be one of {sorted(TEMPLATES)}, a function, or a string with {{prompt}} and "
        f"{{privileged_context}}; got {template!r}"
    )


def as_messages(prompt: str | Messages, name: str = "prompt") -> Messages:
    """A prompt as chat messages; a string is one user message.

    Raises:
        ValueError: an empty prompt, or one that does not end in a user turn.
        TypeError: neither a string nor messages.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{name} is empty")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and not prompt:
        raise ValueError(f"{name} is empty")
    if not _is_messages(prompt):
        raise TypeError(f"{name} must be a string or a list of chat messages, got {type(prompt).__name__}")
    if (role := prompt[-1]["role"]) != "user":
        raise ValueError(
            f"{name} ends in a turn of {role!r}; it must end in a user turn, since the completion is the "
            "next assistant turn (move an expert answer into privileged_context)"
        )
    return [dict(message) for message in prompt]


def teacher_messages(prompt: str | Messages, demonstration: Any, template: str | Template = "turn") -> Messages:
    """The teacher's messages for one example; raises as `as_messages`, and on a missing demonstration."""
    if demonstration is None or (not isinstance(demonstration, str) and not _is_messages(demonstration)):
        raise ValueError(
            f"privileged_context must be a string or a list of chat messages, got {type(demonstration).__name__}"
        )
    return resolve_template(template)(as_messages(prompt), demonstration)


def encode_prompts(
    tokenizer: Any, conversations: Sequence[Messages], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of each conversation with the header of the next assistant turn.

    Args:
        tokenizer: a transformers tokenizer. Without a chat template, contents are joined by blank lines (base models);
            what the tokenizer puts before a text stays, an end-of-sequence token that it puts after it does not, since
            the prompt is to be continued.
        conversations: lists of messages.
        chat_template_kwargs: passed to `apply_chat_template` (for example ``{"enable_thinking": False}``).
    """
    return [_encode(tokenizer, messages, dict(chat_template_kwargs or {})) for messages in conversations]


def encode_completion(
    tokenizer: Any,
    prompt: str | Messages,
    demonstration: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a demonstration as the model would have to generate it after `prompt`, end-of-turn token included.

    Without a chat template: the text and the end-of-sequence token.
    """
    kwargs, messages = dict(chat_template_kwargs or {}), as_messages(prompt)
    answer = [{"role": "assistant", "content": demonstration}] if isinstance(demonstration, str) else demonstration
    text = None
    if getattr(tokenizer, "chat_template", None):
        head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        whole = tokenizer.apply_chat_template([*messages, *answer], tokenize=False, **kwargs)
        text = whole[len(head) :] if whole.startswith(head) else None
    plain = "\n\n".join(text_of(message) for message in answer)
    ids = list(tokenizer(plain if text is None else text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    # Templates often write a newline after the end-of-turn token; the model never generates past that token.
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


def preview(
    tokenizer: Any,
    prompt: str | Messages,
    privileged_context: Any,
    *,
    template: str | Template = "turn",
    skip_first_tokens: int = 3,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> str:
    """Print one student prompt, one teacher prompt, and where the loss starts; return the text."""
    conversations = [as_messages(prompt), teacher_messages(prompt, privileged_context, template)]
    student, teacher = encode_prompts(tokenizer, conversations, chat_template_kwargs)
    answer = encode_completion(tokenizer, prompt, privileged_context, chat_template_kwargs)
    shared = next((i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b), len(student))
    skipped, counted = tokenizer.decode(answer[:skip_first_tokens]), tokenizer.decode(answer[skip_first_tokens:])
    text = (
        f"--- student prompt ({len(student)} tokens) ---\n{tokenizer.decode(student)}\n"
        f"--- teacher prompt ({len(teacher)} tokens, the first {shared} shared) ---\n{tokenizer.decode(teacher)}\n"
        f"--- loss: after the first {skip_first_tokens} completion tokens; for the demonstration as completion ---\n"
        f"not in the loss: {skipped!r}\nin the loss:     {counted!r}\n"
    )
    print(text, file=file or sys.stdout)
    return text


def text_of(message: Mapping[str, Any]) -> str:
    """The text of one message; of content parts, the text parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content if part.get("type") == "text")


def _formatted(template: str, messages: Messages, demonstration: Any) -> Messages:
    text = demonstration if isinstance(demonstration, str) else "\n".join(filter(None, map(text_of, demonstration)))
    # Plain replacement: str.format would choke on braces inside a user's JSON.
    content = template.replace("{prompt}", "\0").replace("{privileged_context}", text)
    content = content.replace("\0", text_of(_question(messages)))
    return [*messages[:-1], {"role": "user", "content": content}]


def _question(messages: Messages) -> dict[str, Any]:
    return as_messages(messages)[-1]


def _is_messages(value: Any) -> TypeGuard[Messages]:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _encode(tokenizer: Any, messages: Messages, kwargs: dict[str, Any]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return _open_ended(tokenizer, "\n\n".join(map(text_of, messages)))
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, **kwargs
    )
    return list(encoded["input_ids"])


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to be continued: with what the tokenizer puts before it, without what it puts after it.

    Tokenizers of base models may end every text in an end-of-sequence token (`add_eos_token`, a post-processor): after
    it the model begins another document.
    """
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    raise ValueError(
        f"the tokenizer encodes {text[:80]!r} to other tokens with add_special_tokens than without, so that the "
        "prompt's end is not known; set a chat_template"
    )
