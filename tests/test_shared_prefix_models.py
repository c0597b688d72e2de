"""Shared prefixes in transformers models: packed = one sequence at a time, in logits, hidden states and gradients."""

import copy

import pytest
import torch
from prefix_models import BATCHES, FAMILIES, WINDOWED, batch, sequences, tiny

transformers = pytest.importorskip("transformers")

from sdft_kernels import _dispatch  # noqa: E402
from sdft_kernels.models import (  # noqa: E402
    completion_hidden_states,
    disable_shared_prefix,
    enable_shared_prefix,
    packed_hidden_states,
    shared_prefix_kwargs,
    verify_shared_prefix,
)
from sdft_kernels.models.attention_hook import NAME, stock_implementation  # noqa: E402
from sdft_kernels.prefix_attention import PrefixCache, PrefixTree  # noqa: E402


def flat(prompts, completions):
    """The arguments of `completion_hidden_states` for the same completions."""
    pairs = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    return [p for p, _ in pairs], [c for _, c in pairs]


def packed(model, prompts, completions, **options):
    return torch.cat([h for group in packed_hidden_states(model, prompts, completions, **options) for h in group])


def gradients(model, hidden):
    generator = torch.Generator().manual_seed(5)
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(got, wanted, rtol=1e-4):
    assert got.keys() == wanted.keys() and got
    for name, gradient in wanted.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error <= rtol, (name, error.item())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_packed_row(family):
    """Every token's logits, prompts included, against each sequence alone through the stock attention."""
    model = tiny(family)
    enable_shared_prefix(model)
    for kind in BATCHES:
        rows = [s for s in sequences(*batch(kind)) if s]
        tree, ids = PrefixTree.from_sequences(rows)
        with torch.no_grad():
            logits = model(input_ids=ids[None], **shared_prefix_kwargs(tree)).logits[0]
            for i, row in enumerate(rows):
                alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
                assert alone.abs().max() > 0.1
                torch.testing.assert_close(logits[tree.rows(i)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("window", [1, 2, 6, 8, 12])
def test_windows(family, window):
    """Shorter than prefix and suffix, between the two, and across both; prefilled prefixes keep window - 1 keys."""
    model = tiny(family, window)
    enable_shared_prefix(model)
    prompts, completions = batch("eight")
    with torch.no_grad():
        wanted = completion_hidden_states(model, *flat(prompts, completions))
        wide = completion_hidden_states(tiny(family, 64), *flat(prompts, completions))
        for cache in (None, PrefixCache(10**7)):
            got = packed(model, prompts, completions, cache=cache)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (wide - wanted).abs().max() > 1e-2  # control: the window matters
    (entry,) = cache._entries.values()
    assert entry.layers[0][0].shape[0] == min(window - 1, len(prompts[0]) - 1)
    held = [tensor for pair in entry.layers.values() for tensor in pair]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == cache.statistics.bytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_hidden_states_and_gradients(family, kind):
    model = tiny(family)
    enable_shared_prefix(model, verify=False)
    prompts, completions = batch(kind)
    got = packed(model, prompts, completions)
    wanted = completion_hidden_states(model, *flat(prompts, completions))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, got), gradients(model, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_bitwise(family):
    """A warm cache, a cold one and one that keeps nothing give the same bits, within rounding of separate sequences."""
    model = tiny(family)
    enable_shared_prefix(model, verify=False)
    for kind in BATCHES:
        prompts, completions = batch(kind)
        cache = PrefixCache(10**7)
        with torch.no_grad():
            cold, warm, none = (packed(model, prompts, completions, cache=c) for c in (cache, cache, PrefixCache(0)))
            wanted = completion_hidden_states(model, *flat(prompts, completions))
        assert torch.equal(cold, warm) and torch.equal(cold, none)
        torch.testing.assert_close(cold, wanted, rtol=0, atol=1e-5)
        held = len({tuple(p[:-1]) for p in prompts if len(p) > 1})
        assert (cache.statistics.hits, cache.statistics.misses) == (held, held)
        # A prompt alone or among others: the prefix has the same bits, so its keys are found.
        with torch.no_grad():
            for prompt, group in zip(prompts, completions, strict=True):
                packed(model, [prompt], [group], cache=cache)
        assert cache.statistics.misses == held


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_gradient_checkpointing(family, use_reentrant):
    model = tiny(family).train()
    enable_shared_prefix(model)
    prompts, completions = batch("deep")
    wanted = gradients(model, packed(model, prompts, completions))
    passes = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = gradients(model, packed(model, prompts, completions))
    assert len(passes) == 2  # control: it was recomputed
    assert_gradients_close(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_tree_the_stock_path_runs_bitwise(family):
    model = tiny(family)
    stock = model.config._attn_implementation
    ids = torch.randint(1, 61, (3, 11))
    left = torch.ones_like(ids)
    left[0, :4] = 0
    right = left.flip(1)
    calls = [
        lambda: model(input_ids=ids).logits,
        lambda: model(input_ids=ids, attention_mask=left).logits,
        lambda: model(input_ids=ids, attention_mask=right).logits,
        # Position ids that start again: transformers finds a packed row and builds the mask for it.
        lambda: model(input_ids=ids, position_ids=torch.arange(11)[None] % 6, use_cache=False).logits,
        lambda: model.generate(ids, attention_mask=left, max_new_tokens=5, do_sample=False, pad_token_id=0),
    ]
    with torch.no_grad():
        before = [call() for call in calls]
        enable_shared_prefix(model)
        assert model.config._attn_implementation.startswith(NAME)
        assert stock_implementation(model.config._attn_implementation) == stock
        for wanted, call in zip(before, calls, strict=True):
            assert torch.equal(call(), wanted)
        disable_shared_prefix(model)
    assert model.config._attn_implementation == stock
    assert not torch.equal(before[0], before[1])  # control: the mask matters


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_stock_implementations(implementation):
    model = tiny("qwen3")
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 61, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        enable_shared_prefix(model)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_other_implementations_see_their_own_name():
    """Flash attention reads the implementation's name from the module; here a stand-in does."""
    names = []

    def stand_in(module, query, *args, **kwargs):
        names.append((module.config._attn_implementation, module.layer_idx, module.training))
        return transformers.AttentionInterface()["sdpa"](module, query, *args, **kwargs)

    transformers.AttentionInterface.register("flash_stand_in", stand_in)
    model = tiny("llama")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        model.config._attn_implementation_internal = "flash_stand_in"
        enable_shared_prefix(model)
        assert "flash" not in model.config._attn_implementation
        names.clear()
        assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, wanted)
    assert names == [("flash_stand_in", 0, False), ("flash_stand_in", 1, False)]


def test_stock_attention_is_wrong_on_the_same_row():
    """Why the tree is needed: stock attention lets completions see each other, without an error."""
    model = tiny("llama")
    rows = sequences(*batch("two"))
    tree, ids = PrefixTree.from_sequences(rows)
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=tree.positions[None], use_cache=False).logits[0]
        alone = model(input_ids=torch.tensor([rows[1]])).logits[0]
    assert (logits[tree.rows(1)] - alone).abs().max() > 0.1


def test_each_prompt_is_computed_once():
    model = tiny("llama")
    enable_shared_prefix(model, verify=False)
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, _: tokens.append(inputs[0].numel()))
    prompts, completions = batch("eight")
    own = sum(len(c) - 1 for c in completions[0] if c)
    cache = PrefixCache(10**7)
    packed(model, prompts, completions)
    with torch.no_grad():
        packed(model, prompts, completions, cache=cache)
        packed(model, prompts, completions, cache=cache)
    # Completions may open alike, which saves more; these do not, but for the empty and one-token ones.
    assert tokens == [9 + own, 8, 1 + own, 1 + own]
    tokens.clear()
    completion_hidden_states(model, *flat(prompts, completions))
    assert sum(tokens) > 3 * (9 + own)  # control


