"""Tiny random models of every family that transformers maps to a causal language model."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn

VOCABULARY = 64
LARGEST = 1_000_000  # parameters
# By name of the configuration field; a family takes those it has.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, d_model=32, n_embd=32, dim=32, emb_dim=32, embedding_size=32,
    intermediate_size=48, ffn_dim=48, n_inner=48, d_ff=48, encoder_ffn_dim=48, decoder_ffn_dim=48, dff=48,
    num_hidden_layers=2, num_layers=2, n_layer=2, n_layers=2, encoder_layers=2, decoder_layers=2,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, n_positions=64, max_seq_len=64, n_ctx=64,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_local_experts=4,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, o_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    index_n_heads=4, index_head_dim=8, index_topk=4, sliding_window=8, rotary_dim=4, chunk_size=8, mamba_chunk_size=8,
    mamba_d_state=4, mamba_d_conv=4, mamba_expand=2, mamba_n_heads=4, mamba_d_head=16, state_size=4, ssm_state_size=4,
    linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_heads=4, linear_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA_4 = dict(
    head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
INKLING = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4, rel_extent=16,
)  # fmt: skip
BYTES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
# What a family needs beside the sizes; None takes a field's default.
EXTRA: dict[str, dict[str, Any]] = {
    "blt": dict(
        patcher_config=BYTES, encoder_config=BYTES | dict(hidden_size_global=32), global_config=BYTES,
        decoder_config=BYTES | dict(hidden_size_global=32), encoder_hash_byte_group_vocab=50,
    ),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
    "cpmant": dict(dim_head=8, dim_ff=48, position_bias_max_distance=64, prompt_types=4, prompt_length=2),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8), ffn_config=dict(hidden_size=32, ffn_hidden_size=48),
    ),
    "deepseek_v4": dict(num_key_value_heads=1, o_groups=2, hc_mult=2),
    "dots3_note": dict(vision_config=dict(adapter_out_dim=32), audio_config=dict(adapter_out_dim=32)),
    "dots3_note_text": dict(per_layer_config={}, use_dsa=False, num_key_value_heads=4),
    "falcon": dict(head_dim=None),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, laurel_rank=4,
    ),
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "git": dict(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32,
        ),
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "inkling2_loop_text": INKLING | dict(unpadded_vocab_size=VOCABULARY),
    "inkling2_text": INKLING | dict(unpadded_vocab_size=VOCABULARY),
    "inkling_text": INKLING,
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mllama_text": dict(cross_attention_layers=[1]),
    "mamba2": dict(num_heads=8),
    "minimax_m3_vl_text": dict(dense_intermediate_size=48, shared_intermediate_size=16, index_block_size=4),
    "nemotron_h": dict(
        num_hidden_layers=None, layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16,
        n_groups=2, moe_shared_expert_intermediate_size=16,
    ),
    "phi4_multimodal": dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
        audio_config=dict(
            hidden_size=32, intermediate_size=48, num_blocks=1, num_attention_heads=4, ext_pw_out_channel=32,
            depthwise_separable_out_channel=32, nemo_conv_channels=32,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
            crop_size=28,
        ),
    ),
    "prophetnet": dict(num_hidden_layers=None, num_encoder_layers=2, num_decoder_layers=2),
    "reformer": dict(
        is_decoder=True, axial_pos_embds=False, attention_head_size=8, feed_forward_size=48, num_buckets=2,
        attn_layers=["local", "lsh"], num_hidden_layers=None, local_attn_chunk_length=8, lsh_attn_chunk_length=8,
    ),
    "roc_bert": dict(pronunciation_vocab_size=8, shape_vocab_size=8),
    "xlnet": dict(max_position_embeddings=None, d_inner=48),
    "xlstm": dict(v_head_dim=None),
    "zamba": dict(
        num_hidden_layers=5, num_key_value_heads=4,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    ),
    "zamba2": dict(num_key_value_heads=4, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def families() -> list[str]:
    """Model types that transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# Families whose causal class takes the text part of a multimodal configuration.
TEXT_ONLY = ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")


def config(family: str, **overrides: Any) -> Any:
    """A tiny configuration; that of a multimodal family is its default one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    if family in TEXT_ONLY:
        text = cls.sub_configs["text_config"]
        tiny = _tiny(getattr(text, "config_class", text), f"{family}_text", overrides)
        return cls(text_config=tiny.to_dict(), **EXTRA.get(family, {}))
    return cls() if "text_config" in cls.sub_configs else _tiny(cls, family, overrides)


def _tiny(cls: Any, family: str, overrides: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    own = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has keys of every head
        own["num_key_value_heads"] = SIZES["num_attention_heads"]
    own |= EXTRA.get(family, {}) | overrides
    return cls(**{name: value for name, value in own.items() if value is not None})


def multimodal(model: Any) -> bool:
    return model.config.get_text_config() is not model.config


def build(family: str, **overrides: Any) -> Any:
    """A model in eval mode with wide weights; of a multimodal family on the meta device, which holds no memory."""
    return from_config(config(family, **overrides), family)


def from_config(settings: Any, family: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(settings).eval()
    if multimodal(empty):
        return empty
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > LARGEST:  # before it fills the machine's memory
        raise ValueError(f"{family} has {size} parameters: give its sizes in EXTRA")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def with_dropout(family: str, rate: float) -> Any:
    """`build`, with every dropout rate of the configuration, and of those within it, at `rate`."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    settings = config(family)
    for part in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        for name, value in list(vars(part).items()) if part is not None else ():
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                with contextlib.suppress(
                    StrictDataclassFieldValidationError
                ):  # MPT's `attn_pdrop` is declared an integer
                    setattr(part, name, rate)
    return from_config(settings, family)
