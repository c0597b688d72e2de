"""`PrefixTree`: what it holds, that it does not change, and how sequences find their rows."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_kernels.prefix_attention import PrefixTree, ancestors, positions, tile_table

LENGTHS, PARENTS = [5, 0, 3, 2, 4], [-1, 0, 0, 1, -1]


def test_attributes():
    tree = PrefixTree(LENGTHS, PARENTS)
    assert tree.lengths == (5, 0, 3, 2, 4)
    assert tree.parents == (-1, 0, 0, 1, -1)
    assert tree.offsets == (0, 5, 5, 8, 10, 14)
    assert tree.starts == (0, 5, 5, 5, 0)
    assert tree.paths == ((0,), (0, 1), (0, 2), (0, 1, 3), (4,))
    assert tree.leaves == (2, 3, 4)
    assert (tree.tokens, len(tree)) == (14, 5)
    assert repr(tree) == "PrefixTree(5 segments, 3 sequences, 14 tokens, cpu)"


def test_tensors_are_the_planners():
    tree = PrefixTree(LENGTHS, PARENTS)
    assert tree.positions.dtype == torch.int64
    assert tree.positions.tolist() == positions(LENGTHS, PARENTS).tolist()
    assert [x.tolist() for x in tree.ancestors] == [x.tolist() for x in ancestors(LENGTHS, PARENTS)]
    assert tree.tiles(64).flatten().tolist() == tile_table(LENGTHS, PARENTS, 128).tolist()
    assert tree.tiles(256).shape[1] == 3


def test_tables_of_the_kernels():
    tree = PrefixTree(LENGTHS, PARENTS)
    assert tree.tile_table(7).flatten().tolist() == tile_table(LENGTHS, PARENTS, 7).tolist()
    assert tree.segments.tolist() == [list(x) for x in zip(tree.offsets[:-1], tree.lengths, tree.starts, strict=True)]
    offsets, below = (x.tolist() for x in tree.descendants)
    for segment in range(len(tree)):
        expected = [other for other, path in enumerate(tree.paths) if segment in path]
        assert below[offsets[segment] : offsets[segment + 1]] == expected and expected[0] == segment
    assert tree.descendants[1] is tree.descendants[1] and tree.segments is tree.segments


def test_tensors_are_built_once():
    tree = PrefixTree([300, 200], [-1, 0])
    assert tree.positions is tree.positions
    assert tree.ancestors[1] is tree.ancestors[1]
    assert tree.tiles(32) is tree.tiles(64)
    assert tree.tiles(64).shape != tree.tiles(256).shape


def test_to_gives_one_twin_per_device():
    tree = PrefixTree(LENGTHS, PARENTS)
    twin = tree.to("meta")
    assert twin is not tree
    assert twin is tree.to(torch.device("meta"))
    assert twin.to("cpu") is tree
    assert tree.to("cpu") is tree
    assert twin.positions.device.type == "meta"
    assert twin.device.type == "meta"
    assert twin.paths is tree.paths


def test_immutable_and_compared_by_identity():
    tree, equal = PrefixTree(LENGTHS, PARENTS), PrefixTree(LENGTHS, PARENTS)
    assert tree != equal
    assert len({tree, equal, tree}) == 2
    with pytest.raises(AttributeError, match="never changes: lengths cannot be set"):
        tree.lengths = (1,)
    with pytest.raises(AttributeError, match="never changes"):
        tree.anything = 1
    with pytest.raises(AttributeError, match="never changes"):
        del tree.lengths


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_copies_for_another_process(duplicate):
    tree, _ = PrefixTree.from_sequences([[1, 2], [1], [1, 2, 3]])
    other = duplicate(tree)
    assert (other.lengths, other.parents, other.leaves) == (tree.lengths, tree.parents, tree.leaves)


@pytest.mark.parametrize("lengths", [LENGTHS, tuple(LENGTHS), iter(LENGTHS), np.array(LENGTHS), torch.tensor(LENGTHS)])
def test_any_sequence_of_integers(lengths):
    tree = PrefixTree(lengths, (x for x in PARENTS))
    assert tree.lengths == tuple(LENGTHS)
    assert all(type(x) is int for x in (*tree.lengths, *tree.parents, *tree.leaves))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty(lengths):
    tree = PrefixTree(lengths, range(-1, len(lengths) - 1))
    assert tree.tokens == 0
    assert tree.positions.shape == (0,)
    assert tree.tiles(64).shape == (0, 3)
    assert tree.segments.shape == (len(tree), 3) and tree.descendants[0].shape == (len(tree) + 1,)
    assert all(tree.rows(i).dtype == torch.int64 and tree.rows(i).numel() == 0 for i in range(len(tree.leaves)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=8))
def test_sequences_are_found_again(sequences):
    tree, ids = PrefixTree.from_sequences(sequences)
    assert len(tree.leaves) == len(sequences)
    assert ids.dtype == torch.int64
    for i, sequence in enumerate(sequences):
        rows = tree.rows(i)
        assert rows.dtype == torch.int64
        assert ids[rows].tolist() == sequence
        assert tree.positions[rows].tolist() == list(range(len(sequence)))
    assert tree.tokens == len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})  # each prefix once


def test_from_tensors():
    tree, ids = PrefixTree.from_sequences([torch.tensor([7, 8, 9]), np.array([7, 8])])
    assert ids.tolist() == [7, 8, 9]
    assert tree.leaves == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [-1]), ValueError, "parents must have as many entries as lengths, 2, got 1"),
        (([1, -2], [-1, 0]), ValueError, r"lengths\[1\] must not be negative, got -2"),
        (([1, 2], [-1, 1]), ValueError, r"parents\[1\] must be -1 or an earlier segment, got 1"),
        (([1, 2], [-2, 0]), ValueError, r"parents\[0\] must be -1 or an earlier segment, got -2"),
        (([1, 2.5], [-1, 0]), TypeError, r"lengths\[1\] must be an integer, got float"),
    ],
)
def test_bad_trees(arguments, error, message):
    with pytest.raises(error, match=message):
        PrefixTree(*arguments)


def test_bad_leaves_and_head_size():
    with pytest.raises(ValueError, match=r"leaves\[1\] must be a segment, 0 to 0, got 1"):
        PrefixTree([3], [-1], leaves=[0, 1])
    with pytest.raises(TypeError):
        PrefixTree([3], [-1], leaves=[0.0])
    with pytest.raises(ValueError, match="head_size must be at most 256, got 257"):
        PrefixTree([3], [-1]).tiles(257)
