"""Rollouts whose prompt is computed once: the same tokens as stock `generate`, and the plain path where it must be."""

import contextlib
import logging
import re

import pytest
import torch

pytest.importorskip("transformers")

import prefix_models  # noqa: E402

from sdft_kernels import _native  # noqa: E402
from sdft_kernels.distill import rollouts  # noqa: E402
from sdft_kernels.distill.rollouts import generate_completions  # noqa: E402
from sdft_kernels.models import attention_hook, decode_attention, shared_prefill  # noqa: E402
from sdft_kernels.models.decode_cache import FIRST_TOKENS, DecodeLayer  # noqa: E402
from sdft_kernels.models.decode_linear import compiled_linears  # noqa: E402
from sdft_kernels.models.shared_prefix import disable_shared_prefix, enable_shared_prefix  # noqa: E402

PROMPTS = [[5, 9, 2, 7, 31, 4, 8, 15, 16, 23, 42], [3], [11, 7, 5, 3, 2, 60, 1, 44]]


def watched(model, **options):
    """Completions, and the shapes of the ids that went through the model's layers."""
    shapes = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        prompts = options.pop("prompts", PROMPTS)
        return generate_completions(model, prompts, options.pop("samples", 4), **options), shapes
    finally:
        handle.remove()


def settings(tokens):
    # No token twice: tied embeddings of random models would give but one.
    return dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, no_repeat_ngram_size=1)


@torch.no_grad()
def greedy(model, prompts, repeats, tokens):
    """Most likely tokens after each prompt: of `repeats` rows after one prefill, and of stock `generate`."""
    ids, mask = rollouts._left_padded(prompts, 0, torch.device("cpu"))
    shared = model.generate(**shared_prefill.prefilled_inputs(model, ids, mask, repeats), **settings(tokens))
    stock = model.generate(input_ids=ids, attention_mask=mask, **settings(tokens)).repeat_interleave(repeats, dim=0)
    assert shared.shape == (len(prompts) * repeats, ids.shape[1] + tokens)
    return shared, stock


@pytest.mark.parametrize("family", prefix_models.FAMILIES)
def test_same_tokens_as_stock(family):
    """Ragged prompts, left-padded, longer and shorter than the window of 4, and completions that outgrow it."""
    model = prefix_models.tiny(family)
    shared, stock = greedy(model, PROMPTS, 3, 12)
    assert torch.equal(shared, stock) and len(shared[:, 11:].unique()) > 12
    options = dict(max_completion_length=12, seed=4)
    shared, shapes = watched(model, **options)
    stock, plain_shapes = watched(model, share_prefill=False, **options)
    assert shapes[:2] == [(3, 10), (12, 1)] and plain_shapes[:2] == [(12, 11), (12, 1)]
    assert shared == stock
    assert len({tuple(c) for c in shared[0]}) == 4 and shared != watched(model, **(options | {"seed": 5}))[0]


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_cache_without_windows_would_show(family, monkeypatch):
    """Control: a cache that is cut to another window gives other tokens."""
    import transformers

    real = transformers.DynamicCache

    def narrow(config):
        cache = real(config=config)
        for layer in cache.layers:
            if layer.is_sliding:
                layer.sliding_window -= 1
        return cache

    model = prefix_models.tiny(family)
    monkeypatch.setattr(transformers, "DynamicCache", narrow)
    ids, mask = rollouts._left_padded(PROMPTS, 0, torch.device("cpu"))
    with torch.no_grad():
        inputs = shared_prefill.prefilled_inputs(model, ids, mask, 3)
        monkeypatch.undo()
        stock = model.generate(input_ids=ids, attention_mask=mask, **settings(12)).repeat_interleave(3, dim=0)
        assert not torch.equal(model.generate(**inputs, **settings(12)), stock)


def test_same_tokens_in_the_shape_of_smollm():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100000.0, initializer_range=0.04,
        )
    ).eval()  # fmt: skip
    prompt = torch.randint(0, 1024, (70,)).tolist()
    assert torch.equal(*greedy(model, [prompt], 8, 24))
    options = dict(prompts=[prompt], samples=8, max_completion_length=24)
    shared, shapes = watched(model, **options)
    stock, _ = watched(model, share_prefill=False, **options)
    assert shapes[0] == (1, 69)
    # Rounding differs, so that a draw on the edge between two tokens may fall on the other side.
    assert sum(a != b for a, b in zip(shared[0], stock[0], strict=True)) <= 1


