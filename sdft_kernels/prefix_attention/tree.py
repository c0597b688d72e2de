"""A prefix tree as an object: built once per batch on the host, then read by every layer."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .planner import TILES, ancestors, positions, prefix_tree, tile_table


class PrefixTree:
    """Segments with a length and a parent, packed one after the other; a token sees ancestors and, causally, its own.

    One prompt with R completions is a root with R children. A tree never changes and compares by identity: build it
    once per batch and pass the same object to every layer. What it holds as tensors is made on first use and kept, per
    device (`to`).

    Args:
        lengths: (S,) tokens of each segment, 0 allowed.
        parents: (S,) index of an earlier segment, -1 for a root.
        leaves: the segment that each sequence ends with; None is every segment without a child, in order.

    Attributes:
        lengths, parents, leaves: as given, tuples of int.
        offsets: (S + 1,) segment i lies in packed rows ``offsets[i]:offsets[i + 1]``.
        starts: (S,) position of a segment's first token in its own sequence.
        paths: for each segment its ancestors' indices, root first, and then its own.
        tokens: packed rows T, the sum of `lengths`.
        device: of the tensors.

    Raises:
        TypeError: an entry that is no integer.
        ValueError: a negative length, a parent that is not before its child, numbers of them that differ, a leaf that
            is no segment.
    """

    __slots__ = ("_tensors", "_twins", "device", "leaves", "lengths", "offsets", "parents", "paths", "starts", "tokens")

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    leaves: tuple[int, ...]
    offsets: tuple[int, ...]
    starts: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    tokens: int
    device: torch.device
    _tensors: dict[Any, Any]
    _twins: dict[torch.device, PrefixTree]

    def __init__(self, lengths: Iterable[int], parents: Iterable[int], *, leaves: Iterable[int] | None = None) -> None:
        lengths, parents = _listed(lengths), _listed(parents)
        way_offsets, way = ancestors(lengths, parents)
        sizes, above = tuple(map(int, lengths)), tuple(map(int, parents))
        offsets, starts = [0], list[int]()
        for size, parent in zip(sizes, above, strict=True):
            offsets.append(offsets[-1] + size)
            starts.append(0 if parent < 0 else starts[parent] + sizes[parent])
        device = torch.device("cpu")
        self._fill(
            lengths=sizes,
            parents=above,
            leaves=_leaves(leaves, above),
            offsets=tuple(offsets),
            starts=tuple(starts),
            paths=tuple(tuple(way[way_offsets[i] : way_offsets[i + 1]]) for i in range(len(sizes))),
            tokens=offsets[-1],
            device=device,
            _tensors={},
            _twins={device: self},
        )

    @classmethod
    def from_sequences(cls, sequences: Iterable[Iterable[int]]) -> tuple[PrefixTree, Tensor]:
        """The tree that stores every prefix that some of the sequences share once, and its packed token ids.

        Args:
            sequences: token ids of each: a list, any iterable, or a one-dimensional integer tensor or array.

        Returns:
            The tree, whose ``leaves[i]`` is where sequence i ends, and (T,) int64 ids on the CPU.
            ``ids[tree.rows(i)]`` is sequence i.

        Raises:
            TypeError: an id that is no integer; the message names its place.
        """
        plan = prefix_tree([ids.tolist() if isinstance(ids, Tensor) else ids for ids in sequences])
        return cls(plan.lengths, plan.parents, leaves=plan.leaves), _tensor(plan.tokens)

    @property
    def positions(self) -> Tensor:
        """(T,) int64: each packed token's position in its own sequence."""
        return self._kept("positions", lambda: _tensor(positions(self.lengths, self.parents)))

    @property
    def ancestors(self) -> tuple[Tensor, Tensor]:
        """`paths` in CSR form, int64: (S + 1,) offsets and the segments."""
        offsets = self._kept("offsets", lambda: _tensor(ancestors(self.lengths, self.parents)[0]))
        return offsets, self._kept("segments", lambda: _tensor(ancestors(self.lengths, self.parents)[1]))

    @property
    def descendants(self) -> tuple[Tensor, Tensor]:
        """Each segment and then all below it, in order, in CSR form, int64: (S + 1,) offsets and the segments."""
        lists: list[list[int]] = [[] for _ in self.lengths]
        if "descendants" not in self._tensors:
            for segment, path in enumerate(self.paths):
                for above in path:
                    lists[above].append(segment)
        offsets = self._kept(
            "descendant offsets", lambda: torch.tensor([0, *accumulate(map(len, lists))], dtype=torch.int64)
        )
        return offsets, self._kept("descendants", lambda: torch.tensor(list(chain(*lists)), dtype=torch.int64))

    def tiles(self, head_size: int) -> Tensor:
        """(tiles, 3) int64: segment, first token within it, tokens, of the query tiles for this head size.

        Raises:
            ValueError: no kernel has tiles for this head size.
        """
        tile = next((query_tile for largest, query_tile, _ in TILES if head_size <= largest), None)
        if tile is not None:
            return self.tile_table(tile)
        raise ValueError(f"head_size must be at most {TILES[-1][0]}, got {head_size}")

    def tile_table(self, query_tile: int) -> Tensor:
        """(tiles, 3) int64: the same for tiles of up to `query_tile` tokens."""
        return self._kept(query_tile, lambda: _tensor(tile_table(self.lengths, self.parents, query_tile)).view(-1, 3))

    @property
    def segments(self) -> Tensor:
        """(S, 3) int64: first packed row, tokens, and position of the first token of each segment."""
        rows = zip(self.offsets, self.lengths, self.starts, strict=False)  # offsets: one more
        return self._kept("segment rows", lambda: torch.tensor(list(rows), dtype=torch.int64).view(-1, 3))

    def rows(self, sequence: int) -> Tensor:
        """(tokens of the sequence,) int64: the packed rows of sequence `sequence`, from its root to its leaf."""
        path = self.paths[self.leaves[sequence]]
        spans = [
            torch.arange(self.offsets[i], self.offsets[i + 1], dtype=torch.int64, device=self.device) for i in path
        ]
        return torch.cat(spans)

    def to(self, device: torch.device | str) -> PrefixTree:
        """This tree with its tensors on `device`: the same object for the same device, every time."""
        device = torch.device(device)
        if device not in self._twins:
            twin = object.__new__(PrefixTree)
            same = {name: getattr(self, name) for name in self.__slots__ if name not in ("_tensors", "device")}
            twin._fill(**same, _tensors={}, device=device)
            self._twins[device] = twin
        return self._twins[device]

    def __len__(self) -> int:
        """The number of segments."""
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"PrefixTree({len(self)} segments, {len(self.leaves)} sequences, {self.tokens} tokens, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.lengths, self.parents, self.leaves)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a PrefixTree never changes: {name} cannot be set; build a new tree")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PrefixTree never changes: {name} cannot be deleted")

    def _fill(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _kept(self, key: object, make: Any) -> Tensor:
        if key not in self._tensors:
            self._tensors[key] = make().to(self.device)
        kept: Tensor = self._tensors[key]
        return kept


def _rebuild(lengths: Iterable[int], parents: Iterable[int], leaves: Iterable[int]) -> PrefixTree:
    return PrefixTree(lengths, parents, leaves=leaves)


def _listed(values: Iterable[int]) -> Iterable[int]:
    """Something that can be read twice."""
    if isinstance(values, Tensor):
        return values.tolist()
    return values if isinstance(values, Sequence | array) else list(values)


def _leaves(leaves: Iterable[int] | None, parents: tuple[int, ...]) -> tuple[int, ...]:
    if leaves is None:
        inner = set(parents)
        return tuple(i for i in range(len(parents)) if i not in inner)
    ends = tuple(map(operator.index, leaves))
    for i, leaf in enumerate(ends):
        if not 0 <= leaf < len(parents):
            raise ValueError(f"leaves[{i}] must be a segment, 0 to {len(parents) - 1}, got {leaf}")
    return ends


def _tensor(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if len(values) else torch.empty(0, dtype=torch.int64)
