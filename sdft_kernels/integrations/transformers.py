"""transformers models without this package's training module: everything is in `sdft_kernels.models`."""

from sdft_kernels.models import (
    completion_hidden_states,
    disable_shared_prefix,
    enable_shared_prefix,
    head_kwargs,
    hidden_states,
    packed_hidden_states,
    shared_prefix_kwargs,
    verify_head,
    verify_shared_prefix,
)
from sdft_kernels.prefix_attention import PrefixCache, PrefixTree

__all__ = [
    "PrefixCache",
    "PrefixTree",
    "completion_hidden_states",
    "disable_shared_prefix",
    "enable_shared_prefix",
    "head_kwargs",
    "hidden_states",
    "packed_hidden_states",
    "shared_prefix_kwargs",
    "verify_head",
    "verify_shared_prefix",
]
