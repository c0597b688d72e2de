"""What would silently give other numbers with a shared prefix is refused, each with an error that names the fix."""

import copy

import pytest
import torch
from prefix_models import VOCABULARY, batch, tiny

transformers = pytest.importorskip("transformers")

from sdft_kernels.models import (  # noqa: E402
    disable_shared_prefix,
    enable_shared_prefix,
    packed_hidden_states,
    shared_prefix_kwargs,
)
from sdft_kernels.prefix_attention import PrefixCache, PrefixTree  # noqa: E402

BASE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def packed_inputs():
    tree, ids = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 5]])
    return dict(input_ids=ids[None], **shared_prefix_kwargs(tree))


def enabled(family="llama", **overrides):
    model = tiny(family, **overrides)
    enable_shared_prefix(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_mask=torch.tensor([[0, 1, 1, 1, 1]])), "left-padded prompts: strip the padding"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1, 0]])), "takes no attention_mask"),
        (dict(attention_mask=None), "takes no attention_mask"),
        (dict(attention_mask=torch.zeros(1, 1, 5, 5)), "takes no attention_mask"),
        (dict(input_ids=torch.ones(2, 5, dtype=torch.long)), "got a batch of 2"),
        (dict(input_ids=torch.ones(1, 4).long(), position_ids=torch.arange(4)[None]), "4 tokens but the tree 5"),
    ],
)  # fmt: skip
def test_keywords_that_do_not_fit_the_tree(change, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        enabled()(**(packed_inputs() | change))


def test_a_cache_of_transformers():
    model = enabled()
    with torch.no_grad():
        past = model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without past_key_values"):
            model(**(packed_inputs() | dict(past_key_values=past, use_cache=True)))


def test_attention_dropout_in_training():
    model = enabled(attention_dropout=0.1)
    packed_hidden_states(model, *batch("two"))  # eval mode: fine
    with pytest.raises(ValueError, match=r"attention dropout 0.1 in training.*attention_dropout=0.0"):
        packed_hidden_states(model.train(), *batch("two"))


def test_output_attentions():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    enable_shared_prefix(model)
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        packed_hidden_states(model, *batch("two"))


def test_not_enabled_or_switched_off():
    model = tiny("llama")
    with pytest.raises(ValueError, match="is 'sdpa': call enable_shared_prefix"):
        packed_hidden_states(model, *batch("two"))
    enable_shared_prefix(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"is 'eager': call enable_shared_prefix.*again after any set_attn"):
        packed_hidden_states(model, *batch("two"))
    enable_shared_prefix(model)
    packed_hidden_states(model, *batch("two"))
    disable_shared_prefix(model)
    with pytest.raises(ValueError, match="call enable_shared_prefix"):
        packed_hidden_states(model, *batch("two"))


def test_a_layer_set_back_behind_the_model():
    """Layers share the model's configuration, but nothing forces one to."""
    model = enabled()
    layer = model.model.layers[1].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = "sdpa"
    with pytest.raises(RuntimeError, match="only 1 of 2 layers"):
        packed_hidden_states(model, *batch("two"))


def test_a_forward_that_drops_keywords():
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda input_ids, attention_mask=None, position_ids=None, use_cache=None, **_: forward(
        input_ids=input_ids, position_ids=position_ids, use_cache=use_cache
    )
    with pytest.raises(RuntimeError, match="does not hand keywords down"):
        enable_shared_prefix(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_the_attention_function_does_not_see(monkeypatch):
    """A model that builds the window into its mask only, as one with code of its own may."""
    from transformers.models.mistral import modeling_mistral

    source = modeling_mistral.ALL_ATTENTION_FUNCTIONS

    class WithoutWindow:
        @staticmethod
        def get_interface(*args):
            function = source.get_interface(*args)
            return lambda *inputs, sliding_window, **kwargs: function(*inputs, **kwargs)

    monkeypatch.setattr(modeling_mistral, "ALL_ATTENTION_FUNCTIONS", WithoutWindow)
    model = tiny("mistral")
    with pytest.raises(ValueError, match="hides its window from the attention function"):
        enable_shared_prefix(model)
    model.config.sliding_window = None
    enable_shared_prefix(model)  # control


def test_cache_and_gradients():
    model = enabled()
    with pytest.raises(ValueError, match=r"carry no gradient: leave cache out, or run under torch.no_grad"):
        packed_hidden_states(model, *batch("two"), cache=PrefixCache(10**6))


def make(name, **options):
    config = getattr(transformers, f"{name.removesuffix('ForCausalLM')}Config")(**(BASE | options))
    return getattr(transformers, name)(config)


MAMBA = dict(state_size=4, conv_kernel=2, expand=2, time_step_rank=4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("MambaForCausalLM", **MAMBA), "MambaForCausalLM.*layers other than attention"),
        (lambda: make("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]), r"attention \(conv\)"),
        (
            lambda: make("FalconH1ForCausalLM", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
            "layers other than attention",
        ),
        (
            lambda: make("Qwen3NextForCausalLM", layer_types=["linear_attention", "full_attention"], head_dim=16,
                         num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, linear_num_value_heads=2,
                         linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                         shared_expert_intermediate_size=8),
            r"attention \(linear_attention\).*completion_hidden_states",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
            ),
            "encoder-decoder",
        ),
        (lambda: tiny("gemma3", use_bidirectional_attention=True), "both directions"),
        (lambda: torch.nn.Linear(2, 2), "must be a transformers causal language model, got Linear"),
        (lambda: tiny("llama").model, "no backbone"),
        (lambda: make("BloomForCausalLM", n_head=4), "AttentionInterface"),
    ],
    ids=["mamba", "lfm2", "falcon_h1", "qwen3_next", "t5", "bidirectional", "linear", "backbone", "bloom"],
)  # fmt: skip
def test_models_that_cannot_share_prefixes(build, message):
    with pytest.raises(ValueError, match=message):
        enable_shared_prefix(build())


def test_recurrent_layers_do_leak_in_a_packed_row(monkeypatch):
    """Why they are refused, and that the check at the end of `enable_shared_prefix` would see them without the list."""
    from sdft_kernels.models import prefix_support

    model = make(
        "FalconH1ForCausalLM", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, initializer_range=0.2
    ).eval()
    monkeypatch.setattr(prefix_support, "_is_recurrent", lambda module: False)
    monkeypatch.setattr(prefix_support, "LAYER_TYPES", (*prefix_support.LAYER_TYPES, "hybrid"))
    with pytest.raises(ValueError, match="other hidden states with a shared prefix"):
        enable_shared_prefix(model)


def test_a_softcap_that_stock_attention_ignores():
    model = tiny("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match=r"sdpa ignores.*set_attn_implementation\('eager'\)"):
        enable_shared_prefix(model)


def test_multimodal_wrapper():
    text = tiny("gemma3").config
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="pass its text-only"):
        enable_shared_prefix(transformers.Gemma3ForConditionalGeneration(config))


def test_prompt_learning():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        enable_shared_prefix(model)
