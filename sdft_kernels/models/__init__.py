"""What touches transformers models: the head as arguments of `linear_divergence`, hidden states, shared prefixes."""

from sdft_kernels.models.attention_hook import shared_prefix_kwargs
from sdft_kernels.models.flops import PassFlops, StepFlops, step_flops
from sdft_kernels.models.head import (
    HEAD_FAMILIES,
    REFUSED_FAMILIES,
    HeadSpec,
    head_kwargs,
    head_spec,
    verify_head,
)
from sdft_kernels.models.hidden import completion_hidden_states, context_length, hidden_states
from sdft_kernels.models.shared_prefix import (
    disable_shared_prefix,
    enable_shared_prefix,
    packed_hidden_states,
    verify_shared_prefix,
)

__all__ = [
    "HEAD_FAMILIES",
    "REFUSED_FAMILIES",
    "HeadSpec",
    "PassFlops",
    "StepFlops",
    "completion_hidden_states",
    "context_length",
    "disable_shared_prefix",
    "enable_shared_prefix",
    "head_kwargs",
    "head_spec",
    "hidden_states",
    "packed_hidden_states",
    "shared_prefix_kwargs",
    "step_flops",
    "verify_head",
    "verify_shared_prefix",
]
