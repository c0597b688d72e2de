"""Cuts one segment's attention into rectangles of rows x keys that one kernel call each can compute.

A window cuts a rectangle only near its edge: rows that see every key stay one unmasked part, rows that see none get no
part at all, and the rows between are cut into small blocks. So every row of every part that `segment_parts` makes sees
at least one key: PyTorch's CPU kernel reports a log-sum-exp of 0 instead of -inf for a row that sees none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .tree import PrefixTree

FULL, CAUSAL, BAND = "full", "causal", "band"

# Rows of a block that a window cuts. A block looks at window - 1 + BAND_ROWS keys, so more rows waste less per call at
# wide windows and more at narrow ones.
BAND_ROWS = 128
UNLIMITED = 1 << 62


class Part(NamedTuple):
    """Query rows against key rows.

    Row r of `rows` sees key c of `keys` if ``r + shift - window < c <= r + shift``, both counted from the part's own
    start. `kind` says what of that needs a mask: FULL none, CAUSAL the diagonal of a square (shift 0), BAND all.
    """

    rows: slice
    keys: slice
    cached: bool  # the keys are those of the cached prefix
    kind: str
    shift: int
    window: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and keys."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start


class Scoring(NamedTuple):
    """From products to logits: softcap(scale * q.k)."""

    scale: float
    softcap: float | None


class Merged(NamedTuple):
    """What the backward of a part needs of the attention over *all* parts, for the same rows."""

    grad: Tensor  # (L, Hq, D), in the query's dtype
    out: Tensor  # (L, Hq, D), in the query's dtype
    lse: Tensor  # (L, Hq), wide
    delta: Tensor  # (L, Hq), wide: rowsum(grad * out) - gradient of lse

    def rows(self, rows: slice) -> Merged:
        """Views of some rows."""
        return Merged(*(x[rows] for x in self))


def segment_parts(tree: PrefixTree, segment: int, prefix: int, window: int | None) -> Iterator[Part]:
    """The parts of one segment, root to leaf: for each row, keys in the order of their positions.

    Args:
        prefix: tokens of a cached prefix before every root; its keys are rows 0 to `prefix` of their own tensor.
        window: keys that a row sees, its own included; None is all.
    """
    if tree.lengths[segment] == 0:
        return
    width = UNLIMITED if window is None else window
    rows = slice(tree.offsets[segment], tree.offsets[segment + 1])
    start = prefix + tree.starts[segment]
    yield from _above(rows, slice(0, prefix), True, start, width)
    *above, own = tree.paths[segment]
    for ancestor in above:
        keys = slice(tree.offsets[ancestor], tree.offsets[ancestor + 1])
        yield from _above(rows, keys, False, start - prefix - tree.starts[ancestor], width)
    yield from _own(rows, width)


def _above(rows: slice, keys: slice, cached: bool, distance: int, window: int) -> Iterator[Part]:
    """`distance`: positions from the first key to the first row; no key stands after it."""
    length, count = rows.stop - rows.start, keys.stop - keys.start
    if count == 0:
        return
    all_keys = min(length, max(0, window - distance))
    any_key = min(length, max(0, window - distance + count - 1))
    if all_keys:
        yield Part(slice(rows.start, rows.start + all_keys), keys, cached, FULL, distance, window)
    for first in range(all_keys, any_key, BAND_ROWS):
        last = min(any_key, first + BAND_ROWS)
        skipped = max(0, distance + first - window + 1)
        yield Part(
            slice(rows.start + first, rows.start + last),
            slice(keys.start + skipped, keys.stop),
            cached,
            BAND,
            distance + first - skipped,
            window,
        )


def _own(rows: slice, window: int) -> Iterator[Part]:
    length = rows.stop - rows.start
    whole = min(length, window)
    first_rows = slice(rows.start, rows.start + whole)
    yield Part(first_rows, first_rows, False, CAUSAL, 0, window)
    for first in range(whole, length, BAND_ROWS):
        last = min(length, first + BAND_ROWS)
        skipped = first - window + 1
        yield Part(
            slice(rows.start + first, rows.start + last),
            slice(rows.start + skipped, rows.start + last),
            False,
            BAND,
            first - skipped,
            window,
        )


def blocks(part: Part, block_rows: int, block_keys: int) -> Iterator[Part]:
    """A part in blocks, keys in order within rows, without the keys that none of the rows sees. A row may see none."""
    length, count = part.size
    for row in range(0, length, block_rows):
        last_row = min(length, row + block_rows)
        first_key = max(0, part.shift + row - part.window + 1)
        end = min(count, part.shift + last_row)
        for key in range(first_key, end, block_keys):
            last_key = min(end, key + block_keys)
            shift = part.shift + row - key
            # The first row sees the newest key, and the last row the oldest.
            newest = shift >= last_key - key - 1
            oldest = shift + last_row - row - 1 < part.window
            yield Part(
                slice(part.rows.start + row, part.rows.start + last_row),
                slice(part.keys.start + key, part.keys.start + last_key),
                part.cached,
                FULL if newest and oldest else BAND,
                shift,
                part.window,
            )
