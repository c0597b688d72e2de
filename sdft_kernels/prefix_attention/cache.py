"""`PrefixCache`: keys and values of prompt prefixes, kept across passes of a model whose weights do not change."""

from __future__ import annotations

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .identity import Fingerprint, ModelState, fingerprint, model_state, unwrapped

# One layer's key and value, (P, Hkv, D) each; sliding layers may keep fewer than P, the last ones.
KeyValue = tuple[Tensor, Tensor]
Layers = Mapping[int, KeyValue]

POLICIES = ("admit_until_full", "lru")


class CacheOwner(NamedTuple):
    """A model in one state, with weights that were checked: what `PrefixCache.owner` returns and `fetch` takes."""

    model: int  # id of the object, which the cache watches
    version: int
    state: ModelState


class CacheStatistics(NamedTuple):
    """Counts since the cache was made.

    Attributes:
        hits: prefixes found.
        misses: prefixes computed.
        tokens_saved: tokens of the prefixes found.
        tokens_computed: tokens of the prefixes computed.
        rejected: computed prefixes that were not kept, for want of room.
        evicted: prefixes dropped to make room (policy "lru").
        entries: prefixes held now.
        bytes: of their keys and values.
    """

    hits: int = 0
    misses: int = 0
    tokens_saved: int = 0
    tokens_computed: int = 0
    rejected: int = 0
    evicted: int = 0
    entries: int = 0
    bytes: int = 0


class _Entry(NamedTuple):
    """Layers as they are kept, and the device where each one's keys and values were computed."""

    layers: dict[int, KeyValue]
    devices: dict[int, torch.device]


@dataclass
class _Watched:
    """A model the cache knows: a weak reference, its version, and the weights its entries were computed with."""

    reference: weakref.ref[nn.Module]
    version: int
    fingerprints: dict[ModelState, Fingerprint]


