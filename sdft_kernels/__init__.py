"""Fused kernels for Self-Distillation Fine-Tuning (SDFT, arXiv 2601.19897).

Letters, fixed for the whole package: N tokens; V vocabulary; H (H_t) hidden size of student (teacher); K top-k; P
prefix length; L suffix length; R rollouts (completions) per prompt; D head size; Hq/Hkv query/key heads; C tokens in a
chunk; G one LM-head GEMM, 2*N*V*H FLOP. p_s, p_t: softmaxes of student and teacher after scale, softcap, temperature,
in that order: a = h W^T + bias; u = scale*a; c = cap*tanh(u/cap), or u without a cap; z = c/temperature.

`alpha` is that of TRL's SDFT: 0 = KL(p_t||p_s), 1 = KL(p_s||p_t), between = generalized Jensen-Shannon divergence
alpha*KL(p_t||m) + (1-alpha)*KL(p_s||m) with the mixture m = (1-alpha)*p_s + alpha*p_t. The ends are special cases, not
limits (the limit at 0 is 0, the value there is a KL). No T^2 factor anywhere; every output is at the given temperature.

Importing this package loads none of it: every name below loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .distill import DistillBatch, SDFTConfig, SDFTTrainer, SelfDistiller
    from .divergence import (
        AffineTokenLoss,
        TokenDivergence,
        linear_divergence,
        linear_divergence_loss,
        sdft_token_loss,
    )
    from .models import head_kwargs
    from .prefix_attention import PrefixTree, shared_prefix_attention
    from .token_logprob import TokenLogprob, linear_token_logprob
    from .topk_divergence import TopkDivergence, linear_topk_divergence

__all__ = [
    "AffineTokenLoss",
    "DistillBatch",
    "PrefixTree",
    "SDFTConfig",
    "SDFTTrainer",
    "SelfDistiller",
    "TokenDivergence",
    "TokenLogprob",
    "TopkDivergence",
    "__version__",
    "head_kwargs",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_token_logprob",
    "linear_topk_divergence",
    "sdft_token_loss",
    "shared_prefix_attention",
]

_SUBMODULE = {
    "AffineTokenLoss": "divergence",
    "DistillBatch": "distill",
    "PrefixTree": "prefix_attention",
    "SDFTConfig": "distill",
    "SDFTTrainer": "distill",
    "SelfDistiller": "distill",
    "TokenDivergence": "divergence",
    "TokenLogprob": "token_logprob",
    "TopkDivergence": "topk_divergence",
    "head_kwargs": "models",
    "linear_divergence": "divergence",
    "linear_divergence_loss": "divergence",
    "linear_token_logprob": "token_logprob",
    "linear_topk_divergence": "topk_divergence",
    "sdft_token_loss": "divergence",
    "shared_prefix_attention": "prefix_attention",
}
_EXTRA = {"models": "train", "distill": "train"}


def __getattr__(name: str) -> Any:
    if name not in _SUBMODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    submodule = _SUBMODULE[name]
    try:
        value = getattr(importlib.import_module(f"{__name__}.{submodule}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __name__ or submodule not in _EXTRA:
            raise
        extra = _EXTRA[submodule]
        raise ImportError(
            f"{__name__}.{name} needs {missing}, which is not installed: pip install 'sdft-kernels[{extra}]'",
            name=missing,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
