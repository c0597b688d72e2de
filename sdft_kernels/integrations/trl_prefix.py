"""Prompts computed once in TRL's padded batches: the hidden states of the fused trainers over prefix trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_kernels.distill.passes import tree_saves
from sdft_kernels.models import enable_shared_prefix, packed_hidden_states
from sdft_kernels.models.attention_hook import is_hooked
from sdft_kernels.models.hidden import unwrap_peft


def shared_completion_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor | None:
    """Hidden states that predict the last `length` tokens, after the final norm, common prefixes computed once.

    Args:
        model: enabled here if it is not.
        input_ids: (B, T) int64: prompts, left-padded, and completions, right-padded to `length`.
        attention_mask: (B, T), 1 at tokens.

    Returns:
        (B * length, H), zeros at padding; None where it would save little or cannot be: then whole sequences are right.
    """
    config = unwrap_peft(model).config
    if getattr(config, "attention_dropout", 0.0) and model.training:
        return None  # the attention over a tree has none
    seen = attention_mask.bool().cpu()
    ids = input_ids.cpu()
    lengths = seen[:, -length:].sum(1).tolist() if length else []
    prompts = [row[mask].tolist() for row, mask in zip(ids[:, :-length], seen[:, :-length], strict=True)]
    padded_right = all(bool(seen[i, seen.shape[1] - length :][:n].all()) for i, n in enumerate(lengths))
    if not any(lengths) or not padded_right or not all(prompts):
        return None
    completions = [row[:n].tolist() for row, n in zip(ids[:, -length:], lengths, strict=True)]
    if not tree_saves(prompts, completions):
        return None
    if not is_hooked(config._attn_implementation):  # a teacher that was put in place later
        enable_shared_prefix(model)
    groups = packed_hidden_states(model, prompts, [[completion] for completion in completions])
    hidden = torch.cat([piece for group in groups for piece in group])
    rows = torch.cat([torch.arange(n, dtype=torch.int64) + i * length for i, n in enumerate(lengths)]).to(hidden.device)
    return hidden.new_zeros(len(lengths) * length, hidden.shape[-1]).index_copy(0, rows, hidden)