class PrefixCache:
    """Keeps the keys and values of prefixes while the weights that made them last.

    An entry is found by: the model object (held weakly) and its version, mode, active adapters, dtype and autocast
    dtype, rope parameters, the values of its buffers (rotary frequencies), first position, and the token ids, compared
    one by one. Whoever changes the weights calls `invalidate`; a change that was not announced is found by a
    fingerprint of the weights (`identity.fingerprint`, which says what it does not see) at the next use, and raises.

    Over prefixes that come back in a fixed order, epoch after epoch, and do not all fit, LRU never hits; keeping the
    first that fit hits on all of those. So that is the default; "lru" is for prefixes that come back within a step.

    Args:
        budget_bytes: keys and values kept, at most. 0 keeps none.
        device: where entries live; None is where they were computed.
        offload: keep entries in (on CUDA: pinned) host memory, copied without blocking to where they are used. Not yet
            run on a GPU.
        policy: "admit_until_full": what does not fit is not kept. "lru": the least recently used make room for it. An
            entry larger than the budget is never kept.

    Raises:
        ValueError: a negative budget, an unknown policy, `offload` with a device other than the CPU.
    """

    def __init__(
        self,
        budget_bytes: int,
        device: torch.device | str | None = None,
        offload: bool = False,
        *,
        policy: Literal["admit_until_full", "lru"] = "admit_until_full",
    ) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must not be negative, got {budget_bytes}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
        if offload and device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"offload keeps entries on the CPU; leave device out, got {device}")
        self.budget_bytes = int(budget_bytes)
        self.policy = policy
        self.offload = offload
        self.device = torch.device("cpu") if offload else None if device is None else torch.device(device)
        self._watched: dict[int, _Watched] = {}
        self._entries: OrderedDict[tuple[CacheOwner, int, bytes], _Entry] = OrderedDict()
        self._counts = CacheStatistics()

    @property
    def statistics(self) -> CacheStatistics:
        """The counts now."""
        return self._counts

    def owner(self, model: nn.Module) -> CacheOwner:
        """`model` as it is now, for `fetch`: reads its state and checks its weights. Call it once for each pass.

        Args:
            model: a PEFT model is the model inside it.

        Raises:
            RuntimeError: weights that changed since the last call without `invalidate`.
        """
        model = unwrapped(model)
        watched = self._watch(model)
        state, now = model_state(model), fingerprint(model)
        if watched.fingerprints.setdefault(state, now) != now:
            raise RuntimeError(
                f"the weights of this {type(model).__name__} changed since prefixes were cached: call "
                "cache.invalidate(model) after every update or load, or use one cache for each of two models that swap "
                "their weights into one module"
            )
        return CacheOwner(id(model), watched.version, state)

    def invalidate(self, model: nn.Module | None = None) -> None:
        """Forget what the weights of `model` (None: of any model) computed: they changed, or are about to."""
        models = list(self._watched) if model is None else [id(unwrapped(model))]
        for key in models:
            if key in self._watched:
                self._watched[key].version += 1
                self._watched[key].fingerprints.clear()
                self._drop(key)

    def fetch(
        self, owner: CacheOwner, token_ids: Sequence[int], prefill: Callable[[], Layers], *, first_position: int = 0
    ) -> Layers:
        """Keys and values of a prefix: those kept, else those that `prefill` computes.

        Args:
            owner: of this pass, from `owner`.
            token_ids: of the prefix, P of them.
            prefill: computes keys and values by layer, (P, Hkv, D) each.
            first_position: of the first token; cached keys carry their rotation.

        Returns:
            By layer (key, value), detached, compact, on the device where `prefill` computes; not to be written to.

        Raises:
            ValueError: an owner from before an `invalidate`, or of another cache.
        """
        watched = self._watched.get(owner.model)
        if watched is None or watched.version != owner.version:
            raise ValueError("this owner is out of date: take a new one with cache.owner(model) for every pass")
        key = (owner, first_position, array("q", token_ids).tobytes())
        kept = self._entries.get(key)
        if kept is not None:
            self._entries.move_to_end(key)
            self._count(hits=1, tokens_saved=len(token_ids))
            return self._placed(kept)
        computed = {layer: (_compact(k), _compact(v)) for layer, (k, v) in prefill().items()}
        self._count(misses=1, tokens_computed=len(token_ids))
        self._admit(key, computed)
        return computed

    def clear(self) -> None:
        """Drop every entry; nothing else changes."""
        self._entries.clear()
        self._counts = self._counts._replace(entries=0, bytes=0)

    def _watch(self, model: nn.Module) -> _Watched:
        key = id(model)
        if key not in self._watched:
            cache = weakref.ref(self)  # the callback outlives neither the cache nor holds it

            def forget(_: weakref.ref[nn.Module]) -> None:
                if (alive := cache()) is not None:
                    alive._watched.pop(key, None)
                    alive._drop(key)

            self._watched[key] = _Watched(weakref.ref(model, forget), 0, {})
        return self._watched[key]

    def _drop(self, model: int) -> None:
        for key in [key for key in self._entries if key[0].model == model]:
            self._remove(key)

    def _remove(self, key: tuple[CacheOwner, int, bytes]) -> None:
        self._count(entries=-1, bytes=-_nbytes(self._entries.pop(key).layers))

    def _admit(self, key: tuple[CacheOwner, int, bytes], computed: dict[int, KeyValue]) -> None:
        size = _nbytes(computed)
        while self.policy == "lru" and size <= self.budget_bytes < self._counts.bytes + size:
            self._remove(next(iter(self._entries)))
            self._count(evicted=1)
        if self._counts.bytes + size > self.budget_bytes:
            self._count(rejected=1)
            return
        self._entries[key] = self._stored(computed)
        self._count(entries=1, bytes=size)

    def _count(self, **more: int) -> None:
        self._counts = self._counts._replace(**{name: getattr(self._counts, name) + n for name, n in more.items()})

    def _stored(self, layers: dict[int, KeyValue]) -> _Entry:
        devices = {layer: key.device for layer, (key, _) in layers.items()}
        if self.device is None:
            return _Entry(layers, devices)
        return _Entry({layer: (self._copied(k), self._copied(v)) for layer, (k, v) in layers.items()}, devices)

    def _copied(self, tensor: Tensor) -> Tensor:
        if not (self.offload and tensor.is_cuda):
            return tensor.to(self.device)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # Stream order is enough: the host never reads it, and the way back is on the same stream.
        return pinned.copy_(tensor, non_blocking=True)

    def _placed(self, entry: _Entry) -> dict[int, KeyValue]:
        """The layers back where they were computed."""
        placed = {}
        for layer, (key, value) in entry.layers.items():
            device = entry.devices[layer]
            placed[layer] = (key.to(device, non_blocking=True), value.to(device, non_blocking=True))
        return placed


def _compact(tensor: Tensor) -> Tensor:
    """A detached contiguous tensor that holds no more memory than its elements: a view would keep its base alive."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor


def _nbytes(layers: Layers) -> int:
    return sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
