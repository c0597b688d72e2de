"""Shared-prefix attention with one dense mask: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .._gemm import dense
from .tree import PrefixTree


def visible_keys(tree: PrefixTree, prefix: int, window: int | None) -> Tensor:
    """(T, prefix + T) bool: which keys each token sees; the cached prefix stands first."""
    owner = torch.repeat_interleave(
        torch.arange(len(tree), dtype=torch.int64), torch.tensor(tree.lengths, dtype=torch.int64)
    )
    above = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for segment, path in enumerate(tree.paths):
        above[segment, list(path)] = True
    position = torch.cat([torch.arange(prefix, dtype=torch.int64), tree.to("cpu").positions + prefix])
    mine = position[prefix:, None]
    seen = torch.cat([torch.ones(tree.tokens, prefix, dtype=torch.bool), above[owner][:, owner]], dim=1)
    seen &= position <= mine
    return seen if window is None else seen & (position > mine - window)


def shared_prefix_attention_reference(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hkv, D)
    value: Tensor,  # (T, Hkv, D)
    tree: PrefixTree,
    *,
    prefix_kv: tuple[Tensor, Tensor] | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,  # (Hq,)
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output in the query's dtype and (T, Hq) natural-log LSE; sums in fp32, or fp64 for fp64.

    Holds (Hq, T, P + T) scores and repeats keys and values; plain autograd gives its gradients.
    """
    dtype, wide = query.dtype, accumulate_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    if prefix_kv is not None:
        key, value = torch.cat([prefix_kv[0], key]), torch.cat([prefix_kv[1], value])
    query = dense(query.to(wide))
    keys, values = (dense(x.to(wide)).repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible_keys(tree, key.shape[0] - query.shape[0], window).to(query.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, query.shape[0], 1)], dim=-1)
    lse = logits.logsumexp(-1)  # (Hq, T)
    probabilities = torch.exp(scores - lse[..., None])
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(dtype), lse.t()