@pytest.mark.unpoisoned
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled(family, monkeypatch):
    """With a tree and without one, in one graph.

    Traced, the attention is the composition, to the same bits as untraced; gemma2's heads of 16 take the compiled
    kernels else.
    """
    model = tiny(family)
    enable_shared_prefix(model)
    tree, ids = PrefixTree.from_sequences(sequences(*batch("two")))
    calls = [dict(input_ids=ids[None], **shared_prefix_kwargs(tree)), dict(input_ids=ids.view(3, 7), use_cache=False)]
    with torch.no_grad():
        for call in calls:
            torch.compiler.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)(**call).logits
            torch.testing.assert_close(compiled, model(**call).logits, rtol=0, atol=1e-5)
            with monkeypatch.context() as patch:
                patch.setattr(_dispatch, "_WHY_NOT_NATIVE", "left out")
                assert torch.equal(compiled, model(**call).logits)


@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
def test_token_budget_changes_nothing(token_budget):
    model = tiny("qwen2")
    enable_shared_prefix(model, verify=False)
    for kind in ("prompts", "deep"):
        prompts, completions = batch(kind)
        wanted = completion_hidden_states(model, *flat(prompts, completions))
        got = packed(model, prompts, completions, token_budget=token_budget)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_one_prompt_per_completion():
    """As a flat batch has them: the same prompt again and again is still computed once, with a cache fetched once."""
    model = tiny("llama")
    enable_shared_prefix(model, verify=False)
    prompts, completions = flat(*batch("eight"))
    cache = PrefixCache(0)
    with torch.no_grad():
        wanted = completion_hidden_states(model, prompts, completions)
        for options in (dict(), dict(cache=cache)):
            got = packed(model, prompts, [[c] for c in completions], **options)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert cache.statistics.misses == 1


