"""Tiny models, batches and trainers for the tests of the TRL integration."""

from __future__ import annotations

import copy
from typing import Any

import distill_tiny as tiny
import torch

VOCABULARY = 211  # more than the tokenizer has: top-k leaves a tail
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, eos_token_id=1, pad_token_id=1, bos_token_id=None,
    initializer_range=0.2,
)  # fmt: skip
ABSOLUTE = ("gpt2", "gpt_bigcode")  # learned positions, which count padding unless they are given
HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, factor=4.0, **options))


def model(family: str = "qwen2", seed: int = 0, **overrides: Any) -> Any:
    """Qwen2 (untied head), Phi (bias), Gemma 2 and 3 (tied, softcap), Cohere (tied, logit scale) and more, random."""
    import transformers as hf

    config, cls, extra = {
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, dict(tie_word_embeddings=False)),
        # A cap within reach of the logits, so that leaving it out shows. Gemma 2 has eager attention only, whose fp32
        # softmax makes NaN of left-padded rows in an fp64 model; Gemma 3 has none of that.
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, dict(head_dim=8, final_logit_softcapping=4.0)),
        "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, dict(head_dim=8, final_logit_softcapping=4.0)),
        "phi": (hf.PhiConfig, hf.PhiForCausalLM, dict(tie_word_embeddings=False)),
        "cohere": (hf.CohereConfig, hf.CohereForCausalLM, dict(logit_scale=0.35)),
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)),
        "gpt_bigcode": (
            hf.GPTBigCodeConfig, hf.GPTBigCodeForCausalLM, dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        ),
        "opt": (hf.OPTConfig, hf.OPTForCausalLM, dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
        "bloom": (hf.BloomConfig, hf.BloomForCausalLM, {}),
        "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {}),
        # Of the batches here, sequences are on both sides of their limits.
        "longrope": (hf.Phi3Config, hf.Phi3ForCausalLM, dict(original_max_position_embeddings=10, **_rope(
            "longrope", short_factor=[1.0] * HALF, long_factor=[3.0] * HALF, original_max_position_embeddings=10))),
        "dynamic": (hf.LlamaConfig, hf.LlamaForCausalLM, dict(max_position_embeddings=10, **_rope("dynamic"))),
    }[family]  # fmt: skip
    torch.manual_seed(seed)
    result = cls(config(**(SIZES | extra | overrides)))
    if (bias := result.get_output_embeddings().bias) is not None:
        bias.data = torch.randn(bias.shape)
    return result


def near(student: Any, amount: float = 0.1, seed: int = 7) -> Any:
    """A frozen teacher a little away from the student: every weight times 1 + amount * noise."""
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for parameter in teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.mul_(1 + amount * noise)
    return teacher


def trainer(cls: type, student: Any, teacher: Any, folder: Any, peft_config: Any = None, **options: Any) -> Any:
    """A real trainer around `student`; `teacher` None keeps the trainer's own."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig

    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        teacher_model_kind="live", gradient_checkpointing=False, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=6, max_prompt_length=24, logging_steps=1, distillation_mode="full_logits",
    )  # fmt: skip
    result = cls(
        model=student, args=SDFTConfig(**(defaults | options)), train_dataset=Dataset.from_list(tiny.rows()),
        eval_dataset=Dataset.from_list(tiny.rows(2)), processing_class=tiny.tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    if teacher is not None:
        result.teacher_model = teacher
    result.current_gradient_accumulation_steps = 2  # set by train(), which most tests leave out
    return result


def batch(
    masks: str = "ragged",
    dtype: torch.dtype = torch.float32,
    sequences: int = 3,
    length: int = 9,
    one_prompt: bool = False,
) -> dict:
    """A training batch as `SDFTTrainer` builds it: left-padded prompts, right-padded completions.

    `masks`: "ragged" completions; "row" has one with nothing left after skipping 2 tokens; "none" has no token.
    `one_prompt`: all completions are of the first sequence's prompt, the teacher's of the last one's.
    """
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randint(0, VOCABULARY, shape, generator=generator)  # noqa: E731
    completion_mask = torch.ones(sequences, length, dtype=torch.long)
    completion_mask[1, 6:] = 0
    if masks == "row":
        completion_mask[2, 2:] = 0
    if masks == "none":
        completion_mask[:, 2:] = 0
    prompt_mask = torch.ones(sequences, 5, dtype=torch.long)
    prompt_mask[0, :2] = 0
    teacher_mask = torch.ones(sequences, 8, dtype=torch.long)
    teacher_mask[2, :3] = 0
    completion_ids = draw(sequences, length)
    prompt_ids, teacher_ids = draw(sequences, 5), draw(sequences, 8)
    if one_prompt:
        prompt_ids, prompt_mask = (x[:1].expand(sequences, -1) for x in (prompt_ids, prompt_mask))
        teacher_ids, teacher_mask = (x[-1:].expand(sequences, -1) for x in (teacher_ids, teacher_mask))
    return dict(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids,
        completion_mask=completion_mask,
        teacher_input_ids=torch.cat([teacher_ids, completion_ids], 1),
        teacher_attention_mask=torch.cat([teacher_mask, completion_mask], 1),
        # From far below to far above the student's own: the ratio is small, near one and clipped.
        old_per_token_logps=-4 + 2 * torch.randn(sequences, length, generator=generator, dtype=dtype),
    )  # fmt: skip


def loss_and_gradients(own: Any, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    """The trainer's loss on `inputs`, the gradient of every parameter that has one, and what it logged."""
    own.model.zero_grad()
    for logged in own._metrics.values():
        logged.clear()
    loss = own.compute_loss(own.model, inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in own.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: list(values) for name, values in own._metrics["train"].items()}
