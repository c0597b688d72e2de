"""Rotary frequencies that depend on the longest sequence of a pass: every sequence gets those that it has alone."""

import copy

import pytest
import torch
from prefix_models import VOCABULARY, tiny

transformers = pytest.importorskip("transformers")

from sdft_kernels.distill import DistillBatch, SelfDistiller  # noqa: E402
from sdft_kernels.distill.rollouts import generate_completions  # noqa: E402
from sdft_kernels.models import (  # noqa: E402
    completion_hidden_states,
    context_length,
    enable_shared_prefix,
    hidden_states,
    packed_hidden_states,
)
from sdft_kernels.models.rope import pass_key  # noqa: E402
from sdft_kernels.prefix_attention import PrefixCache  # noqa: E402

LIMIT = 12
KINDS = ("longrope", "dynamic", "dynamic by layer type")


def rope_model(kind):
    rope = dict(rope_type=kind.split()[0], rope_theta=10000.0, factor=4.0)
    if kind == "longrope":
        rope |= dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=LIMIT)
        return tiny(
            "phi3", 64, max_position_embeddings=48, original_max_position_embeddings=LIMIT, rope_parameters=rope
        )
    if kind == "dynamic":
        return tiny("llama", max_position_embeddings=LIMIT, rope_parameters=rope)
    plain = dict(rope_type="default", rope_theta=10000.0)
    return tiny(
        "gemma3", 8, max_position_embeddings=LIMIT, rope_parameters=dict(full_attention=rope, sliding_attention=plain)
    )


