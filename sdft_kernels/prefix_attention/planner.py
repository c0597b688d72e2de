"""Plans a batch for shared-prefix attention: which tokens are shared, where they stand, how they are cut into tiles.

A prefix tree is a list of segments, each with a length and a parent (-1: a root), parents before children. Packed, its
tokens stand one segment after the other; a token sees its segment's ancestors and, causally, its own segment.

Every result is an ``array.array("q")``: int64, equal elementwise, and a buffer, so that `torch.frombuffer` and
`numpy.asarray` take it without a copy. Arguments that hold integers may be a list, any iterable, or a one-dimensional
buffer (a numpy array; of a tensor, ``tensor.numpy()``), which is read without making Python objects.

The work is done in C++ (`csrc/include/sdft_kernels/prefix_tree.h`) where that is built, else here, with equal results.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sdft_kernels import _native

# (largest head size, query tile, key tile), as in csrc/include/sdft_kernels/tiles.h.
TILES = ((64, 128, 128), (128, 128, 64), (256, 64, 64))

_BUFFER_FORMATS = "bhilqBHI"  # at most 63 bits


class PrefixPlan(NamedTuple):
    """The prefix tree of S segments of a list of sequences.

    Attributes:
        lengths: (S,) tokens of each segment.
        parents: (S,) index of the segment before it, -1 for a root.
        leaves: one for each sequence, the segment that it ends with.
        tokens: the ids, segment after segment.
    """

    lengths: array[int]
    parents: array[int]
    leaves: array[int]
    tokens: array[int]


def prefix_tree(sequences: Iterable[Iterable[int]]) -> PrefixPlan:
    """The radix tree of the sequences: every prefix that some share is stored once.

    A segment ends where sequences part or where one of them ends. Roots come first, then their children, level by
    level; siblings stand in the order in which the input shows them. Equal sequences have the same leaf. An empty
    sequence has a root of length 0 as its leaf, which all empty ones share and nothing descends from.

    Args:
        sequences: token ids, of any length.

    Raises:
        TypeError: an id that is no integer; the message names its place.
        ValueError: an id beyond 64 bits.
    """
    host = _native.host()
    if host is not None:
        return PrefixPlan(*host.prefix_tree(sequences))
    return _prefix_tree([_integers(ids, f"sequences[{i}]") for i, ids in enumerate(sequences)])


def positions(lengths: Iterable[int], parents: Iterable[int]) -> array[int]:
    """Of each packed token, its position in its own sequence: a segment goes on counting where its parent ends.

    Args:
        lengths: (S,) at least 0.
        parents: (S,) -1, or the index of an earlier segment.

    Returns:
        (sum of lengths,) positions from 0.

    Raises:
        ValueError: another number of parents than of lengths, a negative length, a parent that is not before its child.
    """
    host = _native.host()
    if host is not None:
        result: array[int] = host.positions(lengths, parents)
        return result
    sizes, above = _tree(lengths, parents)
    ends: list[int] = []
    out = array("q")
    for length, parent in zip(sizes, above, strict=True):
        start = ends[parent] if parent >= 0 else 0
        ends.append(start + length)
        out.extend(range(start, start + length))
    return out


def ancestors(lengths: Iterable[int], parents: Iterable[int]) -> tuple[array[int], array[int]]:
    """Each segment's way from its root to itself, in CSR form. Arguments and errors as of `positions`.

    Returns:
        (S + 1,) offsets, and the segments: ``segments[offsets[i]:offsets[i + 1]]`` ends with i.
    """
    host = _native.host()
    if host is not None:
        result: tuple[array[int], array[int]] = host.ancestors(lengths, parents)
        return result
    offsets, segments = array("q", [0]), array("q")
    for segment, parent in enumerate(_tree(lengths, parents)[1]):
        if parent >= 0:
            segments.extend(segments[offsets[parent] : offsets[parent + 1]])
        segments.append(segment)
        offsets.append(len(segments))
    return offsets, segments


def tile_table(lengths: Iterable[int], parents: Iterable[int], query_tile: int) -> array[int]:
    """The tiles that one program each computes; none crosses a segment. Arguments and errors as of `positions`.

    Args:
        query_tile: tokens in a tile at most, positive.

    Returns:
        (tiles * 3,), rows of: segment, first token within the segment, tokens in the tile.
    """
    host = _native.host()
    if host is not None:
        result: array[int] = host.tile_table(lengths, parents, query_tile)
        return result
    sizes = _tree(lengths, parents)[0]
    tile = operator.index(query_tile)
    if tile < 1:
        raise ValueError(f"query_tile must be positive, got {tile}")
    out = array("q")
    for segment, length in enumerate(sizes):
        for start in range(0, length, tile):
            out.extend((segment, start, min(tile, length - start)))
    return out


def _prefix_tree(sequences: Sequence[list[int]]) -> PrefixPlan:
    plan = PrefixPlan(array("q"), array("q"), array("q", bytes(8 * len(sequences))), array("q"))
    # Entries are (parent, depth at which the segment starts, sequences through it); an entry's index is its segment.
    queue = [(-1, 0, members) for members in _by_token(sequences, range(len(sequences)), 0).values()]
    for segment, (parent, start, members) in enumerate(queue):  # grows while it is read
        first = sequences[members[0]]
        end = min(_common(first, sequences[member], start) for member in members)
        plan.lengths.append(end - start)
        plan.parents.append(parent)
        plan.tokens.extend(first[start:end])
        for token, group in _by_token(sequences, members, end).items():
            if token is None:
                for member in group:
                    plan.leaves[member] = segment
            else:
                queue.append((segment, end, group))
    return plan


def _by_token(sequences: Sequence[list[int]], members: Iterable[int], depth: int) -> dict[int | None, list[int]]:
    """Members by the token they have at `depth`, None for those that end there, in the order of their first member."""
    groups: dict[int | None, list[int]] = {}
    for member in members:
        ids = sequences[member]
        groups.setdefault(ids[depth] if len(ids) > depth else None, []).append(member)
    return groups


def _common(a: list[int], b: list[int], start: int) -> int:
    """The first index from `start` at which the two differ or one ends."""
    end = min(len(a), len(b))
    if a[start:end] == b[start:end]:
        return end
    return next(i for i in range(start, end) if a[i] != b[i])


def _tree(lengths: Iterable[int], parents: Iterable[int]) -> tuple[list[int], list[int]]:
    sizes, above = _integers(lengths, "lengths"), _integers(parents, "parents")
    if len(sizes) != len(above):
        raise ValueError(f"parents must have as many entries as lengths, {len(sizes)}, got {len(above)}")
    for i, (length, parent) in enumerate(zip(sizes, above, strict=True)):
        if length < 0:
            raise ValueError(f"lengths[{i}] must not be negative, got {length}")
        if not -1 <= parent < i:
            raise ValueError(f"parents[{i}] must be -1 or an earlier segment, got {parent}")
    return sizes, above


def _integers(values: Iterable[int], name: str) -> list[int]:
    try:
        view = memoryview(values)  # type: ignore[arg-type]
    except TypeError:
        view = None
    if view is not None and view.ndim == 1 and view.format in _BUFFER_FORMATS:
        return view.tolist()
    try:
        items = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {type(values).__name__}") from None
    return [_integer(item, name, i) for i, item in enumerate(items)]


def _integer(value: int, name: str, index: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}[{index}] must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"{name}[{index}] must fit 64 bits, got {whole}")
    return whole
