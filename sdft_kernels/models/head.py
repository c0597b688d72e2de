"""The head of a transformers causal language model, as keyword arguments of `linear_divergence`.

A fused loss never sees `model(...).logits`, so whatever a model does between its head's matrix product and its logits
(scales, softcaps, biases) has to be passed to the op. This module knows that chain for the model families of
transformers and refuses what it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdft_kernels.models.hidden import evaluation_mode, hidden_states, unwrap_peft

# Configuration attribute -> {model type: how it enters the logits}. Read from the modeling files of transformers 5.24.
SCALE_RULES: Mapping[str, Mapping[str, Literal["multiply", "divide"]]] = {
    "logit_scale": {"cohere": "multiply", "cohere2": "multiply", "cohere2_moe": "multiply"},
    "logits_scaling": {
        "granite": "divide",
        "granite_swa": "divide",
        "granitemoe": "divide",
        "granitemoe_swa": "divide",
        "granitemoehybrid": "divide",
        "granitemoeshared": "divide",
        "hyperclovax": "multiply",
        "minicpm3": "divide",
    },
    "lm_head_multiplier": {"falcon_h1": "multiply"},
}
SOFTCAP_RULES: Mapping[str, tuple[str, ...]] = {
    "final_logit_softcapping": (
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "nanochat",
        "vaultgemma",
    ),
    "logits_soft_cap": ("recurrent_gemma",),
}

# Facts of one family: how scale, softcap and bias enter; the model's tests compare each with `model(...).logits`.
HEAD_FAMILIES: Mapping[str, dict[str, str]] = {
    "Llama, Mistral, Mixtral, SmolLM2, SmolLM3": {"types": "llama mistral mixtral smollm3"},
    "Qwen2, Qwen3, Qwen3-MoE": {"types": "qwen2 qwen3 qwen3_moe"},
    "Gemma": {"types": "gemma"},
    "Gemma 2, Gemma 3 (text), VaultGemma, NanoChat": {
        "types": "gemma2 gemma3_text vaultgemma nanochat",
        "softcap": "final_logit_softcapping",
    },
    "Recurrent Gemma": {"types": "recurrent_gemma", "softcap": "logits_soft_cap"},
    "Cohere, Cohere 2": {"types": "cohere cohere2", "scale": "× logit_scale"},
    "Granite, Granite-MoE": {"types": "granite granitemoe", "scale": "÷ logits_scaling"},
    "HyperCLOVA X": {"types": "hyperclovax", "scale": "× logits_scaling"},
    "MiniCPM3": {"types": "minicpm3", "scale": "÷ logits_scaling"},
    "Falcon-H1": {"types": "falcon_h1", "scale": "× lm_head_multiplier"},
    "OLMo 2, OLMo 3": {"types": "olmo2 olmo3"},
    "Phi-3": {"types": "phi3"},
    "Phi, GPT-J, CodeGen": {"types": "phi gptj codegen", "bias": "yes"},
    "GPT-2, GPT-NeoX, OPT": {"types": "gpt2 gpt_neox opt"},
    "gpt-oss, DeepSeek-V3, GLM-4": {"types": "gpt_oss deepseek_v3 glm4"},
}

# Model type -> why its logits are not (scale, softcap) of one linear map of the last hidden state.
REFUSED_FAMILIES: Mapping[str, str] = {
    "clvp_decoder": "it normalises once more before the head",
    "electra": "a transform stands between the last hidden state and the head",
    "inkling": "it divides by a width multiplier and cuts padding off the vocabulary",
    "modernbert-decoder": "a transform stands between the last hidden state and the head",
    "xlstm": "it applies its softcap inside the generation chunks",
}

_ATTENTION_ATTRIBUTE = re.compile(r"attn|attention|router|gate|expert|clip|vision|audio|index")
_LOGIT_ATTRIBUTE = re.compile(
    r"logits?_(scal|soft|cap|mup|mult|bias|norm|temp)|final_logit|(lm_head|output|head)_(mult|scal|mup)"
    r"|soft_?cap|dim_model_base|unpadded_vocab"
)
_NEUTRAL = (None, False, 1, 1.0, "none")


@dataclass(frozen=True)
class HeadSpec:
    """The head of a model: logits z = softcap(logit_scale * (h W^T + bias)).

    Attributes:
        weight: (V, H), the head's own parameter (so gradients reach it; tied heads return the embedding).
        bias: (V,) or None.
        logit_scale: factor on the logits before the softcap.
        softcap: cap of cap * tanh(u / cap), or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def kwargs(self, side: Literal["student", "teacher"]) -> dict[str, Any]:
        """The four keyword arguments of `linear_divergence` for `side`."""
        return {
            f"{side}_weight": self.weight,
            f"{side}_bias": self.bias,
            f"{side}_logit_scale": self.logit_scale,
            f"{side}_softcap": self.softcap,
        }