def test_samples_follow_the_models_distribution(monkeypatch):
    """Pairs of the first two tokens, 4096 times; a prompt that is one token off must show."""
    model = prefix_models.tiny("llama", vocab_size=8)
    prompt = [5, 2, 7, 1, 4]

    @torch.no_grad()
    def probabilities():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = model(input_ids=torch.tensor([[*prompt, i] for i in range(8)])).logits[:, -1].softmax(-1)
        return first[:, None] * second  # (8, 8)

    def chi_square():
        [pairs] = generate_completions(model, [prompt], 4096, max_completion_length=2, seed=1)
        counts = torch.zeros(8, 8).index_put_(tuple(torch.tensor(pairs).T), torch.ones(4096), accumulate=True)
        expected = 4096 * probabilities()
        return ((counts - expected).square() / expected).sum().item()

    assert chi_square() < 63 + 5 * (2 * 63) ** 0.5
    real = shared_prefill.prefilled_inputs

    def wrong(model, input_ids, *args):
        return real(model, input_ids + torch.tensor([[0, 1, 0, 0, 0]]), *args) | {
            "input_ids": input_ids.repeat(4096, 1)
        }

    monkeypatch.setattr(rollouts, "prefilled_inputs", wrong)
    assert chi_square() > 2 * 63


def test_stop_tokens_batches_and_kwargs_work_as_before():
    model = prefix_models.tiny("gemma3").train()
    options = dict(max_completion_length=10, eos_token_ids=[7, 9, 20, 31], seed=2, batch_size=5)
    options["generation_kwargs"] = {"top_k": 20, "repetition_penalty": 1.2, "min_new_tokens": 2}
    shared, shapes = watched(model, **options)
    assert shared == watched(model, share_prefill=False, **options)[0]
    # One prompt at a time, of which the shortest has nothing to share.
    assert shapes[0] == (4, 1) and {(1, 7), (1, 10)} <= set(shapes)
    assert {len(c) for group in shared for c in group} > {10}
    assert all(len(c) >= 2 for group in shared for c in group) and model.training


def test_one_sample_or_one_token_takes_the_plain_path(caplog):
    model = prefix_models.tiny("llama")
    with caplog.at_level(logging.WARNING):
        assert watched(model, samples=1, max_completion_length=2)[1][0] == (3, 11)
        assert watched(model, prompts=[[3], [4]], max_completion_length=2)[1][0] == (8, 1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"cache_implementation": "static"}, "generate has cache_implementation='static'"),
        ({"use_cache": False}, "generate has use_cache=False"),
        ({"num_beams": 4, "do_sample": False}, "generate does beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "generate does assisted_generation"),
        ({"guidance_scale": 1.5}, "generate has guidance_scale=1.5"),
        ({"past_key_values": object()}, "generate is given past_key_values"),
        ({"top_k": 5, "logits_processor": [], "stopping_criteria": None}, None),
    ],
)
def test_what_generate_does_can_stand_in_the_way(kwargs, reason):
    model = prefix_models.tiny("llama")
    before = model.generation_config.to_dict()
    assert shared_prefill.prefill_obstacle(model, 9, {"max_new_tokens": 4, "do_sample": True} | kwargs) == reason
    assert model.generation_config.to_dict() == before


def test_a_setting_falls_back_and_says_so_once(caplog):
    model = prefix_models.tiny("llama")
    options = dict(max_completion_length=3)
    shared, _ = watched(model, **options)
    rollouts._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        plain = [watched(model, generation_kwargs={"use_cache": False}, **options) for _ in range(2)]
    assert [r.message for r in caplog.records] == [
        "each prompt is computed 4 times, once per completion: generate has use_cache=False"
    ]
    assert all(completions == shared and shapes[0] == (12, 11) for completions, shapes in plain)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: prefix_models.tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0,
            "rope_theta": 1e4}, max_position_embeddings=8), "other frequencies for 8 tokens than for 9"),
        (lambda: _mamba(), "layers other than full and sliding-window attention"),
        (lambda: torch.nn.Linear(2, 2), "Linear is no transformers model"),
    ],
)  # fmt: skip
def test_models_that_fall_back(make, reason):
    obstacle = shared_prefill.prefill_obstacle(make(), 9, {})
    assert obstacle is not None and re.search(reason, obstacle)


def test_rope_below_its_limit_is_shared():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert shared_prefill.prefill_obstacle(prefix_models.tiny("llama", rope_parameters=rope), 9, {}) is None


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))


