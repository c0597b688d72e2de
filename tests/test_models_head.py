"""`head_kwargs` and `hidden_states` against each model's own logits; what is refused, and how."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from sdft_kernels.models import HEAD_FAMILIES, head_kwargs, head_spec, hidden_states, verify_head  # noqa: E402

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT_J = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, n_ctx=64)
EXTRA = {
    "mixtral": dict(num_local_experts=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gemma2": dict(final_logit_softcapping=0.7, query_pre_attn_scalar=8),
    "gemma3_text": dict(final_logit_softcapping=0.7, query_pre_attn_scalar=8),
    "vaultgemma": dict(final_logit_softcapping=0.7, query_pre_attn_scalar=8),
    "nanochat": dict(final_logit_softcapping=0.7),
    "recurrent_gemma": dict(logits_soft_cap=0.7, lru_width=32, block_types=["recurrent", "attention"]),
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=7.0),
    "granitemoe": dict(logits_scaling=7.0, num_local_experts=2, num_experts_per_tok=1),
    "hyperclovax": dict(logits_scaling=0.3),
    "minicpm3": dict(
        dim_model_base=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8
    ),
    "falcon_h1": dict(lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
    "phi": {},
    "gptj": GPT_J,
    "codegen": GPT_J,
    "gpt2": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16),
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=1),
    "deepseek_v3": dict(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, head_dim=4,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "smollm3": {},
    "phi3": {},
}  # fmt: skip
FAMILIES = [(name, kind) for name, facts in HEAD_FAMILIES.items() for kind in facts["types"].split()]


def tiny(kind, **overrides):
    torch.manual_seed(0)
    own = EXTRA.get(kind, {})
    sizes = own if "n_embd" in own else {**SIZES, **own}
    try:
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **overrides})
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # std 0.02 makes logits too small for a softcap of 0.7 to bend
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_by_hand(model, ids):
    spec = head_kwargs(model)
    logits = nn.functional.linear(hidden_states(model, ids), spec["student_weight"], spec["student_bias"])
    logits = logits * spec["student_logit_scale"]
    cap = spec["student_softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_head_kwargs_reproduce_the_logits(family, kind):
    model = tiny(kind)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        actual = logits_by_hand(model, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    verify_head(model)
    facts, spec = HEAD_FAMILIES[family], head_spec(model)
    assert (spec.softcap is not None) == ("softcap" in facts)
    assert (spec.logit_scale != 1.0) == ("scale" in facts)
    assert (spec.bias is not None) == ("bias" in facts)


def test_side_names_the_arguments_and_tied_heads_are_the_embedding():
    model = tiny("qwen2", tie_word_embeddings=True)
    teacher = head_kwargs(model, "teacher")
    assert set(teacher) == {"teacher_weight", "teacher_bias", "teacher_logit_scale", "teacher_softcap"}
    assert teacher["teacher_weight"] is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="'student' or 'teacher'"):
        head_kwargs(model, "both")


def test_unknown_post_processing_is_refused():
    model = tiny("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logit_scale=0.5"):
        head_kwargs(model)
    model.config.logit_scale = 1.0
    assert head_kwargs(model)["student_logit_scale"] == 1.0


def test_verify_head_catches_what_no_configuration_says():
    model = tiny("llama")
    verify_head(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.9
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="between its head and its logits"):
        verify_head(model)


def test_heads_that_cannot_be_fused_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="ForCausalLM"):
        head_kwargs(model.model)
    with pytest.raises(ValueError, match="transformers"):
        head_kwargs(nn.Linear(4, 4))

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model.lm_head = Doubled(32, 97, bias=False)
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear"):
        head_kwargs(model)
    model.lm_head = nn.Linear(32, 97, bias=False, device="meta")
    with pytest.raises(ValueError, match="empty"):
        head_kwargs(model)
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            is_decoder=True,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="inside another module"):
        head_kwargs(bert)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        head_kwargs(t5)


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_a_multimodal_model_is_refused_and_its_text_model_accepted(name):
    text = dict(SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    if name == "Llava":
        text, vision = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**vision)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for check in (head_kwargs, verify_head):
        with pytest.raises(ValueError, match="is multimodal: pass the text model, text = ") as caught:
            check(model)
    recipe = str(caught.value).split("the text model, ")[1]
    cls = recipe.split("(")[0].removeprefix("text = ")
    names = {"model": model, cls: getattr(transformers, cls)}
    exec(recipe, names)  # noqa: S102 - the message is the advice, and this is it taken
    text_model = names["text"].eval()
    verify_head(text_model)
    ids = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        assert torch.equal(text_model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("window", [1, 2])
def test_a_model_that_is_not_causal_is_refused(window):
    """Each token would be predicted from itself, with a loss that looks fine."""
    model = tiny("llama")
    forward = model.model.forward

    def looks_ahead(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.01 * out.last_hidden_state.roll(-window, dims=1)
        return out

    model.model.forward = looks_ahead
    with pytest.raises(ValueError, match="LlamaForCausalLM is not causal"):
        verify_head(model)


def test_sharded_head_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    model = tiny("llama")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = DTensor.from_local(model.lm_head.weight.detach(), mesh, [Replicate()])
        model.lm_head.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match="full_tensor"):
            head_kwargs(model)
    finally:
        dist.destroy_process_group()


def test_peft_backbone_lora_works_and_head_lora_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, 97, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(logits_by_hand(model, ids), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises(NotImplementedError, match="merge_and_unload"):
            head_kwargs(peft.get_peft_model(tiny("llama"), config))
    prompt = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        head_kwargs(prompt)
