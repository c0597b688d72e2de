"""The attention function that transformers calls: over a prefix tree where a pass carries one, over prompts that stand
once for their samples where `generate` decodes over a `decode_cache`, else the stock function.

A pass carries its tree as a keyword of the model's forward, which transformers hands down to every attention layer. No
state outside the call: a checkpointed layer that is recomputed in the backward pass, on another thread, sees the same.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sdft_kernels._checks import operand_dtype
from sdft_kernels.models.decode_attention import DecodeKeys, decode_attention, read_keys
from sdft_kernels.prefix_attention import KeyValue, Layers, PrefixTree, shared_prefix_attention

KEYWORD = "sdft_row"
# transformers looks for "sdpa", "flash", "flex_attention", "|" and "/" in an implementation's name; none may be here.
NAME = "sdft_shared_prefix"

_stock_of: dict[str, str] = {}  # registered name -> the implementation behind it


class CannotShareError(ValueError):
    """A packed pass that would give other numbers than separate sequences; those are right."""


class Group(NamedTuple):
    """Consecutive tokens of a packed row.

    Attributes:
        tree: of these tokens.
        prefix: by layer the keys and values that stand before the tree's roots, or None.
        first_position: of the roots: the length of that prefix.
    """

    tree: PrefixTree
    prefix: Layers | None = None
    first_position: int = 0


class PackedRow:
    """What the attention layers of one pass read. Not a pytree: wrappers that cast or move keywords leave it alone.

    Args:
        groups: in the order of the tokens.
        capture: keep each layer's keys and values in `captured`, of a row without prefixes.

    Attributes:
        seen: layers that attended over the tree.
        captured: by layer (key, value), (P, Hkv, D); of a layer with a window the last ones that a token after the row
            can see.
    """

    def __init__(self, groups: Sequence[Group], *, capture: bool = False) -> None:
        self.groups = tuple(groups)
        self.capture = capture
        self.seen: set[int] = set()
        self.captured: dict[int, KeyValue] = {}

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return sum(group.tree.tokens for group in self.groups)

    def keywords(self, device: torch.device | str) -> dict[str, Any]:
        """The keywords of the model's forward for this row; `input_ids` (1, T) come beside them."""
        positions = [group.tree.to(device).positions + group.first_position for group in self.groups]
        return {
            "position_ids": torch.cat(positions)[None],
            # Four dimensions: transformers passes it on as it is and builds no (T, T) mask from the position ids.
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=device),
            "use_cache": False,
            KEYWORD: self,
        }


