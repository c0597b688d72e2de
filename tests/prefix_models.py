"""Tiny random models of the supported families, and batches whose prompts and completions share prefixes."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 61
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "mistral", "phi3", "gpt_oss")
WINDOWED = ("qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt_oss")
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=12)


def tiny(family: str, window: int = 4, **overrides: Any) -> Any:
    """A model of two or three layers, in eval mode. Weights are wide, so that a wrong key shows in the logits."""
    import transformers as t

    half = dict(sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    extra: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {}),
        "qwen2": ("Qwen2", half | dict(use_sliding_window=True)),
        "qwen3": ("Qwen3", half | dict(use_sliding_window=True, head_dim=16)),
        "qwen3_moe": ("Qwen3Moe", MOE | dict(head_dim=16, num_experts=4)),
        "gemma2": ("Gemma2", half | dict(head_dim=16, query_pre_attn_scalar=11, attn_logit_softcapping=3.0)),
        "gemma3": ("Gemma3Text", half | dict(head_dim=16, query_pre_attn_scalar=11)),
        "mistral": ("Mistral", dict(sliding_window=window)),
        "phi3": ("Phi3", dict(sliding_window=window, pad_token_id=0)),
        "gpt_oss": ("GptOss", half | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
    }
    name, options = extra[family]
    base = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, attention_dropout=0.0,
    )  # fmt: skip
    config = getattr(t, f"{name}Config")(**(base | options | overrides))
    torch.manual_seed(1)
    model = getattr(t, f"{name.removesuffix('Text')}ForCausalLM")(config)
    if family == "gemma2":  # before 5.24 transformers defaults to sdpa, which ignores the softcap
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():  # norms and sinks start at constants that hide mistakes
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


Batch = tuple[list[list[int]], list[list[list[int]]]]


def batch(kind: str) -> Batch:
    """Prompts and completions: trees of depth 1 to 3, 1 to 8 completions, some of length 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    prompt = draw(9)
    if kind == "one":
        return [prompt], [[draw(7)]]
    if kind == "two":
        return [prompt], [[draw(7), draw(5)]]
    if kind == "eight":
        return [prompt], [[draw(n) for n in (7, 0, 1, 5, 2, 1, 6, 3)]]
    if kind == "prompts":  # depth 2: what two prompts share, and one that shares nothing
        return [prompt + draw(3), prompt + draw(4), draw(1)], [[draw(6), draw(1)], [draw(2), []], [draw(5)]]
    if kind == "deep":  # depth 3: shared document, prompt, beginning of the completions; one ends inside another
        opening = draw(5)
        group = [opening + draw(4), opening + draw(2), opening[:3], opening]
        return [prompt + draw(2), prompt + draw(5)], [group, [opening + draw(1)]]
    raise ValueError(kind)


BATCHES = ("one", "two", "eight", "prompts", "deep")


def sequences(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[int]]:
    """Prompt and completion of each, one after the other."""
    return [p + c for p, group in zip(prompts, completions, strict=True) for c in group]