def test_with_an_adapter():
    peft = pytest.importorskip("peft")
    model = prefix_models.tiny("llama")
    bare = generate_completions(model, PROMPTS, 4, max_completion_length=8)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    shared, shapes = watched(adapted, max_completion_length=8)
    assert shapes[0] == (3, 10)
    assert shared == watched(adapted, max_completion_length=8, share_prefill=False)[0] != bare


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of the queries that attended over prompts that stand once."""
    shapes = []
    real = decode_attention.decode_attention

    def watch(query, *args, **options):
        shapes.append(tuple(query.shape))
        return real(query, *args, **options)

    monkeypatch.setattr(attention_hook, "decode_attention", watch)
    return shapes


@pytest.mark.parametrize("family", prefix_models.FAMILIES)
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_an_enabled_model_keeps_prompts_once(family, implementation, decoded):
    """Ragged prompts, windows of 4, and completions that make the samples' buffers grow."""
    model = prefix_models.tiny(family)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    enable_shared_prefix(model)
    tokens = FIRST_TOKENS + 8
    shared, stock = greedy(model, PROMPTS, 3, tokens)
    assert torch.equal(shared, stock) and len(shared[:, 11:].unique()) > 30
    assert len(decoded) == tokens * model.config.num_hidden_layers and {shape[0] for shape in decoded} == {9}
    options = dict(max_completion_length=12, seed=4)
    assert watched(model, **options)[0] == watched(model, share_prefill=False, **options)[0]


def test_other_models_repeat_the_cache(decoded, monkeypatch):
    """Not enabled any more, or in front of an attention that is told of windows and padding by other means."""
    model = prefix_models.tiny("llama")
    enable_shared_prefix(model)
    once = generate_completions(model, PROMPTS, 4, max_completion_length=6)
    assert decoded
    decoded.clear()
    monkeypatch.setattr(shared_prefill, "stock_implementation", lambda name: "flash_attention_2")
    assert generate_completions(model, PROMPTS, 4, max_completion_length=6) == once and not decoded
    monkeypatch.undo()
    model.model.layers[0].compile(backend="eager")
    assert not shared_prefill._decodes(model)
    model.model.layers[0]._compiled_call_impl = None
    assert shared_prefill._decodes(model)
    disable_shared_prefix(model)
    assert generate_completions(model, PROMPTS, 4, max_completion_length=6) == once and not decoded


def test_prompts_are_not_copied():
    model = prefix_models.tiny("llama")
    enable_shared_prefix(model)
    ids, mask = rollouts._left_padded(PROMPTS, 0, torch.device("cpu"))
    with torch.no_grad():
        inputs = shared_prefill.prefilled_inputs(model, ids, mask, 5)
    cache = next(v for v in inputs.values() if hasattr(v, "layers"))
    before = [layer.shared[0].data_ptr() for layer in cache.layers]
    model.generate(**inputs, **settings(4))
    assert [tuple(layer.shared[0].shape) for layer in cache.layers] == [(3, 2, 10, 8)] * 2
    assert [layer.shared[0].data_ptr() for layer in cache.layers] == before
    assert [(layer.tokens, tuple(layer.buffers[0].shape)) for layer in cache.layers] == [
        (4, (15, 2, FIRST_TOKENS, 8))
    ] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_decode_attention(dtype, softcap, sinks, kind):
    """Beside a softmax in fp64 over each sample's keys side by side; at most twice the error of the same in `dtype`."""
    prompts, repeats, heads, key_heads, length, own, size = 2, 3, 6, 2, 37, 5, 16
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: (2 * torch.randn(*shape, generator=generator)).to(dtype)  # noqa: E731
    keys = decode_attention.DecodeKeys(
        draw(prompts, key_heads, length, size), draw(prompts, key_heads, length, size),
        draw(prompts * repeats, key_heads, 2 * own, size)[:, :, :own], draw(prompts * repeats, key_heads, own, size),
    )  # fmt: skip
    query, sink = draw(prompts * repeats, heads, 1, size), draw(heads) if sinks else None
    seen = torch.rand(prompts * repeats, 1, 1, length + own, generator=generator) > 0.3
    seen[..., -1] = True
    additive = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    mask = {"none": None, "bool": seen, "additive": additive}[kind]

    def eager(wide):
        key, value = (
            torch.cat([shared.repeat_interleave(repeats, 0), mine], 2).repeat_interleave(heads // key_heads, 1).to(wide)
            for shared, mine in ((keys.shared_key, keys.own_key), (keys.shared_value, keys.own_value))
        )
        scores = query.to(wide) @ key.transpose(-1, -2) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.to(wide)[None, :, None, None].expand(len(scores), -1, 1, 1)], -1)
        weights = scores.softmax(-1)[..., : length + own]
        return (weights @ value).transpose(1, 2).double()

    exact = eager(torch.float64)
    found = decode_attention.decode_attention(query, keys, mask, scale=0.3, softcap=softcap, sinks=sink)
    assert found.dtype == dtype and found.shape == exact.shape == (6, 1, heads, size)
    assert (found.double() - exact).abs().max() <= 2 * (eager(dtype) - exact).abs().max()


