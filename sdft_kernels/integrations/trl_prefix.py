"""Hidden states of TRL's padded batches: prompts computed once over prefix trees, or whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_kernels.distill.passes import tree_saves
from sdft_kernels.models import completion_hidden_states, enable_shared_prefix, hidden_states, packed_hidden_states
from sdft_kernels.models.attention_hook import is_hooked
from sdft_kernels.models.dropout import attention_drops
from sdft_kernels.models.hidden import unwrap_peft
from sdft_kernels.models.rope import pass_key

Sequences = tuple[list[list[int]], list[list[int]]]


def completion_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, share: bool) -> Tensor:
    """Hidden states that predict the last `length` tokens, after the final norm.

    Every token has the position that it has in its sequence alone: padding on the left is not counted.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        input_ids: (B, T) int64: prompts, left-padded, and completions, right-padded to `length`.
        attention_mask: (B, T), 1 at tokens.
        share: compute common prefixes once, where that saves enough.

    Returns:
        (B * length, H); what stands at padding is not defined.
    """
    shared = shared_completion_hidden(model, input_ids, attention_mask, length) if share else None
    if shared is not None:
        return shared
    if pass_key(model, input_ids.shape[1]) != pass_key(model, 1):
        sequences = _sequences(input_ids, attention_mask, length)
        if sequences is not None:  # whose rotary frequencies may differ: not those of the longest one for all
            return _padded(completion_hidden_states(model, *sequences), sequences[1], length)
    hidden = hidden_states(model, input_ids, attention_mask)
    return hidden[:, -length - 1 : -1].reshape(-1, hidden.shape[-1])


def shared_completion_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor | None:
    """`completion_hidden` with common prefixes computed once, zeros at padding.

    Returns:
        (B * length, H); None where it would save little or cannot be: then whole sequences are right.
    """
    if attention_drops(model):
        return None  # the attention over a tree has none
    sequences = _sequences(input_ids, attention_mask, length)
    if sequences is None or not tree_saves(*sequences):
        return None
    prompts, completions = sequences
    if not is_hooked(unwrap_peft(model).config._attn_implementation):  # a teacher that was put in place later
        enable_shared_prefix(model)
    groups = packed_hidden_states(model, prompts, [[completion] for completion in completions])
    return _padded(torch.cat([piece for group in groups for piece in group]), completions, length)


def _sequences(input_ids: Tensor, attention_mask: Tensor, length: int) -> Sequences | None:
    """Prompts and completions without padding; None without a completion token, or where the mask is not padding."""
    seen = attention_mask.bool().cpu()
    ids = input_ids.cpu()
    lengths = seen[:, -length:].sum(1).tolist() if length else []
    prompts = [row[mask].tolist() for row, mask in zip(ids[:, :-length], seen[:, :-length], strict=True)]
    padded_right = all(bool(seen[i, seen.shape[1] - length :][:n].all()) for i, n in enumerate(lengths))
    if not any(lengths) or not padded_right or not all(prompts):
        return None
    return prompts, [row[:n].tolist() for row, n in zip(ids[:, -length:], lengths, strict=True)]


def _padded(hidden: Tensor, completions: list[list[int]], length: int) -> Tensor:
    """(B * length, H) from the packed hidden states of the completions, zeros at padding."""
    rows = torch.cat([torch.arange(len(c), dtype=torch.int64) + i * length for i, c in enumerate(completions)]).to(
        hidden.device
    )
    return hidden.new_zeros(len(completions) * length, hidden.shape[-1]).index_copy(0, rows, hidden)
