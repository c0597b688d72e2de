"""Hidden states of completions whose prompts are computed once: `enable_shared_prefix`, `packed_hidden_states`."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdft_kernels.models.attention_hook import Group, PackedRow, register, stock_implementation
from sdft_kernels.models.hidden import (
    TOKEN_BUDGET,
    backbone,
    completion_hidden_states,
    evaluation_mode,
    unwrap_peft,
)
from sdft_kernels.models.prefix_support import check_layers, check_model, check_ready
from sdft_kernels.models.rope import Key, pass_key, reset_rope
from sdft_kernels.prefix_attention import CacheOwner, Layers, PrefixCache, PrefixTree

TokenIds = Sequence[int]


@dataclass
class PassCounts:
    """What passes cost: `packed_hidden_states` adds to it.

    Attributes:
        computed: tokens that went through the model; a prefix that the cache held did not.
        separate: tokens that separate sequences would have taken.
        hits: prefixes that the cache held.
    """

    computed: int = 0
    separate: int = 0
    hits: int = 0

    def add(self, computed: int, separate: int, hits: int = 0) -> None:
        self.computed += computed
        self.separate += separate
        self.hits += hits


def enable_shared_prefix(model: nn.Module, *, verify: bool = True) -> None:
    """Let `model` attend over prefix trees. Passes without a tree stay as they were, bitwise.

    Registers an attention and a mask function with transformers, in front of the implementation the model has, and sets
    them. Calling it again is harmless. A later ``set_attn_implementation`` switches it off, which
    `packed_hidden_states` notices.

    Args:
        model: a transformers causal language model with full and sliding-window attention layers, or a PEFT model
            around one.
        verify: compare packed hidden states with separate ones on a few tokens now (`verify_shared_prefix`).

    Raises:
        ValueError: a model whose prefixes cannot be shared (linear-attention, state-space and convolution layers,
            encoder-decoders, multimodal wrappers, bidirectional attention); hidden states that differ.
        NotImplementedError: prompt-learning PEFT.
        Exception: whatever a model's own code raises in the passes of `verify`. After any error the model has the
            attention implementation that it had.
    """
    check_model(model)
    base: Any = unwrap_peft(model)
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation(register(stock_implementation(before)))
        if verify:
            verify_shared_prefix(model)
    except BaseException:
        base.set_attn_implementation(before)
        raise


def disable_shared_prefix(model: nn.Module) -> None:
    """Undo `enable_shared_prefix`."""
    base: Any = unwrap_peft(model)
    base.set_attn_implementation(stock_implementation(base.config._attn_implementation))


@torch.no_grad()
def verify_shared_prefix(model: nn.Module, rtol: float | None = None) -> None:
    """Compare packed hidden states, with and without a prefilled prefix, with separate ones on three completions.

    In eval mode, restored afterwards, and without autocast. A model with code of its own can do anything; this is the
    check that catches it.

    Args:
        model: enabled.
        rtol: allowed max |difference| over max |hidden state|; default 1e-4 in fp32 and wider, 0.05 in 16 bit.

    Raises:
        ValueError: they differ.
    """
    weight: Tensor = unwrap_peft(model).get_input_embeddings().weight
    vocabulary, allowed = weight.shape[0], rtol
    if allowed is None:
        allowed = 1e-4 if weight.dtype.itemsize >= 4 else 0.05
    ids = [i * 7919 % vocabulary for i in range(1, 13)]
    prompt, completions = ids[:5], [ids[5:8], ids[8:10], [*ids[5:7], *ids[10:]]]
    # Without autocast, whose rounding the tolerance of an fp32 model does not allow for.
    with evaluation_mode(unwrap_peft(model)), torch.autocast(weight.device.type, enabled=False):
        separate = completion_hidden_states(model, [prompt] * len(completions), completions).float()
        for cache in (None, PrefixCache(0)):
            packed = torch.cat(packed_hidden_states(model, [prompt], [completions], cache=cache)[0]).float()
            error = ((packed - separate).abs().max() / separate.abs().max().clamp(min=1e-30)).item()
            if not error <= allowed:
                raise ValueError(
                    f"{type(unwrap_peft(model)).__name__} gives other hidden states with a shared prefix than without "
                    f"(relative difference {error:.1e}, allowed {allowed:.0e}): it is not supported"
                )


def packed_hidden_states(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    *,
    cache: PrefixCache | None = None,
    token_budget: int = TOKEN_BUDGET,
    counts: PassCounts | None = None,
) -> list[list[Tensor]]:
    """Hidden states that predict each completion token, every shared prefix computed once.

    Without a cache a pass is one row over the prefix tree of its sequences, which also finds what several prompts, or
    several completions, have in common; gradients flow where they are enabled. With a cache every prompt but its last
    token is prefilled alone, whether or not it is found there, and read from there: equal bits with a warm cache, a
    cold one and one that keeps nothing. Dropout (of an adapter, say) draws once for what is shared. Where rotary
    frequencies depend on the longest sequence of a pass (longrope, dynamic), passes are cut so that every sequence has
    those that it has alone, and prompts whose own are others are not taken from the cache.

    Args:
        model: enabled by `enable_shared_prefix`; runs in whatever mode it is in.
        prompts: B token-id lists, none empty.
        completions: for each prompt a list of token-id lists; either may be empty.
        cache: for passes without gradients.
        token_budget: tokens per pass, those of equal neighbouring prompts counted once; a longer prompt with its
            completions runs alone. With a cache that keeps little, also the tokens whose keys and values are in memory.
        counts: receives what this call cost.

    Returns:
        For each prompt, for each of its completions of L tokens, (L, H) after the final norm. They agree with those of
        separate sequences to rounding, not bitwise, since the shapes of the model's matrix products differ.

    Raises:
        ValueError: lengths that do not fit, an empty prompt, a cache while gradients are enabled, a model that is not
            enabled, attention dropout in training.
        RuntimeError: weights that changed without ``cache.invalidate(model)``; a layer that the tree did not reach.
    """
    _check_input(prompts, completions)
    check_ready(model)
    if cache is not None and torch.is_grad_enabled():
        raise ValueError("cached keys and values carry no gradient: leave cache out, or run under torch.no_grad()")
    reset_rope(model)  # before the cache looks at the buffers: a longer pass's frequencies would be another state
    owner = None if cache is None else cache.owner(model)
    weight = unwrap_peft(model).get_input_embeddings().weight
    empty = weight.new_zeros((0, _hidden_size(model)))
    result = [[empty for _ in group] for group in completions]
    before = None if cache is None else cache.statistics
    for batch, part, cached in _passes(model, prompts, completions, token_budget, cache is not None):
        if cache is None or owner is None or not cached:
            row = _tree_row(batch, prompts, part)
        else:
            row = _cached_row(model, batch, prompts, part, cache, owner)
        hidden = _forward(model, row.packed, row.ids, weight.device)
        if counts is not None:
            separate = sum(len(prompts[i]) + len(completions[i][j]) - 1 for i, j in row.owners)
            counts.add(computed=len(row.ids), separate=separate)
        places = torch.cat(row.places).to(weight.device)
        pieces = hidden.index_select(0, places).split([len(p) for p in row.places])
        for (i, j), piece in zip(row.owners, pieces, strict=True):
            result[i][j] = piece
    if counts is not None and cache is not None and before is not None:
        after = cache.statistics
        counts.add(after.tokens_computed - before.tokens_computed, 0, after.hits - before.hits)
    return result


class _Row(NamedTuple):
    """A packed row, and where in it the hidden states of completions (i, j) lie."""

    packed: PackedRow
    ids: Tensor  # (T,)
    owners: list[tuple[int, int]]
    places: list[Tensor]


def _tree_row(batch: list[int], prompts: Sequence[TokenIds], completions: Sequence[Sequence[TokenIds]]) -> _Row:
    """One tree over all sequences of the batch."""
    owners = _owners(batch, completions)
    # The last completion token predicts nothing, so it is not fed.
    sequences = [[*prompts[i], *completions[i][j][:-1]] for i, j in owners]
    tree, ids = PrefixTree.from_sequences(sequences)
    places = [tree.rows(s)[len(prompts[i]) - 1 :] for s, (i, _) in enumerate(owners)]
    return _Row(PackedRow([Group(tree)]), ids, owners, places)


def _cached_row(
    model: nn.Module,
    batch: list[int],
    prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    cache: PrefixCache,
    owner: CacheOwner,
) -> _Row:
    """One group for each different prompt: its last token and its completions, over its other tokens, prefilled."""
    by_prompt: dict[bytes, list[int]] = {}
    for i in batch:
        by_prompt.setdefault(array("q", prompts[i]).tobytes(), []).append(i)
    groups, ids, owners, places, start = [], [], [], [], 0
    for members in by_prompt.values():
        *prefix, last = prompts[members[0]]
        mine = _owners(members, completions)
        sequences = [[last, *completions[i][j][:-1]] for i, j in mine]
        layers = cache.fetch(owner, prefix, functools.partial(_prefill, model, prefix)) if prefix else None
        tree, tokens = PrefixTree.from_sequences(sequences)
        groups.append(Group(tree, layers, len(prefix)))
        ids.append(tokens)
        owners += mine
        places += [tree.rows(s) + start for s in range(len(sequences))]
        start += tree.tokens
    return _Row(PackedRow(groups), torch.cat(ids), owners, places)


def _prefill(model: nn.Module, prefix: TokenIds) -> Layers:
    tree, ids = PrefixTree.from_sequences([prefix])
    row = PackedRow([Group(tree)], capture=True)
    _forward(model, row, ids, unwrap_peft(model).get_input_embeddings().weight.device)
    return row.captured


def _forward(model: nn.Module, row: PackedRow, ids: Tensor, device: torch.device) -> Tensor:
    """(T, H) after the final norm."""
    reset_rope(model)
    output: Any = backbone(model)(input_ids=ids.to(device)[None], **row.keywords(device))
    check_layers(model, row.seen)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def _owners(batch: list[int], completions: Sequence[Sequence[TokenIds]]) -> list[tuple[int, int]]:
    return [(i, j) for i in batch for j, completion in enumerate(completions[i]) if len(completion)]


def _passes(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    token_budget: int,
    cached: bool,
) -> Iterator[tuple[list[int], Sequence[Sequence[TokenIds]], bool]]:
    """Of each pass: indices of its prompts, the completions with those of other passes left empty, with a cache or not.

    All sequences of a pass have the frequencies that they have alone (`pass_key`). A prompt whose own are others than
    those of its completions is computed with them, not before.
    """

    def kind(prompt: TokenIds, completion: TokenIds) -> tuple[Key, bool]:
        key = pass_key(model, len(prompt) + len(completion) - 1)
        return key, cached and pass_key(model, len(prompt) - 1) == key

    kinds = [[kind(p, c) if len(c) else None for c in group] for p, group in zip(prompts, completions, strict=True)]
    for one in dict.fromkeys(k for group in kinds for k in group if k is not None):
        part = [
            [c if k == one else () for c, k in zip(group, of, strict=True)]
            for group, of in zip(completions, kinds, strict=True)
        ]
        for batch in _batches(prompts, part, token_budget):
            yield batch, part, one[1]


def _batches(
    prompts: Sequence[TokenIds], completions: Sequence[Sequence[TokenIds]], token_budget: int
) -> Iterator[list[int]]:
    """Indices of the prompts with a non-empty completion, in order, each batch within the budget.

    What equal prompts one after the other share counts once, as it is computed once.
    """
    batch: list[int] = []
    used = 0
    for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        lengths = [len(c) - 1 for c in group if len(c)]
        if not lengths:
            continue
        again = bool(batch) and list(prompt) == list(prompts[batch[-1]])
        tokens = sum(lengths) + (0 if again else len(prompt))
        if batch and used + tokens > token_budget:
            yield batch
            batch, used = [], 0
            tokens = sum(lengths) + len(prompt)
        batch.append(i)
        used += tokens
    if batch:
        yield batch


def _check_input(prompts: Sequence[TokenIds], completions: Sequence[Sequence[TokenIds]]) -> None:
    if len(prompts) != len(completions):
        raise ValueError(f"prompts and completions must pair up, got {len(prompts)} and {len(completions)}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty; a completion token needs a token before it to be predicted from")


def _hidden_size(model: nn.Module) -> int:
    return int(unwrap_peft(model).get_output_embeddings().weight.shape[1])
