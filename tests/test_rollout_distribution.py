"""Rollouts follow softmax(logits / temperature), whatever a model's generation config holds."""

import contextlib
import logging
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_models  # noqa: E402

from sdft_kernels.distill import rollouts  # noqa: E402
from sdft_kernels.distill.rollouts import generate_completions  # noqa: E402
from sdft_kernels.models.shared_prefix import disable_shared_prefix, enable_shared_prefix  # noqa: E402

PROMPT = [5, 9, 2, 7, 31, 4, 8]
ENDS = [1, 2]
# Each changes what stock `generate` samples from (`assert` in `test_a_setting_that_is_let_through_would_show`).
NARROWING = {
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "top_h": 0.4,
    "min_p": 0.2,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.2,
    "min_length": 11,
    "min_new_tokens": 3,
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": (0, 3.0),
    "suppress_tokens": list(range(30)),
    "begin_suppress_tokens": list(range(30)),
    "bad_words_ids": [[i] for i in range(3, 30)],
    "sequence_bias": [[[7], 5.0], [[11], -5.0]],
    "guidance_scale": 3.0,
    "watermarking_config": transformers.generation.WatermarkingConfig(bias=4.0),
}
# These end it, raise, or make something other than one sample a row.
OTHERS = {
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": ["a"],
    "max_time": 0.0,
    "use_cache": False,
    "prefill_chunk_size": 2,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_scores": True,
    "num_return_sequences": 2,
    "max_length": 9,
    "do_sample": False,
    "forced_bos_token_id": 5,
}


class Steps:
    """What `generate` draws each token from, and the settings that it runs under."""

    def __init__(self, monkeypatch):
        self.drawn, self.settings, self.processors = [], [], []
        multinomial, processors = torch.multinomial, transformers.GenerationMixin._get_logits_processor

        def draw(probabilities, *args, **kwargs):
            self.drawn.append(probabilities)
            return multinomial(probabilities, *args, **kwargs)

        def watch(model, generation_config, **kwargs):
            result = processors(model, generation_config=generation_config, **kwargs)
            self.settings.append({k: v for k, v in vars(generation_config).items() if not torch.is_tensor(v)})
            self.processors += [type(p).__name__ for p in result]
            return result

        monkeypatch.setattr(torch, "multinomial", draw)
        monkeypatch.setattr(transformers.GenerationMixin, "_get_logits_processor", watch)

    @torch.no_grad()
    def variation(self, model, completions, temperature):
        """The largest total variation of a step from softmax(logits / temperature), over rows that have not ended."""
        worst = 0.0
        for row, completion in enumerate(completions):
            ids = torch.tensor([PROMPT + completion])
            expected = (model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].double() / temperature).softmax(-1)
            drawn = torch.stack([step[row] for step in self.drawn[: len(completion)]]).double()
            worst = max(worst, (drawn - expected).abs().sum(-1).max().item() / 2)
        return worst


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def small():
    return prefix_models.tiny("llama", initializer_range=0.1, eos_token_id=1, pad_token_id=0)


def sample(model, **options):
    return generate_completions(
        model, [PROMPT], 3, max_completion_length=4, eos_token_ids=ENDS, **({"temperature": 0.8} | options)
    )[0]


@pytest.mark.parametrize("name", [*NARROWING, *OTHERS])
@pytest.mark.parametrize("share", [True, False])
def test_the_generation_config_does_not_shape_rollouts(small, steps, name, share):
    clean = sample(small, share_prefill=share)
    settings = steps.settings.pop()
    steps.drawn.clear()
    setattr(small.generation_config, name, (NARROWING | OTHERS)[name])
    before = dict(vars(small.generation_config))
    found = sample(small, share_prefill=share)
    assert steps.variation(small, found, 0.8) < 1e-5
    assert found == clean and steps.settings == [settings] and set(steps.processors) == {"TemperatureLogitsWarper"}
    assert vars(small.generation_config) == before


@pytest.mark.parametrize("name", NARROWING)
def test_a_setting_that_is_let_through_would_show(small, steps, name, monkeypatch):
    """Control: as `generate` is stock, each of the settings above moves the distribution."""
    monkeypatch.setattr(rollouts, "_own_settings", lambda *_: contextlib.nullcontext())
    setattr(small.generation_config, name, NARROWING[name])
    # What was reset by name before, is passed; what is not, goes by the model's own.
    kwargs = {name: NARROWING[name]} if name in ("temperature", "top_k", "top_p") else {}
    found = sample(small, share_prefill=False, generation_kwargs=kwargs)
    assert steps.variation(small, found, 0.8) > 0.01


def test_no_field_of_the_generation_config_comes_through(small, steps):
    """Every field of this version of transformers, known above or not, and one that it does not know."""
    sample(small)
    for name in vars(small.generation_config):
        if not name.startswith("_"):
            setattr(small.generation_config, name, (NARROWING | OTHERS).get(name, f"a model's {name}"))
    small.generation_config.presence_penalty = 2.0
    before = dict(vars(small.generation_config))
    sample(small)
    clean, loaded = steps.settings
    assert clean == loaded
    assert vars(small.generation_config) == before


