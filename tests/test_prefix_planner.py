"""The prefix tree's planner: what a plan means, and that C++ and Python make the same one."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdft_kernels import _native
from sdft_kernels.prefix_attention import TILES, PrefixPlan, ancestors, planner, positions, prefix_tree, tile_table

ROOT = Path(__file__).resolve().parent.parent
compiled = pytest.mark.skipif(_native.host() is None, reason="_host is not built")
INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(params=[pytest.param("compiled", marks=compiled), "python"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(_native, "host", lambda: None)


either = pytest.mark.usefixtures("_either")


def in_python(call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "host", lambda: None)
        return outcome(call)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error it raises."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        return type(error), str(error)


@st.composite
def related_sequences(draw: st.DrawFn) -> list[list[int]]:
    """Sequences that share prefixes more often than chance would have it, over few tokens."""
    token = draw(st.sampled_from([st.integers(0, 1), st.integers(0, 3), INT64]))
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(0, 12))):
        stem = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        kept = draw(st.integers(0, len(stem)))
        sequences.append(stem[:kept] + draw(st.lists(token, max_size=6)))
    return sequences


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and parents; one in four is not valid somewhere."""
    count = draw(st.integers(0, 12))
    lengths = [draw(st.integers(0, 9)) for _ in range(count)]
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    if count and draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, count - 1))
        draw(st.sampled_from([lengths, parents]))[place] = draw(st.integers(-5, 15))
    return lengths, parents[: draw(st.sampled_from([count, count, count, max(0, count - 1)]))]