def test_the_budget_counts_equal_prompts_once():
    model = tiny("llama")
    enable_shared_prefix(model, verify=False)
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, _: tokens.append(inputs[0].numel()))
    prompts, completions = flat(*batch("eight"))
    packed(model, prompts, [[c] for c in completions], token_budget=30)
    own = sum(len(c) - 1 for c in completions if c)
    assert own + 9 > 25 and tokens == [own + 9]
    tokens.clear()
    packed(model, prompts, [[c] for c in completions], token_budget=20)
    assert len(tokens) == 2 and max(tokens) <= 20 and sum(tokens) == own + 18


def test_edges():
    model = tiny("llama")
    enable_shared_prefix(model)
    assert packed_hidden_states(model, [], []) == []
    assert [h.shape for h in packed_hidden_states(model, [[1]], [[[], []]])[0]] == [(0, 32), (0, 32)]
    assert packed_hidden_states(model, [[1], [2]], [[], []]) == [[], []]
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        packed_hidden_states(model, [[1], []], [[[2]], [[3]]])
    with pytest.raises(ValueError, match="pair up"):
        packed_hidden_states(model, [[1]], [])


def test_a_deep_copy_stays_enabled():
    model = tiny("gemma2")
    enable_shared_prefix(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(packed(twin, *batch("two")), packed(model, *batch("two")))
    assert "sdft" not in str(model.config.to_dict())
    enable_shared_prefix(model)  # again is harmless
    assert stock_implementation(model.config._attn_implementation) == "eager"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bfloat16_and_autocast(family):
    prompts, completions = batch("two")
    full = tiny(family)
    exact = completion_hidden_states(full, *flat(prompts, completions)).detach()
    model = tiny(family).bfloat16()
    enable_shared_prefix(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enable_shared_prefix(full)
    bounds = []
    for autocast, net in ((False, model), (True, full)):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            cache = PrefixCache(10**7)
            got = packed(net, prompts, completions)
            cached = packed(net, prompts, completions, cache=cache)
            separate = completion_hidden_states(net, *flat(prompts, completions))
            assert torch.equal(cached, packed(net, prompts, completions, cache=cache))
        (entry,) = cache._entries.values()
        assert {t.dtype for pair in entry.layers.values() for t in pair} == {torch.bfloat16}
        for value in (got, cached):
            bounds.append(((value - exact).norm() / (separate - exact).norm()).item())
    assert max(bounds) < 2, bounds


def test_lora_and_its_base():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny("qwen2"), config).eval()
    enable_shared_prefix(model)
    prompts, completions = batch("prompts")
    got = packed(model, prompts, completions)
    wanted = completion_hidden_states(model, *flat(prompts, completions))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, got), gradients(model, wanted))
    cache = PrefixCache(10**7)
    with torch.no_grad(), model.disable_adapter():
        base = packed(model, prompts, completions, cache=cache)
        torch.testing.assert_close(
            base, completion_hidden_states(model, *flat(prompts, completions)), rtol=0, atol=1e-5
        )
        assert (base - wanted).abs().max() > 1e-2  # control
    with torch.no_grad():
        adapted = packed(model, prompts, completions, cache=cache)
        torch.testing.assert_close(adapted, wanted.detach(), rtol=0, atol=1e-5)
    assert cache.statistics.hits == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_lora_with_gradient_checkpointing(use_reentrant):
    """Frozen embeddings: reentrant checkpointing needs inputs that require grad, as in any training with PEFT."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny("qwen3"), config).train()
    enable_shared_prefix(model)
    prompts, completions = batch("deep")
    wanted = gradients(model, packed(model, prompts, completions))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_gradients_close(gradients(model, packed(model, prompts, completions)), wanted, rtol=1e-6)


def test_teacher_with_a_cache():
    """An EMA teacher in the student's module: its own keys, unannounced updates raise, announced ones recompute."""
    from sdft_kernels.distill.teacher import make_teacher

    model, cache = tiny("llama"), PrefixCache(10**7)
    enable_shared_prefix(model)
    teacher = make_teacher(model, "ema", ema_rate=0.5)
    prompts, completions = batch("two")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with teacher.active() as net:
        first = packed(net, prompts, completions, cache=cache)
        assert torch.equal(packed(net, prompts, completions, cache=cache), first)
    teacher.update()
    with teacher.active() as net, pytest.raises(RuntimeError, match="invalidate"):
        packed(net, prompts, completions, cache=cache)
    cache.invalidate(model)
    with teacher.active() as net:
        second = packed(net, prompts, completions, cache=cache)
        wanted = completion_hidden_states(net, *flat(prompts, completions))
    torch.testing.assert_close(second, wanted, rtol=0, atol=1e-5)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("mistral", lambda kw: kw | dict(window=kw["window"] + 1)),
        ("mistral", lambda kw: kw | dict(window=None)),
        ("llama", lambda kw: kw | dict(prefix_kv=None)),
        ("llama", lambda kw: kw | dict(scale=kw["scale"] * 1.01)),
        ("gemma2", lambda kw: kw | dict(softcap=None)),
        ("gpt_oss", lambda kw: kw | dict(sinks=None)),
    ],
    ids=["window + 1", "no window", "no prefix", "scale", "no softcap", "no sinks"],
)
def test_the_check_sees_a_wrong_attention(family, wrong, monkeypatch):
    """`verify` is no ornament: it raises, and leaves the model as it was."""
    from sdft_kernels.models import attention_hook

    right = attention_hook.shared_prefix_attention
    model = tiny(family, window=3)
    stock = model.config._attn_implementation
    monkeypatch.setattr(attention_hook, "shared_prefix_attention", lambda *args, **kw: right(*args, **wrong(kw)))
    with pytest.raises(ValueError, match="other hidden states with a shared prefix"):
        enable_shared_prefix(model)
    assert model.config._attn_implementation == stock
    monkeypatch.undo()
    enable_shared_prefix(model)
    verify_shared_prefix(model)


def test_the_integration_names_the_same_things():
    from sdft_kernels.integrations import transformers as integration

    assert integration.packed_hidden_states is packed_hidden_states
    assert all(hasattr(integration, name) for name in integration.__all__)
