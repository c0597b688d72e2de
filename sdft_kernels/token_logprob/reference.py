"""The whole op in plain PyTorch: the oracle in fp64, and `impl="reference"`. Materialises (N, V) logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._gemm import dense
from .._head import ABSENT_TARGET, IDENTITY, Transform
from .fields import TokenLogprob


def linear_token_logprob_reference(
    input: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    *,
    mask: Tensor | None = None,  # (N,) bool
    bias: Tensor | None = None,  # (V,)
    transform: Transform = IDENTITY,
) -> TokenLogprob:
    """`linear_token_logprob` with the logits in memory, in the inputs' own dtype; autograd does the gradient."""
    if mask is not None:
        index = mask.nonzero()[:, 0]
        input, target = input[index], target[index]
    raw = dense(input) @ dense(weight).t()
    if bias is not None:
        raw = raw + bias
    raw = raw.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
    absent = raw == -math.inf
    z = raw.masked_fill(absent, 0.0) * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = (z / transform.temperature).masked_fill(absent, -math.inf)
    x = z.log_softmax(-1)
    p = x.exp()
    present = target != ABSENT_TARGET
    logprob = x.gather(-1, target.where(present, 0)[:, None])[:, 0].where(present, 0.0)
    entropy = -(p * x.masked_fill(p == 0, 0.0)).sum(-1)
    tokens = (logprob, entropy, z.logsumexp(-1))
    if mask is None:
        return TokenLogprob(*tokens)
    return TokenLogprob(*(t.new_zeros(mask.shape).index_put((index,), t) for t in tokens))