def head_kwargs(model: nn.Module, side: Literal["student", "teacher"] = "student") -> dict[str, Any]:
    """Read a model's head as keyword arguments of `linear_divergence` and `linear_divergence_loss`.

    Args:
        model: a transformers causal language model, or a PEFT model around one (LoRA on the backbone).
        side: which four arguments to name.

    Returns:
        `{side}_weight` (V, H), `{side}_bias` (V,) or None, `{side}_logit_scale` float, `{side}_softcap` float or None.

    Raises:
        ValueError: an encoder-decoder, a multimodal model, a head that is not one plain `nn.Linear`, logit
            post-processing that is not known, a sharded (DTensor), empty or quantised head weight.
        NotImplementedError: LoRA on the head, prompt-learning PEFT.
    """
    if side not in ("student", "teacher"):
        raise ValueError(f"side must be 'student' or 'teacher', got {side!r}")
    return head_spec(model).kwargs(side)


def head_spec(model: nn.Module) -> HeadSpec:
    """The head of `model` as a `HeadSpec`; raises as `head_kwargs` does."""
    base = unwrap_peft(model)
    refuse_prompt_learning(model)
    name = type(base).__name__
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_output_embeddings"):
        raise ValueError(f"model must be a transformers causal language model, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; SDFT needs a causal (decoder-only) language model")
    _refuse_multimodal(base, config)
    head = base.get_output_embeddings()
    _check_head_module(base, head)
    scale, softcap = _post_processing(base, config)
    _check_weight(head.weight, name)
    return HeadSpec(weight=head.weight, bias=head.bias, logit_scale=scale, softcap=softcap)


def refuse_prompt_learning(model: nn.Module) -> None:
    """Raise NotImplementedError where a PEFT adapter prepends virtual tokens."""
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise NotImplementedError(
                f"{type(adapter).__name__} prepends virtual tokens, which shift every position; use LoRA on the "
                "backbone instead"
            )


def _refuse_multimodal(base: Any, config: Any) -> None:
    """Raise for a model around a text model, whose images, audio or video no batch here carries."""
    text = config.get_text_config()
    if text is config:
        return
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    name = type(base).__name__
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    known = causal is not None and causal is not type(base)
    fix = (
        f"text = {causal.__name__}(model.config.get_text_config()); text.{causal.base_model_prefix} = "
        "model.get_decoder(); text.set_output_embeddings(model.get_output_embeddings())"
        if known
        else "its text-only ...ForCausalLM class"
    )
    raise ValueError(f"{name} wraps a text model ({text.model_type}) and is multimodal: pass the text model, {fix}")


def _check_head_module(base: nn.Module, head: Any) -> None:
    name = type(base).__name__
    if head is None:
        raise ValueError(f"{name} has no output embeddings; pass the ...ForCausalLM model, not its backbone")
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise NotImplementedError(
            f"an adapter sits on the head of {name}: remove 'lm_head' from target_modules / modules_to_save, or call "
            "merge_and_unload() first"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"the head of {name} is a {type(head).__name__}; only a plain torch.nn.Linear can be fused")
    if not any(child is head for child in base.children()):
        raise ValueError(
            f"the head of {name} sits inside another module, which may transform its input; only a head directly on "
            "the model can be fused"
        )


