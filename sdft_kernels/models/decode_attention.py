"""Attention of newly sampled tokens over a prompt that stands once for all its samples, and their own tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# An attribute of the keys that a `DecodeLayer` hands to a layer: it travels to the attention function with them.
ATTRIBUTE = "sdft_decode_keys"


class DecodeKeys(NamedTuple):
    """Keys and values that the samples of some prompts see: R samples a prompt, one after the other.

    Attributes:
        shared_key, shared_value: (prompts, Hkv, P, D), of the prompts.
        own_key, own_value: (prompts * R, Hkv, S, D), of the samples' own tokens, the newest last.
    """

    shared_key: Tensor
    shared_value: Tensor
    own_key: Tensor
    own_value: Tensor


def decode_attention(
    query: Tensor,
    keys: DecodeKeys,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(B, 1, Hq, D): softmax(query key^T * scale) value over the prompt's keys and the sample's own.

    The query heads of all samples of a prompt are the rows of one product with the prompt's keys, which are read once
    for them and not copied. The softmax is in fp32.

    Args:
        query: (B, Hq, 1, D), of the newest token of each sample.
        keys: with B = prompts * R.
        mask: (B, 1 or Hq, 1, P + S), True or 0 where a key is seen, False or -inf where not; None where all are.
        scale: of the scores.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (Hq,) scores of keys without a value.
    """
    batch, heads, _, size = query.shape
    prompts, key_heads, length, _ = keys.shared_key.shape
    repeats, grouped = batch // prompts, heads // key_heads
    # Rows are ordered (prompts, Hkv, R, G), as the product with the prompts' keys wants them: only what concerns the
    # samples' own few keys, which want (prompts, R, Hkv, G), is moved.
    by_sample = (query * scale).reshape(prompts, repeats, key_heads, grouped, size)
    rows = by_sample.transpose(1, 2).reshape(prompts, key_heads, repeats * grouped, size)
    shared = (rows @ keys.shared_key.transpose(-1, -2)).unflatten(2, (repeats, grouped))
    own = by_sample.flatten(0, 1) @ keys.own_key.transpose(-1, -2)
    scores = torch.cat([shared, own.unflatten(0, (prompts, repeats)).transpose(1, 2)], dim=-1).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        per_head = (1, 1) if mask.shape[1] == 1 else (key_heads, grouped)
        seen = mask.reshape(prompts, repeats, *per_head, mask.shape[-1]).transpose(1, 2)
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    if sinks is not None:
        column = sinks.float().reshape(key_heads, 1, grouped, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1).to(query.dtype)
    shared_weights, own_weights = weights[..., :length], weights[..., length : length + own.shape[-1]]
    output = (shared_weights.flatten(2, 3) @ keys.shared_value).unflatten(2, (repeats, grouped)).transpose(1, 2)
    output = output.reshape(batch, key_heads, grouped, size)
    output = output + own_weights.transpose(1, 2).reshape(batch, key_heads, grouped, -1) @ keys.own_value
    return output.reshape(batch, 1, heads, size)


def read_keys(keys: Tensor) -> DecodeKeys | None:
    """What a `DecodeLayer` handed over with `keys`; None where they are plain keys."""
    found: Any = getattr(keys, ATTRIBUTE, None)
    return found() if found is not None else None
