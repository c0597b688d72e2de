"""The demo's training run: `SDFTTrainer` with a progress bar and the numbers of every step kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.demo.scoring import MAX_ANSWER_TOKENS, Row
from sdft_kernels.distill import SDFTConfig, SDFTTrainer


@dataclass(frozen=True)
class Settings:
    """What the training run is made with; the defaults are the demo's.

    Attributes:
        template: how the teacher sees the demonstration.
        epochs: passes over the admitted tasks.
        batch_size: prompts per optimizer step, one sampled completion each.
        learning_rate: of AdamW, constant.
        skip_first_tokens: completion tokens left out of the loss. 0 here: a tool call is decided in its first tokens.
        seed: of the data order and of the sampling.
    """

    template: str = "turn"
    epochs: int = 2
    batch_size: int = 10
    learning_rate: float = 3e-5
    skip_first_tokens: int = 0
    seed: int = 0


class TrainingBar(TrainerCallback):
    """One bar over the optimizer steps, with the last step's KL beside it."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step", leave=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "kl_teacher_student" in logs:
            self.bar.set_postfix_str(f"KL {logs['kl_teacher_student']:.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Row],
    settings: Settings,
    output: Path,
) -> list[dict[str, float]]:
    """Train `model` in place by SDFT with a frozen copy of itself as the teacher, forward KL, one rollout per prompt.

    Returns:
        Per optimizer step what `SDFTTrainer` logs: `kl_teacher_student`, `student_entropy`, `teacher_entropy`,
        `num_loss_tokens`, … (nats, means over the tokens of the step).
    """
    config = SDFTConfig(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=min(settings.batch_size, len(tasks)),
        # AdamW steps by the learning rate whatever the batch: a last batch of one task would weigh as much as ten.
        dataloader_drop_last=True,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        seed=settings.seed,
        teacher_model_kind="frozen",
        teacher_prompt_template=settings.template,
        num_loss_tokens_to_skip=settings.skip_first_tokens,
        max_completion_length=MAX_ANSWER_TOKENS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),  # without a GPU, torch warns about it
    )
    trainer = SDFTTrainer(
        model, config, train_dataset=list(tasks), processing_class=tokenizer, callbacks=[TrainingBar()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "kl_teacher_student" in entry]
