"""Keys and values for `generate`, each prompt's once for all its samples: `decode_cache`. Imports transformers."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sdft_kernels.models.decode_attention import ATTRIBUTE, DecodeKeys

FIRST_TOKENS = 32  # of the samples that a layer makes room for at first; doubled when they are full


class DecodeLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' as they were prefilled, the samples' own in a buffer that grows.

    A layer with a sliding window keeps everything too: its mask hides what the window does not reach.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, key: Tensor, value: Tensor, unread: set[int]) -> None:
        super().__init__()
        self.shared = (key, value)  # (prompts, Hkv, P, D)
        self.buffers: tuple[Tensor, Tensor] | None = None  # (prompts * R, Hkv, room, D)
        self.tokens = 0  # of each sample
        self.is_initialized = True
        # Of all layers: those updated whose attention has not asked for the keys. One layer runs after the other.
        self.unread = unread

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append a token of every sample; the keys returned are the samples' own and carry the way to the others."""
        if self.unread:
            raise RuntimeError("a layer did not attend through the function of enable_shared_prefix: not supported")
        start, self.tokens = self.tokens, self.tokens + key_states.shape[-2]
        buffers = self.buffers = self._with_room(key_states, value_states)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.tokens] = new
        self.unread.add(id(self))
        own_key, own_value = (buffer[:, :, : self.tokens] for buffer in buffers)
        setattr(own_key, ATTRIBUTE, functools.partial(self._read, buffers, self.tokens))
        return own_key, own_value

    def _read(self, buffers: tuple[Tensor, Tensor], tokens: int) -> DecodeKeys:
        self.unread.discard(id(self))
        return DecodeKeys(*self.shared, *(buffer[:, :, :tokens] for buffer in buffers))

    def _with_room(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        if self.buffers is not None and self.tokens <= self.buffers[0].shape[2]:
            return self.buffers
        room = max(FIRST_TOKENS, self.tokens, 0 if self.buffers is None else 2 * self.buffers[0].shape[2])
        # Zeros, since products read views of the buffers, and some read a few bytes behind them.
        key, value = (x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in states)
        if self.buffers is not None:
            for old, new in zip(self.buffers, (key, value), strict=True):
                new[:, :, : old.shape[2]] = old
        return key, value

    def get_seq_length(self) -> int:
        """Tokens of a sample, its prompt's included."""
        return self.shared[0].shape[2] + self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the mask stands for, and the first one's number."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing: a layer begins with its prompts."""

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the keys of samples only grow; generate must not reorder, crop or offload it")

    reset = crop = reorder_cache = offload = prefetch = batch_repeat_interleave = batch_select_indices = _refuse


def decode_cache(prefilled: Cache) -> Cache:
    """The cache for the samples of prompts whose keys and values are in `prefilled`, every layer's whole."""
    unread: set[int] = set()
    return Cache(layers=[DecodeLayer(layer.keys, layer.values, unread) for layer in prefilled.layers])
