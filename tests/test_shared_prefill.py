"""Rollouts whose prompt is computed once: the same tokens as stock `generate`, and the plain path where it must be."""

import logging
import re

import pytest
import torch

pytest.importorskip("transformers")

import prefix_models  # noqa: E402

from sdft_kernels.distill import rollouts  # noqa: E402
from sdft_kernels.distill.rollouts import generate_completions  # noqa: E402
from sdft_kernels.models import shared_prefill  # noqa: E402

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
            "rope_theta": 1e4}, max_position_embeddings=8), "dynamic rope changes"),
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