def draw(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


# Prompts and completions that stay below the limit, reach it exactly, cross it, and are beyond it.
PROMPTS = draw([4, 9, 12, 16, 16])
COMPLETIONS = [draw(lengths, i) for i, lengths in enumerate([[2, 3, 9, 9], [4, 5], [1, 2, 5], [4, 4, 0], [3]])]
FLAT = [(p, c) for p, group in zip(PROMPTS, COMPLETIONS, strict=True) for c in group]


def alone(model):
    """Hidden states of every completion from a model that has seen nothing else."""
    with torch.no_grad():
        pieces = [
            hidden_states(copy.deepcopy(model), torch.tensor([[*p, *c[:-1]]]))[0, len(p) - 1 :] for p, c in FLAT if c
        ]
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches(kind):
    model = rope_model(kind)
    wanted = alone(model)
    prompts, completions = ([pair[k] for pair in FLAT] for k in (0, 1))
    for _ in range(2):  # after long passes, too
        got = completion_hidden_states(model, prompts, completions, token_budget=10**6)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    # Control: what one padded batch gives the shortest sequence.
    rows = [[*p, *c[:-1]] for p, c in (FLAT[0], FLAT[-1])]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mixed = hidden_states(model, ids)[0, 3 : len(rows[0])]
    assert (mixed - wanted[: len(mixed)]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_with_and_without_a_cache(kind):
    model = rope_model(kind)
    wanted = alone(model)
    enable_shared_prefix(model)
    cache = PrefixCache(10**7)
    for kept in (None, cache, cache, PrefixCache(0)):
        with torch.no_grad():
            groups = packed_hidden_states(model, PROMPTS, COMPLETIONS, cache=kept)
        got = torch.cat([piece for group in groups for piece in group])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert [[len(h) for h in group] for group in groups] == [[len(c) for c in group] for group in COMPLETIONS]
    assert cache.statistics.hits == cache.statistics.misses > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_every_pass(kind):
    model = rope_model(kind)
    enable_shared_prefix(model)
    prompts, completions = ([pair[k] for pair in FLAT] for k in (0, 1))
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(sum(map(len, completions)), 32, generator=generator)
    results = []
    for compute in (
        lambda: completion_hidden_states(model, prompts, completions),
        lambda: torch.cat([h for group in packed_hidden_states(model, PROMPTS, COMPLETIONS) for h in group]),
    ):
        model.zero_grad()
        (compute() * weights).sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in results[0].items():
        assert (results[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 4])
def test_a_long_pass_before_a_short_one(kind, length):
    """transformers keeps dynamic frequencies of the longest pass so far for every later one that reaches the limit."""
    model = rope_model(kind)
    ids, long = torch.tensor(draw([length])), torch.tensor(draw([30]))
    with torch.no_grad():
        wanted = hidden_states(copy.deepcopy(model), ids)
        hidden_states(model, long)
        torch.testing.assert_close(hidden_states(model, ids), wanted, rtol=0, atol=1e-5)
        if kind == "dynamic" and length >= LIMIT:  # control: the model's own forward
            model.model(input_ids=long)
            assert (model.model(input_ids=ids).last_hidden_state - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("share", [None, False, True])
def test_a_distiller_runs_with_the_numbers_of_each_sequence_alone(kind, share):
    model = rope_model(kind)
    batch = DistillBatch(PROMPTS, [draw([5])[0] + p for p in PROMPTS], COMPLETIONS)
    flat = batch.flatten()
    wanted = {}
    for side, prompts in (("student_logprob", flat.student_prompts), ("teacher_logprob", flat.teacher_prompts)):
        pieces = []
        for prompt, completion in zip(prompts, flat.completions, strict=True):
            with torch.no_grad():
                logits = copy.deepcopy(model)(input_ids=torch.tensor([[*prompt, *completion[:-1]]])).logits[0]
            own = logits[len(prompt) - 1 :].log_softmax(-1)[: len(completion)]
            pieces.append(own.gather(1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0])
        wanted[side] = torch.cat(pieces)
    distiller = SelfDistiller(model, "frozen", skip_first_tokens=0, share_prefix=share)
    for _ in range(2):
        out = distiller(batch)
        out.loss.backward()
        for side, logprob in wanted.items():
            torch.testing.assert_close(getattr(out.tokens, side), logprob, rtol=0, atol=1e-4)
    assert distiller.passes.shares == (share is not False)
    assert (out.metrics["tokens_saved"] > 0) == (share is not False)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_are_those_of_each_prompt_alone(kind, share):
    """Greedy, of prompts that stay below the limit, that cross it and that are beyond it."""
    model = rope_model(kind)
    prompts = draw([3, 4, 7, 9, 11, 11, 12, 13, 16, 20])
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = copy.deepcopy(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True
        )
        wanted.append(out[0, len(prompt) :].tolist())
    enable_shared_prefix(model)
    hidden_states(model, torch.tensor(draw([40])))
    got = generate_completions(
        model, prompts, 2, max_completion_length=6, generation_kwargs={"top_k": 1}, share_prefill=share
    )
    assert got == [[w, w] for w in wanted]


def test_other_ropes_have_no_such_limit():
    assert pass_key(tiny("llama"), 1) == pass_key(tiny("llama"), 10**6)
    model = rope_model("longrope")
    assert pass_key(model, 1) == pass_key(model, LIMIT) != pass_key(model, LIMIT + 1) == pass_key(model, 10**6)


def test_dynamic_scaling_allows_longer_sequences():
    assert context_length(rope_model("dynamic")) == 4 * LIMIT
    assert context_length(rope_model("dynamic by layer type")) == LIMIT  # its other layers are not scaled
    assert context_length(rope_model("longrope")) == 48


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_pass_leaves_a_cached_prompt_found(kind):
    """The frequencies that it leaves in the model's buffers are no other state of the model."""
    model = rope_model(kind)
    enable_shared_prefix(model)
    cache = PrefixCache(2**20)
    short, long = ([draw([6], 8)[0]], [[draw([3], 9)[0]]]), ([draw([20], 7)[0]], [[draw([4], 6)[0]]])
    hits = []
    with torch.no_grad():
        for prompts, completions in (short, short, long, short, long, short):
            before = cache.statistics.hits
            packed_hidden_states(model, prompts, completions, cache=cache)
            hits.append(cache.statistics.hits - before)
    # Beyond the limit a dynamic prompt has other frequencies than its completions, and is never taken from the cache.
    assert hits == [0, 1, 0, 1, int(kind == "longrope"), 1]
