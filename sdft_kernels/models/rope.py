"""Rotary frequencies that depend on the longest sequence of a pass: which sequences may share one, and what is left.

Longrope has two sets of frequencies, for passes up to a length and beyond it; dynamic NTK scaling has its own set for
every length beyond it. A pass gives all its sequences the frequencies of the longest one, so a short sequence beside a
long one gets other numbers than alone. transformers also keeps dynamic frequencies from one pass to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sdft_kernels.models.peft import unwrap_peft

Key = tuple[int, ...]


def pass_key(model: nn.Module, length: int) -> Key:
    """Sequences of equal keys have the same frequencies in a pass together as alone.

    Args:
        length: of the sequence, in tokens.
    """
    return tuple(
        (length if kind == "dynamic" else 1) if length > limit else 0
        for kind, limit in _length_dependent(unwrap_peft(model))
    )


def generation_batches(
    model: nn.Module, prompts: Sequence[Sequence[int]], order: Sequence[int], size: int, new_tokens: int
) -> Iterator[list[int]]:
    """Indices of prompts that may be continued side by side, in `order`, at most `size` at a time.

    Prompts that stay below every limit, whatever is added to them; prompts that are beyond it already; else prompts of
    one length, which pass it in the same step.

    Args:
        order: all indices, prompts of equal length next to each other.
        new_tokens: at most, for each of them.
    """

    def key(i: int) -> tuple[Key, int]:
        now, then = pass_key(model, len(prompts[i])), pass_key(model, len(prompts[i]) + new_tokens)
        return now, 0 if now == then else len(prompts[i])

    for _, group in itertools.groupby(order, key):
        members = list(group)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def reset_rope(model: nn.Module) -> None:
    """Forget the lengths of earlier passes: the model is as it was before any, and so are its buffers for a cache.

    Dynamic frequencies are then computed for the next pass's own longest sequence: transformers resets them only for a
    pass that is shorter than the limit, and otherwise keeps those of the longest so far. Longrope's it chooses anew in
    every pass, but leaves the last ones in place.
    """
    base = unwrap_peft(model)
    if not any(True for _ in _length_dependent(base)):
        return
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
            prefix = f"{layer}_" if layer else ""
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if not isinstance(kind, str) or original is None:
                continue
            current: Tensor = getattr(module, f"{prefix}inv_freq")
            if kind == "longrope":
                current.copy_(original)  # in place, as transformers writes them
            elif "dynamic" in kind:
                module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def dynamic_factor(config: Any) -> float:
    """How many times `max_position_embeddings` dynamic NTK scaling allows; 1 where a rope has none."""
    ropes = _ropes(config)
    return min((float(rope.get("factor") or 1) if _kind(rope) == "dynamic" else 1.0 for rope in ropes), default=1.0)


def _length_dependent(base: Any) -> Iterator[tuple[str, int]]:
    """("longrope" or "dynamic", the length beyond which the frequencies change) of each rope of a model."""
    config: Any = getattr(base, "config", None)
    for rope in _ropes(config):
        if _kind(rope) == "longrope":
            yield "longrope", int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif _kind(rope) == "dynamic":
            yield "dynamic", int(config.max_position_embeddings)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of a configuration: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _kind(rope: dict[str, Any]) -> str:
    kind = rope.get("rope_type") or "default"
    return "dynamic" if "dynamic" in kind else kind