def _post_processing(base: nn.Module, config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of the model's configuration; raises on anything that is not in the rules."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type, name = getattr(text, "model_type", ""), type(base).__name__
    if model_type in REFUSED_FAMILIES:
        raise ValueError(f"the head of {name} cannot be fused: {REFUSED_FAMILIES[model_type]}")
    scale, softcap = 1.0, None
    for attribute, value in _logit_attributes(text).items():
        if (how := SCALE_RULES.get(attribute, {}).get(model_type)) is not None:
            scale = scale * float(value) if how == "multiply" else scale / float(value)
        elif model_type in SOFTCAP_RULES.get(attribute, ()):
            softcap = float(value)
        else:
            raise ValueError(
                f"{name} (model type {model_type!r}) has {attribute}={value!r}, logit post-processing that is not "
                "known: compute the head's arguments by hand (student_logit_scale=, student_softcap=), or report the "
                "model so that its rule can be added to sdft_kernels/models/head.py"
            )
    if getattr(base, "final_logits_bias", None) is not None:
        raise ValueError(f"{name} adds final_logits_bias to its logits; that is not supported")
    return scale, softcap


def _logit_attributes(config: Any) -> dict[str, Any]:
    """Configuration attributes that look like logit post-processing and are switched on."""
    values = dict(vars(config))
    if isinstance(getattr(type(config), "logits_scaling", None), property):  # MiniCPM3: hidden_size / dim_model_base
        values["logits_scaling"] = config.logits_scaling
        values.pop("dim_model_base", None)
    return {
        key: value
        for key, value in values.items()
        if _LOGIT_ATTRIBUTE.search(key)
        and not _ATTENTION_ATTRIBUTE.search(key)
        and not any(value is neutral or value == neutral for neutral in _NEUTRAL)
    }


def _check_weight(weight: Tensor, name: str) -> None:
    if type(weight).__name__ == "DTensor" or hasattr(weight, "placements"):
        raise ValueError(
            f"the head weight of {name} is a DTensor (FSDP2 or tensor parallel), which the op cannot read: gather it "
            'by full_tensor(grad_placements=[Partial("avg")]), call the loss in the forward of the unit that holds it, '
            "or keep the head out of sharding"
        )
    if weight.numel() == 0 or weight.is_meta:
        raise ValueError(
            f"the head weight of {name} is empty (ZeRO-3 partitioning or CPU/disk offload): gather it first "
            "(deepspeed.zero.GatheredParameters), or train without partitioned or offloaded parameters"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"the head weight of {name} is {weight.dtype}: leave the head unquantised (skip 'lm_head')")


@torch.no_grad()
def verify_head(model: nn.Module, rtol: float | None = None) -> None:
    """Compare hidden states and `head_spec` with the model's own logits on four tokens, and two of them alone.

    The rules above read configurations; a model with code of its own (`trust_remote_code`) can do anything. This is
    the check that catches it: three forwards of at most four tokens, in eval mode, restored afterwards.

    Args:
        model: as in `head_kwargs`.
        rtol: allowed max |difference| over max |logit|; default 1e-4 in fp32 and wider, 0.03 in 16 bit.

    Raises:
        ValueError: the logits differ; a token's hidden state depends on the tokens after it.
    """
    spec, base = head_spec(model), unwrap_peft(model)
    with evaluation_mode(base):
        vocabulary = spec.weight.shape[0]
        ids = (torch.arange(1, 5, dtype=torch.int64, device=spec.weight.device) * 7919 % vocabulary)[None]
        expected = base(input_ids=ids, use_cache=False).logits.float()
        hidden = hidden_states(model, ids)
        beginning = hidden_states(model, ids[:, :2])
        logits = nn.functional.linear(hidden.to(spec.weight.dtype), spec.weight, spec.bias).float() * spec.logit_scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
    rtol = rtol if rtol is not None else (1e-4 if spec.weight.element_size() >= 4 else 0.03)
    if expected.shape != logits.shape:
        raise ValueError(
            f"{type(base).__name__} gives logits of shape {tuple(expected.shape)}, its head {tuple(logits.shape)}"
        )
    error = _relative(logits, expected)
    if not error <= rtol:
        raise ValueError(
            f"{type(base).__name__} does something between its head and its logits that is not known here (relative "
            f"difference {error:.1e}, allowed {rtol:.0e}); its loss cannot be fused"
        )
    seen = _relative(beginning.float(), hidden[:, :2].float())
    if not seen <= rtol:
        raise ValueError(
            f"{type(base).__name__} is not causal: the hidden states of two tokens change with the tokens after them "
            f"(relative difference {seen:.1e}, allowed {rtol:.0e}), so that each token would be predicted from itself; "
            "pass a decoder-only model (of some configurations: is_decoder=True)"
        )


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