def test_a_layer_that_attends_elsewhere_is_found_out():
    key = torch.randn(1, 2, 3, 4)
    unread: set[int] = set()
    first, second = DecodeLayer(key, key, unread), DecodeLayer(key, key, unread)
    own, _ = first.update(key[:, :, :1], key[:, :, :1])
    assert decode_attention.read_keys(own * 1.0) is None
    with pytest.raises(RuntimeError, match="did not attend through the function of enable_shared_prefix"):
        second.update(key[:, :, :1], key[:, :, :1])
    assert torch.equal(decode_attention.read_keys(own).own_key, key[:, :, :1])
    second.update(key[:, :, :1], key[:, :, :1])
    assert (second.get_seq_length(), second.get_mask_sizes(1), second.get_max_length()) == (4, (5, 0), -1)
    with pytest.raises(NotImplementedError, match="must not reorder, crop or offload"):
        second.crop(-1)


def test_two_tokens_at_once_are_refused():
    model = prefix_models.tiny("llama")
    enable_shared_prefix(model)
    ids, mask = rollouts._left_padded(PROMPTS[:1], 0, torch.device("cpu"))
    with torch.no_grad():
        inputs = shared_prefill.prefilled_inputs(model, ids, mask, 2)
        name = next(name for name, value in inputs.items() if hasattr(value, "layers"))
        with pytest.raises(ValueError, match="decoding takes one token of each sample at a time, got 2"):
            model(input_ids=ids[:, -2:].repeat(2, 1), **{name: inputs[name]})


def test_an_adapter_on_an_enabled_model(decoded):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(prefix_models.tiny("qwen3"), config).eval()
    enable_shared_prefix(model)
    shared = generate_completions(model, PROMPTS, 4, max_completion_length=8)
    assert decoded and shared == generate_completions(model, PROMPTS, 4, max_completion_length=8, share_prefill=False)


@pytest.fixture
def projected(monkeypatch):
    """(rows, outputs) of the compiled products."""
    shapes, real = [], _native.logits_gemm

    def watch(hidden, weight, out, **options):
        shapes.append(tuple(out.shape))
        return real(hidden, weight, out, **options)

    monkeypatch.setattr(_native, "logits_gemm", watch)
    return shapes


@pytest.mark.skipif(_native.cpu_isa() in ("", "portable"), reason="no compiled product that wins")
@pytest.mark.parametrize("family", prefix_models.FAMILIES)
def test_linear_layers_run_compiled_while_decoding(family, projected, monkeypatch):
    model = prefix_models.tiny(family)
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    options = dict(max_completion_length=7, generation_kwargs={"min_new_tokens": 7})
    found = generate_completions(model, PROMPTS, 4, **options)
    # The prefill has 30 rows: it stays with the library.
    assert len(projected) == 7 * linears and projected.count((12, model.config.vocab_size)) == 7
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(rollouts, "compiled_linears", lambda model: contextlib.nullcontext())
    assert found == generate_completions(model, PROMPTS, 4, **options) and len(projected) == 7 * linears


@pytest.mark.skipif(_native.cpu_isa() in ("", "portable"), reason="no compiled product that wins")
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_linear_layer(bias, projected):
    layer = torch.nn.Linear(576, 1111, bias=bias)
    hidden = torch.randn(1, 3, 577)[..., :576].transpose(0, 1)
    with torch.no_grad():
        stock = layer(hidden)
        with compiled_linears(layer):
            found = layer(hidden)
            assert torch.equal(
                layer(torch.ones(17, 576)), torch.nn.functional.linear(torch.ones(17, 576), *layer.parameters())
            )
            assert layer(torch.ones(0, 576)).shape == (0, 1111)
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size mismatch"):
                layer(torch.ones(40, 5))
        exact = hidden.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    assert projected == [(3, 1111)]
    assert found.shape == stock.shape and not torch.equal(found, stock)
    assert (found - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.parametrize("kind", ["gradients", "autocast", "bf16", "subclass", "hooked", "compiled"])
def test_layers_that_stay_as_they_are(kind, projected):
    class Other(torch.nn.Linear):
        pass

    head = Other(8, 16) if kind == "subclass" else torch.nn.Linear(8, 16)
    if kind == "bf16":
        head.to(torch.bfloat16)
    if kind == "hooked":
        head.forward = lambda hidden: hidden.sum()
    if kind == "compiled":
        head.compile(backend="eager")
    before = dict(vars(head))
    autocast = torch.autocast("cpu", enabled=kind == "autocast")
    with torch.set_grad_enabled(kind == "gradients"), autocast, compiled_linears(head):
        head(torch.ones(2, 8, dtype=head.weight.dtype))
    assert vars(head) == before and not projected
