"""What touches transformers models: the language-model head as arguments of `linear_divergence`, and hidden states."""

from sdft_kernels.models.head import (
    HEAD_FAMILIES,
    REFUSED_FAMILIES,
    HeadSpec,
    head_kwargs,
    head_spec,
    verify_head,
)
from sdft_kernels.models.hidden import completion_hidden_states, context_length, hidden_states

__all__ = [
    "HEAD_FAMILIES",
    "REFUSED_FAMILIES",
    "HeadSpec",
    "completion_hidden_states",
    "context_length",
    "head_kwargs",
    "head_spec",
    "hidden_states",
    "verify_head",
]