def segments_of(plan: PrefixPlan) -> list[list[int]]:
    ends = np.cumsum([0, *plan.lengths]).tolist()
    return [plan.tokens[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]


def way_to(parents: array, segment: int) -> Iterator[int]:
    if parents[segment] >= 0:
        yield from way_to(parents, parents[segment])
    yield segment


def check_plan(sequences: list[list[int]], plan: PrefixPlan) -> None:
    """Everything the docstring promises; together it leaves no freedom."""
    segments = segments_of(plan)
    assert len(plan.tokens) == sum(plan.lengths)
    for sequence, leaf in zip(sequences, plan.leaves, strict=True):
        assert [token for segment in way_to(plan.parents, leaf) for token in segments[segment]] == sequence
    for segment, parent in enumerate(plan.parents):
        assert -1 <= parent < segment
    children: dict[int, list[int]] = {}
    for segment, parent in enumerate(plan.parents):
        children.setdefault(parent, []).append(segment)
    first_use = {}
    for i, leaf in reversed(list(enumerate(plan.leaves))):
        first_use |= dict.fromkeys(way_to(plan.parents, leaf), i)
    assert len(first_use) == len(segments), "a segment that no sequence uses"
    for parent, siblings in children.items():
        heads = [segments[s][0] for s in siblings if segments[s]]
        assert len(set(heads)) == len(heads), "a shared token is stored twice"
        assert [first_use[s] for s in siblings] == sorted(first_use[s] for s in siblings), "not in the input's order"
        if parent >= 0:
            assert len(siblings) > 1 or parent in plan.leaves, "a segment is cut where nothing parts or ends"
    empty = [s for s, tokens in enumerate(segments) if not tokens]
    assert len(empty) == ([] in sequences) and all(plan.parents[s] == -1 and s not in children for s in empty)
    depth = [len(list(way_to(plan.parents, s))) for s in range(len(segments))]
    assert depth == sorted(depth), "not level by level"
    assert list(plan.parents) == sorted(plan.parents), "cousins not in their parents' order"


@either
@given(sequences=related_sequences())
@settings(max_examples=150, deadline=None)
def test_plan_keeps_what_is_promised(sequences: list[list[int]]) -> None:
    check_plan(sequences, prefix_tree(sequences))


@pytest.mark.parametrize(
    "plan",
    [
        dict(lengths=[2, 2], parents=[-1, -1], leaves=[0, 1], tokens=[5, 6, 5, 7]),  # nothing merged
        dict(lengths=[1, 1, 1], parents=[-1, 0, 0], leaves=[2, 1], tokens=[5, 7, 6]),  # order of siblings
        dict(lengths=[1, 0, 1, 1], parents=[-1, 0, 0, 0], leaves=[2, 3], tokens=[5, 6, 7]),  # an empty child
    ],
)
def test_a_wrong_plan_is_seen(plan: dict[str, list[int]]) -> None:
    sequences = [[5, 6], [5, 7]]
    right = PrefixPlan(*(array("q", v) for v in ([1, 1, 1], [-1, 0, 0], [1, 2], [5, 6, 7])))
    check_plan(sequences, right)
    with pytest.raises(AssertionError):
        check_plan(sequences, PrefixPlan(**{name: array("q", values) for name, values in plan.items()}))


@compiled
@given(sequences=related_sequences())
@example(sequences=[[], [2**63]])
@example(sequences=[[1], [-(2**63) - 1]])
@example(sequences=[[1], "ab"])
@example(sequences=[[1], [0, 1.5]])
@example(sequences=[[1], None])
@example(sequences=[np.arange(6).reshape(2, 3)])
@example(sequences=[np.ones(2)])
@example(sequences=[np.array(3)])
@example(sequences=[np.array([True, False])])
@settings(max_examples=300, deadline=None)
def test_both_make_the_same_tree(sequences: list[Any]) -> None:
    assert outcome(lambda: prefix_tree(sequences)) == in_python(lambda: prefix_tree(sequences))


@compiled
@given(tree=trees(), tile=st.integers(-1, 12))
@settings(max_examples=300, deadline=None)
def test_both_read_a_tree_the_same_way(tree: tuple[list[int], list[int]], tile: int) -> None:
    for call in (
        lambda: positions(*tree),
        lambda: ancestors(*tree),
        lambda: tile_table(*tree, tile),
    ):
        assert outcome(call) == in_python(call)


@compiled
def test_tiles_are_those_of_the_header() -> None:
    host = _native.host()
    assert host is not None and host.TILES == TILES
    assert [head for head, _, _ in TILES] == sorted(head for head, _, _ in TILES)


@either
def test_a_question_with_completions() -> None:
    """One prompt with three completions, two of which start alike; a second prompt; one prompt that is a prefix."""
    plan = prefix_tree([[1, 2, 3, 10, 11], [1, 2, 3, 10, 12], [1, 2, 3, 20], [4, 5], [1, 2, 3]])
    assert list(plan.lengths) == [3, 2, 1, 1, 1, 1]
    assert list(plan.parents) == [-1, -1, 0, 0, 2, 2]
    assert list(plan.leaves) == [4, 5, 3, 1, 0]
    assert list(plan.tokens) == [1, 2, 3, 4, 5, 10, 20, 11, 12]
    assert list(positions(plan.lengths, plan.parents)) == [0, 1, 2, 0, 1, 3, 3, 4, 4]
    offsets, segments = ancestors(plan.lengths, plan.parents)
    assert list(offsets) == [0, 1, 2, 4, 6, 9, 12]
    assert list(segments) == [0, 1, 0, 2, 0, 3, 0, 2, 4, 0, 2, 5]
    assert list(tile_table(plan.lengths, plan.parents, 2)) == [
        *(0, 0, 2), *(0, 2, 1), *(1, 0, 2), *(2, 0, 1), *(3, 0, 1), *(4, 0, 1), *(5, 0, 1),
    ]  # fmt: skip


@either
@given(tree=trees(), tile=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_token_once_within_a_segment(tree: tuple[list[int], list[int]], tile: int) -> None:
    lengths, parents = tree
    if isinstance(outcome(lambda: positions(lengths, parents)), tuple):
        return  # not a tree: the property tests above compare the errors
    rows = np.asarray(tile_table(lengths, parents, tile)).reshape(-1, 3)
    covered = [(s, start + i) for s, start, count in rows.tolist() for i in range(count)]
    assert covered == [(s, i) for s, length in enumerate(lengths) for i in range(length)]
    assert all(0 < count <= tile for count in rows[:, 2])


@either
def test_every_kind_of_sequence_is_read() -> None:
    expected = prefix_tree([[1, 2, 3], [1, 2, 250]])
    for kind in (
        tuple,
        lambda ids: (i for i in ids),
        lambda ids: array("q", ids),
        lambda ids: array("I", ids),
        bytes,
        lambda ids: torch.tensor(ids).numpy(),
        lambda ids: torch.tensor(ids, dtype=torch.int32).numpy(),
        lambda ids: np.array([[i, -1] for i in ids])[:, 0],  # strided
        lambda ids: np.array(ids[::-1], dtype=np.int16)[::-1],
        lambda ids: np.array(ids, dtype=np.uint64),
        lambda ids: [np.int64(i) for i in ids],
        torch.tensor,
    ):
        assert prefix_tree([kind([1, 2, 3]), kind([1, 2, 250])]) == expected
    assert prefix_tree(np.array([[1, 2, 3], [1, 2, 250]])) == expected
    assert torch.frombuffer(expected.tokens, dtype=torch.int64).tolist() == [1, 2, 3, 250]


@either
def test_empty_input() -> None:
    nothing = array("q")
    assert prefix_tree([]) == PrefixPlan(nothing, nothing, nothing, nothing)
    assert prefix_tree([[], [7], []]) == PrefixPlan(
        array("q", [0, 1]), array("q", [-1, -1]), array("q", [0, 1, 0]), array("q", [7])
    )
    assert positions([], []) == nothing and tile_table([0, 0], [-1, 0], 64) == nothing
    assert ancestors([], []) == (array("q", [0]), nothing)


@either
@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([3, -2], [-1, 0], "lengths[1] must not be negative, got -2"),
        ([3, 2], [-1, 1], "parents[1] must be -1 or an earlier segment, got 1"),
        ([3, 2], [1, -1], "parents[0] must be -1 or an earlier segment, got 1"),
        ([3, 2], [-1, -2], "parents[1] must be -1 or an earlier segment, got -2"),
        ([3, 2], [-1, 2**62], f"parents[1] must be -1 or an earlier segment, got {2**62}"),
        ([3, 2], [-1], "parents must have as many entries as lengths, 2, got 1"),
    ],
)
def test_what_is_no_tree_is_refused(lengths: list[int], parents: list[int], message: str) -> None:
    for call in (positions, ancestors, lambda *tree: tile_table(*tree, 64)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(lengths, parents)


@either
def test_other_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="query_tile must be positive, got 0"):
        tile_table([3], [-1], 0)
    with pytest.raises(TypeError, match=r"sequences\[1\]\[2\] must be an integer, got float"):
        prefix_tree([[1], [1, 2, 3.0]])
    with pytest.raises(TypeError, match=r"sequences\[1\] must be a sequence of integers, got int"):
        prefix_tree([[1], 2])
    with pytest.raises(ValueError, match=r"sequences\[0\]\[1\] must fit 64 bits, got 9223372036854775808"):
        prefix_tree([[1, 2**63]])
    with pytest.raises(ZeroDivisionError):
        prefix_tree([(1 // i for i in (1, 0))])


@compiled
@pytest.mark.parametrize("kind", ["lists", "arrays"])
def test_a_thousand_long_sequences_are_planned_by_the_compiled_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 sequences of 2,000 tokens: lists and arrays go to the compiled planner, which takes milliseconds."""
    rng = random.Random(0)
    stems = [[rng.randrange(50_000) for _ in range(1500)] for _ in range(125)]
    sequences: list[Any] = [stem + [rng.randrange(50_000) for _ in range(500)] for stem in stems for _ in range(8)]
    if kind == "arrays":
        sequences = [np.array(sequence) for sequence in sequences]
    monkeypatch.setattr(planner, "_by_token", lambda *_: pytest.fail("planned token by token in Python"))
    plan = prefix_tree(sequences)
    assert len(plan.lengths) == 125 * 9 and len(plan.tokens) == 125 * 1500 + 1000 * 500


def test_python_is_used_where_host_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert _native.host.__wrapped__() is None
    monkeypatch.setattr(_native, "host", lambda: None)
    called = []
    monkeypatch.setattr(planner, "_by_token", lambda *a: called.append(a) or {})
    prefix_tree([[1]])
    assert called