@pytest.mark.parametrize("wrap", ["lora", "shared prefix"])
def test_wrappers_do_not_bring_it_back(small, steps, wrap):
    model = small
    if wrap == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    else:
        enable_shared_prefix(small)
    clean = sample(model)
    steps.drawn.clear()
    for name in NARROWING:
        setattr(small.generation_config, name, NARROWING[name])
    config = small.generation_config
    found = sample(model)
    assert found == clean and model.generation_config is config and small.generation_config is config
    if wrap == "shared prefix":
        disable_shared_prefix(small)
    assert steps.variation(model, found, 0.8) < 1e-5


def test_a_custom_generate_finds_no_setting_either(small):
    """Remote code may read `self.generation_config` by itself."""
    seen = []
    stock = type(small).generate

    class Remote(type(small)):
        def generate(self, **kwargs):
            seen.append(dict(vars(self.generation_config)))
            return stock(self, **kwargs)

    small.__class__ = Remote
    small.generation_config.repetition_penalty, small.generation_config.eos_token_id = 1.5, [9]
    sample(small)
    [settings] = seen
    assert settings["repetition_penalty"] is None
    assert settings["eos_token_id"] == ENDS and settings["pad_token_id"] == 1 and settings["max_new_tokens"] == 4


def test_it_is_restored_when_generate_raises(small):
    small.generation_config.repetition_penalty = 1.5
    config = small.generation_config
    with pytest.raises(ValueError, match="top_k"):
        sample(small, generation_kwargs={"top_k": -1})
    assert small.generation_config is config and config.repetition_penalty == 1.5


@pytest.mark.parametrize("name", NARROWING)
@pytest.mark.parametrize("form", ["keyword", "config"])
def test_what_the_caller_asks_for_applies(small, steps, name, form):
    value = NARROWING[name]
    config = transformers.GenerationConfig(**{name: value})
    kwargs = {name: value} if form == "keyword" else {"generation_config": config}
    before = config.to_dict()
    found = sample(small, share_prefill=False, generation_kwargs=kwargs)
    assert steps.variation(small, found, 0.8) > 0.01
    # Nothing is narrowed beside it: the processors are its own (two for min_new_tokens) and the temperature's.
    others = {"TemperatureLogitsWarper"} | ({"MinLengthLogitsProcessor"} if name == "min_new_tokens" else set())
    assert len(set(steps.processors) - others) == (name != "temperature")
    assert config.to_dict() == before


def test_forbidden_tokens_are_said_to_be_off_once(small, caplog):
    rollouts._warn_once.cache_clear()
    small.generation_config.suppress_tokens, small.generation_config.bad_words_ids = [5], [[6]]
    with caplog.at_level(logging.WARNING, logger=rollouts.__name__):
        sample(small), sample(small)
    [record] = caplog.records
    assert re.search(r"LlamaForCausalLM sets bad_words_ids, suppress_tokens: off in rollouts", record.message)
    rollouts._warn_once.cache_clear()
    caplog.clear()
    asked = {"suppress_tokens": [5], "bad_words_ids": [[6]]}
    with caplog.at_level(logging.WARNING, logger=rollouts.__name__):
        sample(small, generation_kwargs=asked)
    assert not caplog.records


@pytest.mark.parametrize("options", [{"temperature": 0}, {"generation_kwargs": {"do_sample": False}}])
def test_greedy_is_computed_once_and_copied(small, options):
    rows = []
    handle = small.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = [PROMPT, [3], [11, 7, 5]]
    together = generate_completions(small, prompts, 3, max_completion_length=5, eos_token_ids=ENDS, **options)
    handle.remove()
    assert set(rows) == {3}
    single = generate_completions(small, prompts, max_completion_length=5, eos_token_ids=ENDS, temperature=0)
    assert together == [group * 3 for group in single]
    assert together[0][0] is not together[0][1]
    small.generation_config.repetition_penalty = 1.5
    assert together == generate_completions(
        small, prompts, 3, max_completion_length=5, eos_token_ids=ENDS, batch_size=1, **options
    )


def test_beams_are_not_copies(small):
    kwargs = {"num_beams": 4, "do_sample": False}
    groups = generate_completions(small, [PROMPT], 3, max_completion_length=4, generation_kwargs=kwargs)
    assert len({tuple(c) for c in groups[0]}) == 3


def test_a_callers_end_tokens_are_cut_at(small):
    """The end tokens that `generate` was given, not the ones that another argument names."""
    ends = list(range(0, 61, 2))
    found = sample(small, generation_kwargs={"eos_token_id": ends})
    assert all(c[-1] in ends or len(c) == 4 for c in found) and not any(set(c[:-1]) & set(ends) for c in found)
    assert min(map(len, found)) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or positive and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 .greedy. or positive and finite, got nan"),
        ({"temperature": 0, "generation_kwargs": {"do_sample": True}}, "temperature"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences=2: use num_generations"),
        ({"generation_kwargs": {"return_dict_in_generate": True}}, "return_dict_in_generate=True"),
    ],
)
def test_bad_arguments_are_named(small, options, message):
    with pytest.raises(ValueError, match=message):
        sample(small, **options)


def test_no_generations_are_refused(small):
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        generate_completions(small, [PROMPT], 0)
