"""`SDFTConfig`: transformers' TrainingArguments and what self-distillation adds, under TRL's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from sdft_kernels.distill.distiller import check_options
from sdft_kernels.distill.rollouts import check_kind
from sdft_kernels.distill.teacher import KINDS, LATER_KINDS
from sdft_kernels.distill.templates import resolve_template


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SDFTConfig(TrainingArguments):
    """Arguments of `SDFTTrainer`. Names are TRL's where TRL has one; defaults are those of the released SDFT code.

    `per_device_train_batch_size` counts prompts; each has `num_generations` completions (TRL counts completions).

    Raises:
        ValueError: a value out of range, an unknown teacher, rollouts or template.
        NotImplementedError: a feature of TRL's trainer or of a later version, by name.
    """

    learning_rate: float = _option(2e-5, "Initial learning rate.")
    logging_steps: float = _option(1, "Log every so many optimizer steps.")
    remove_unused_columns: bool | None = _option(
        False, "Must stay False: the model's forward names none of the columns."
    )
    model_init_kwargs: dict[str, Any] | None = _option(
        None, "Keyword arguments of from_pretrained where the model is given as a string. dtype: float32 if left out."
    )
    disable_dropout: bool = _option(True, "Switch dropout off in student and teacher.")
    max_prompt_length: int | None = _option(None, "A longer student prompt is an error; nothing is truncated.")
    num_generations: int = _option(1, "Completions per prompt.")
    max_completion_length: int = _option(256, "Tokens of a sampled completion at most.")
    generation_batch_size: int | None = _option(
        None, "Completions generated at once. None: all of an optimizer step's on this device."
    )
    temperature: float = _option(1.0, "Of sampling, and of both distributions in the loss.")
    top_p: float = _option(1.0, "Nucleus of the sampling; 1 is the whole distribution.")
    top_k: int = _option(0, "Tokens the sampling chooses from; 0 is all.")
    generation_kwargs: dict[str, Any] | None = _option(
        None, "Further arguments of generate; nothing of the model's generation_config applies but its end tokens."
    )
    chat_template_kwargs: dict[str, Any] | None = _option(None, "Arguments of apply_chat_template.")
    rollouts: str = _option("student", "Where completions come from: student, teacher, dataset or given.")
    loss: Literal["kl", "ce"] = _option("kl", "kl, or ce: cross-entropy on the completions without a teacher.")
    teacher_model_kind: str | None = _option(
        None,
        "frozen (the student at the start), base (under PEFT: adapters off), live or ema. None: frozen under LoRA, "
        "else ema.",
    )
    teacher_update_rate: float = _option(0.01, "Share of the student in every EMA update.")
    teacher_device: str | None = _option(None, "Where the EMA state lives ('cpu'). None: beside the parameters.")
    teacher_dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "Of the EMA state: float32, or bfloat16 for a compensated pair, smaller where the model is bf16."
    )
    teacher_prompt_template: str = _option(
        "turn", "turn, paper, trl, or a string with {prompt} and {privileged_context}."
    )
    distillation_alpha: float = _option(0.0, "0: KL(teacher||student); 1: KL(student||teacher); between: JSD.")
    distillation_mode: str = _option("full_logits", "Only full_logits (the whole vocabulary, without logits).")
    distillation_is_clip: float | None = _option(None, "Upper limit of the per-token importance ratio; None: no ratio.")
    num_loss_tokens_to_skip: int = _option(
        3, "Completion tokens left out of the loss at its start; a completion of no more than that adds nothing to it."
    )
    loss_memory_budget: int | None = _option(None, "Bytes the fused loss may use; None: the op's default.")
    forward_token_budget: int = _option(8192, "Padded tokens per forward pass of the backbone.")
    share_prefix: bool | None = _option(
        None,
        "Compute what completions have in common once, also while they are sampled. None: where the model allows it; "
        "true: or raise; false: separately.",
    )
    prefix_cache_bytes: int | None = _option(
        None, "Of the teacher prompts' keys and values, kept over epochs. None: 1 GiB for a frozen teacher, else 0."
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs",
                          "chat_template_kwargs"]  # fmt: skip

    def __post_init__(self) -> None:
        if self.fp16:
            raise ValueError("fp16=True is not supported (its range ends at 65504): use bf16=True, or neither for fp32")
        if self.fp16_full_eval or self.bf16_full_eval:
            raise ValueError(
                "fp16_full_eval and bf16_full_eval cast the student for good, under a teacher made for its dtype: use "
                "bf16=True, which evaluates under autocast"
            )
        super().__post_init__()
        check_kind(self.rollouts)
        resolve_template(self.teacher_prompt_template)
        kind = self.teacher_model_kind
        if kind in LATER_KINDS:
            raise NotImplementedError(f"teacher_model_kind={kind!r} is not supported yet; use one of {KINDS}")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"teacher_model_kind must be one of {KINDS} or None, got {self.teacher_model_kind!r}")
        if self.teacher_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"teacher_dtype must be 'float32' or 'bfloat16', got {self.teacher_dtype!r}")
        if self.distillation_mode != "full_logits":
            raise NotImplementedError(
                f"distillation_mode={self.distillation_mode!r} is not supported yet; 'full_logits' distills the whole "
                "vocabulary"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: it would drop prompt and privileged_context")
        for name in ("num_generations", "max_completion_length", "forward_token_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_options(
            alpha=self.distillation_alpha,
            temperature=self.temperature,
            skip_first_tokens=self.num_loss_tokens_to_skip,
            importance_clip=self.distillation_is_clip,
            loss=self.loss,
        )
