"""Refuses models and batches for which a shared prefix would silently give other numbers than separate sequences."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sdft_kernels.models.attention_hook import is_hooked, stock_implementation
from sdft_kernels.models.head import refuse_prompt_learning
from sdft_kernels.models.hidden import backbone, unwrap_peft

LAYER_TYPES = ("full_attention", "sliding_attention")
# Modules that carry a state from token to token outside attention: packed, it would run from one completion into the
# next one.
_RECURRENT = re.compile(
    r"Mamba|RWKV|RGLRU|GatedDelta|LinearAttention|LightningAttention|ShortConv|Retention|LSTM", re.I
)


def check_model(model: nn.Module) -> None:
    """Raise where prefixes of `model` cannot be shared.

    Raises:
        ValueError: not a causal transformers language model of attention layers (full or sliding-window) that go
            through transformers' attention interface.
        NotImplementedError: prompt-learning PEFT.
    """
    base = unwrap_peft(model)
    refuse_prompt_learning(model)
    name, config = type(base).__name__, getattr(base, "config", None)
    if config is None or not hasattr(base, "set_attn_implementation"):
        raise ValueError(f"model must be a transformers causal language model, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoder-only language models can share prefixes")
    backbone(model)
    if config.get_text_config() is not config:
        raise ValueError(f"{name} wraps a text model; pass its text-only ...ForCausalLM model")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends in both directions; only a causal model can share prefixes")
    layers = stateful_layers(base)
    if layers is not None:
        raise ValueError(
            f"{name} has layers other than attention ({layers}), whose state would run from one completion into the "
            "next: run its sequences separately (completion_hidden_states)"
        )
    if stock_implementation(config._attn_implementation) == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{name} caps its attention logits, which sdpa ignores (transformers before 5.24) or refuses: call "
            "set_attn_implementation('eager') first"
        )
    if not base._can_set_attn_implementation():
        raise ValueError(f"{name} does not call its attention through transformers' AttentionInterface")


def stateful_layers(base: Any) -> str | None:
    """Names of layers of a transformers model other than full and sliding-window attention; None if it has none."""
    odd = sorted(set(getattr(base.config, "layer_types", None) or ()) - set(LAYER_TYPES))
    recurrent = next((type(m).__name__ for m in base.modules() if _is_recurrent(m)), None)
    return ", ".join(odd) or recurrent


def check_ready(model: nn.Module) -> None:
    """Raise where `model` would not attend over a tree in the next pass.

    Raises:
        ValueError: shared prefixes not enabled, or switched off since; output_attentions.
    """
    base: Any = unwrap_peft(model)
    config = getattr(base, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if not is_hooked(implementation):
        raise ValueError(
            f"the attention of this {type(base).__name__} is {implementation!r}: call enable_shared_prefix(model) "
            "first, and again after any set_attn_implementation"
        )
    if getattr(config, "output_attentions", False):
        raise ValueError("output_attentions is not supported with shared prefixes: set config.output_attentions=False")


def check_layers(model: nn.Module, seen: set[int]) -> None:
    """Raise after a pass in which some layer did not attend over the tree.

    Raises:
        RuntimeError: the keyword did not reach every layer.
    """
    base: Any = unwrap_peft(model)
    layers = base.config.num_hidden_layers
    if len(seen) != layers:
        raise RuntimeError(
            f"only {len(seen)} of {layers} layers of this {type(base).__name__} attended over the prefix tree: its "
            "forward does not hand keywords down to every attention layer; run its sequences separately "
            "(completion_hidden_states)"
        )


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.RNNBase)) or _RECURRENT.search(type(module).__name__) is not None
