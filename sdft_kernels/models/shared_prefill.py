"""Generation that computes each prompt once for all its samples: `prefilled_inputs`, and when that cannot be."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sdft_kernels.models.attention_hook import is_hooked, stock_implementation
from sdft_kernels.models.head import refuse_prompt_learning
from sdft_kernels.models.hidden import backbone, is_compiled, unwrap_peft
from sdft_kernels.models.prefix_support import stateful_layers
from sdft_kernels.models.rope import pass_key

# Arguments of `generate`, beside those of its configuration, that do not touch the prompt or the cache.
_HARMLESS = (
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "tokenizer",
)


def prefill_obstacle(model: Any, tokens: int, arguments: Mapping[str, Any]) -> str | None:
    """Why `generate` must compute a prompt once for each of its samples; None where once for all of them will do.

    Args:
        model: what `generate` will be called on.
        tokens: of the longest prompt.
        arguments: of that call, beside the prompts.

    Raises:
        ValueError: arguments that `generate` would refuse.
    """
    base = unwrap_peft(model)
    config = getattr(base, "config", None)
    if config is None or getattr(base, "generation_config", None) is None:
        return f"{type(base).__name__} is no transformers model"
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return f"{type(base).__name__} is not a plain decoder"
    layers = stateful_layers(base)
    if layers is not None:
        return f"{type(base).__name__} has layers other than full and sliding-window attention ({layers})"
    try:
        refuse_prompt_learning(model)
    except NotImplementedError as error:
        return str(error)
    if pass_key(model, tokens - 1) != pass_key(model, tokens):
        return f"the rope of {type(base).__name__} has other frequencies for {tokens - 1} tokens than for {tokens}"
    return _generation_obstacle(base, arguments) or _cache_obstacle(config)


def prefilled_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor, repeats: int) -> dict[str, Any]:
    """Run every prompt, but for its last token, through the layers once, for all its samples.

    A model that `enable_shared_prefix` enabled keeps those keys and values once (`decode_cache`): stock attention wants
    them once for each sample, and transformers' cache copies them all for every new token.

    Args:
        model: in eval mode, without a `prefill_obstacle`.
        input_ids, attention_mask: (B, T) int64, left-padded, T at least 2.
        repeats: samples of each prompt, R.

    Returns:
        Prompts (B * R, T), attention mask and cache: arguments of `generate`, to be called without
        `num_return_sequences`. The samples of a prompt stand one after the other, as `generate` would put them.
    """
    from transformers import DynamicCache

    base = unwrap_peft(model)
    once = _decodes(base)
    # Without a configuration no layer drops what its window does not reach.
    cache: Any = DynamicCache() if once else DynamicCache(config=base.config)
    layers = backbone(model)
    name = _cache_name(layers)
    # As `generate` numbers them; padding has some position that no one sees.
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    layers(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        **{name: cache},
    )
    if once:
        from sdft_kernels.models.decode_cache import decode_cache

        cache = decode_cache(cache)
    else:
        cache.batch_repeat_interleave(repeats)
    ids, mask = (tensor.repeat_interleave(repeats, dim=0) for tensor in (input_ids, attention_mask))
    return {"input_ids": ids, "attention_mask": mask, name: cache}


def _decodes(base: Any) -> bool:
    """Whether the attention of this model reads a `decode_cache`: its masks say by key what is seen."""
    implementation = base.config._attn_implementation
    if not is_hooked(implementation) or stock_implementation(implementation) not in ("sdpa", "eager"):
        return False
    return not is_compiled(base)  # which would trace through the cache


def _cache_name(layers: nn.Module) -> str:
    """The keyword that carries a cache: transformers renamed `past_key_values` to `cache` between 5.17 and 5.24."""
    return "cache" if "cache" in inspect.signature(layers.forward).parameters else "past_key_values"


def _generation_obstacle(base: Any, arguments: Mapping[str, Any]) -> str | None:
    """Whether `generate` would do something else with the cache than append to it, one token of each sample a step."""
    from transformers.generation import GenerationMode

    settings = copy.deepcopy(base.generation_config)
    others = settings.update(**arguments)
    other = next((name for name, value in others.items() if value is not None and name not in _HARMLESS), None)
    if other is not None:
        return f"generate is given {other}"
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"generate does {mode.value}"
    for name in ("cache_implementation", "prefill_chunk_size", "guidance_scale"):
        if getattr(settings, name, None) is not None:
            return f"generate has {name}={getattr(settings, name)!r}"
    return "generate has use_cache=False" if settings.use_cache is False else None


def _cache_obstacle(config: Any) -> str | None:
    """Whether some layers keep their keys and values elsewhere than in one entry of the cache for each layer."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    odd = next((type(c).__name__ for c in layers if type(c) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
    if odd is not None:
        return f"its cache has layers of {odd}"
    if len(layers) != config.num_hidden_layers:
        return f"its cache has {len(layers)} layers for {config.num_hidden_layers} of the model"
    return None