def shared_prefix_kwargs(tree: PrefixTree, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Keywords that make an enabled model's forward attend over `tree`.

        tree, ids = PrefixTree.from_sequences(sequences)
        logits = model(input_ids=ids[None], **shared_prefix_kwargs(tree)).logits[0]
        logits[tree.rows(i)]  # those of sequence i

    Args:
        tree: of T tokens in one packed row.
        device: of the model.

    Returns:
        `position_ids` (1, T), a placeholder `attention_mask`, `use_cache` and the tree.
    """
    return PackedRow([Group(tree)]).keywords(device)


def is_hooked(implementation: str | None) -> bool:
    """Whether `implementation` is one that `register` named."""
    return implementation is not None and implementation in _stock_of


def stock_implementation(implementation: str) -> str:
    """The implementation behind a registered name; any other name is its own."""
    return _stock_of.get(implementation, implementation)


def register(stock: str) -> str:
    """Register attention and mask function in front of the implementation `stock`; returns the name to set."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    short = re.sub(r"[^a-z0-9]+", "_", stock.lower().replace("flash", "fa").replace("flex", "fx"))
    name = NAME if stock == "sdpa" else f"{NAME}_{short}"
    _stock_of[name] = stock
    AttentionInterface.register(name, functools.partial(_attention, stock))
    AttentionMaskInterface.register(name, functools.partial(_mask, stock))
    return name


def _mask(stock: str, *args: Any, **options: Any) -> Any:
    """The stock mask. A pass with a tree does not come here, since its mask has four dimensions already."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if stock not in ALL_MASK_ATTENTION_FUNCTIONS:  # transformers makes no mask then
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **options)


def _attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function: (B, heads, T, D) in, (B, T, Hq, D) out."""
    row = options.pop(KEYWORD, None)
    decoded = read_keys(key)
    if decoded is not None:
        return _over_samples(query, decoded, attention_mask, options), None
    if row is None:
        function, shown = _stock_function(stock, module)
        result: tuple[Tensor, Tensor | None] = function(shown, query, key, value, attention_mask, *args, **options)
        return result
    _refuse(module, query, key, attention_mask, options)
    return _over_trees(module, row, query, key, value, options), None


def _over_trees(
    module: Any, row: PackedRow, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    layer, window = module.layer_idx, options.get("sliding_window")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    if row.capture:
        # Under autocast a norm leaves keys in fp32, which the op would round again in every pass. Contiguous, so that
        # the layer's own tensors (fused projections, keys before the window) go when the layer is done.
        first, dtype = 0 if window is None else max(0, len(k) - (window - 1)), operand_dtype(query)
        row.captured[layer] = (k[first:].to(dtype).contiguous(), v[first:].to(dtype).contiguous())
    settings: dict[str, Any] = dict(
        scale=options.get("scaling"), softcap=options.get("softcap"), window=window, sinks=options.get("s_aux")
    )
    outputs: list[Any] = []
    start = 0
    for group in row.groups:
        part = slice(start, start := start + group.tree.tokens)
        prefix = None if group.prefix is None else group.prefix[layer]
        outputs.append(shared_prefix_attention(q[part], k[part], v[part], group.tree, prefix_kv=prefix, **settings))
    row.seen.add(layer)
    output: Tensor = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output[None].contiguous()  # (1, T, Hq, D)


def _over_samples(query: Tensor, keys: DecodeKeys, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    if query.shape[2] != 1 or (mask is not None and mask.ndim != 4):
        raise ValueError(f"decoding takes one token of each sample at a time, got {query.shape[2]}")
    scale = options.get("scaling")
    return decode_attention(
        query, keys, mask, scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=options.get("softcap"), sinks=options.get("s_aux"),
    )  # fmt: skip


def _refuse(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    """Raise where a tree would give other numbers than the stock path, one sequence at a time."""
    name = type(module).__name__
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1):
        raise CannotShareError(
            "a packed row has no padding and takes no attention_mask (left-padded prompts: strip the padding), and no "
            "cache: pass the keywords of shared_prefix_kwargs(tree) unchanged"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise CannotShareError(
            f"{name}: a packed row is one sequence without past_key_values, input_ids (1, T); got a batch of "
            f"{query.shape[0]}, {query.shape[2]} queries and {key.shape[2]} keys"
        )
    if options.get("dropout"):
        raise CannotShareError(
            f"{name} has attention dropout {options['dropout']} in training, which shared prefixes do not support: "
            "load the model with attention_dropout=0.0"
        )
    if options.get("output_attentions"):
        raise CannotShareError(
            "output_attentions is not supported with shared prefixes, which never form the probabilities"
        )
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CannotShareError(
            f"{name} is not causal; a prefix can be shared only where no token sees the tokens after it"
        )
    if options.get("position_bias") is not None:
        raise CannotShareError(f"{name} adds a position bias to its scores, which shared prefixes do not support")
    if getattr(module, "layer_idx", None) is None:
        raise CannotShareError(f"{name} has no layer_idx, by which a layer's cached keys are found")
    if options.get("sliding_window") is None and has_window(module.config, cast(int, module.layer_idx)):
        raise CannotShareError(
            f"{name} is a sliding-window layer but hides its window from the attention function: this model is not "
            "supported; do not enable shared prefixes for it"
        )


def has_window(config: Any, layer: int) -> bool:
    """Whether the configuration gives this layer a sliding window."""
    types = getattr(config, "layer_types", None)
    if types:
        return bool(types[layer] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and bool(getattr(config, "use_sliding_window", True))


def _stock_function(stock: str, module: nn.Module) -> tuple[Callable[..., Any], Any]:
    """The stock function and the module as it should see it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if stock == "eager":  # every modeling file has its own
        for cls in type(module).__mro__:
            function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if function is not None:
                return function, module
        raise ValueError(f"{type(module).__name__} has no eager attention function")
    function = ALL_ATTENTION_FUNCTIONS[stock]
    return function, module if stock == "sdpa" else _StockView(module, stock)


class _StockView:
    """A module, or its configuration, whose `_attn_implementation` reads as the stock one's: flash attention asks."""

    def __init__(self, target: Any, stock: str) -> None:
        self._target, self._stock = target, stock

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            return self._stock
        value = getattr(self._target, name)
        return _StockView(value, self._stock) if name == "config" else value
