"""`SDFTTrainer`: transformers' Trainer with rollouts and the self-distillation loss.

Checkpoints, resume, logging, schedules, callbacks and mixed precision are the Trainer's. Completions depend on the
seed, the step and the process alone, so a resumed run samples what an uninterrupted one would have.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from sdft_kernels.distill.batch import DistillBatch
from sdft_kernels.distill.config import SDFTConfig
from sdft_kernels.distill.data import PromptEncoder, check_columns
from sdft_kernels.distill.distiller import DistillOutput, SelfDistiller
from sdft_kernels.distill.loading import load_model, load_tokenizer
from sdft_kernels.distill.rollouts import (
    Completions,
    RolloutFunction,
    call_rollouts,
    check_kind,
    generate_completions,
    stop_token_ids,
)
from sdft_kernels.distill.running import RunningMetrics
from sdft_kernels.models import context_length, verify_head
from sdft_kernels.models.dropout import disable_dropout
from sdft_kernels.models.unsupported import refuse_unsupported

TEACHER_FILE = "teacher.safetensors"
Rows = list[dict[str, Any]]


class SDFTTrainer(Trainer):
    """Self-distillation fine-tuning (arXiv 2601.19897) of a causal language model.

    Args:
        model: a transformers model, a PEFT model (LoRA on the backbone), or a name or folder to load: in fp32, unless
            `args.model_init_kwargs` has a `dtype`.
        args: an `SDFTConfig`.
        train_dataset, eval_dataset: anything with `__len__` and `__getitem__` giving rows with the columns `prompt` (a
            string or chat messages ending in a user turn) and `privileged_context` (the demonstration: a string or
            chat messages). `rollouts="dataset"` takes the completion from a column `completion` where there is one,
            else from the demonstration; `rollouts="given"` needs `completion_ids` (R token-id lists) and uses
            `sampling_logprobs` of the rows that have it.
        processing_class: the tokenizer; None loads it from the model's folder.
        rollouts: a callable (prompts, n) -> completions[, sampling log-probabilities] in place of `args.rollouts`.
        teacher: a model or `Teacher` in place of `args.teacher_model_kind`.
        peft_config: wraps the model with PEFT.
        callbacks, optimizers: as in Trainer.

    Every log has the metrics of a batch (`SelfDistiller`) over all tokens of all processes since the last one: means,
    counts, the effective sample size, and quantiles to 0.5 %; then lengths of completions, and how many of them have no
    token in the loss (`completions/skipped_ratio`). What there is no token for is left out. Evaluation gives the same
    on completions of the held-out prompts, each row once, `eval_loss`, the mean over completions, and
    `eval_expert_logprob`, the student's mean log-probability per token of the expert's completion.

    Raises:
        ValueError: a missing column; no tokenizer; `even_batches=False` or `dispatch_batches` with several
            processes; whatever `SelfDistiller` refuses.
        NotImplementedError: FSDP and DeepSpeed; a model that is sharded already.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SDFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        rollouts: RolloutFunction | None = None,
        teacher: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.rollouts = rollouts if rollouts is not None else args.rollouts
        check_kind(self.rollouts)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            _check_dataset(dataset, extra=("completion_ids",) if self.rollouts == "given" else ())
        if isinstance(teacher, nn.Module):
            refuse_unsupported(teacher, "teacher")
        model, processing_class = _load(model, processing_class, args, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_processes()
        self.args._n_gpu = min(self.args.n_gpu, 1)  # several visible GPUs: DDP by launcher, never DataParallel
        self.model_accepts_loss_kwargs = True  # transformers before 5.20 reads this in place of loss_is_scaled_for_ga
        sampled = callable(self.rollouts) or self.rollouts in ("student", "teacher")
        self.encoder = PromptEncoder(
            tokenizer=processing_class,
            template=args.teacher_prompt_template,
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=args.max_prompt_length,
            context_length=context_length(model),
            completion_reserve=args.max_completion_length if sampled else 0,
        )
        self.distiller = SelfDistiller(
            model,
            teacher if teacher is not None else ("live" if args.loss == "ce" else args.teacher_model_kind),
            ema_rate=args.teacher_update_rate,
            ema_device=args.teacher_device,
            ema_dtype=getattr(torch, args.teacher_dtype),
            alpha=args.distillation_alpha,
            temperature=args.temperature,
            skip_first_tokens=args.num_loss_tokens_to_skip,
            importance_clip=args.distillation_is_clip,
            loss=args.loss,
            memory_budget=args.loss_memory_budget,
            token_budget=args.forward_token_budget,
            share_prefix=args.share_prefix,
            prefix_cache=args.prefix_cache_bytes,
            verify=False,
        )
        # One completion a prompt: nothing to share.
        self._expert = SelfDistiller(model, "live", skip_first_tokens=0, loss="ce", share_prefix=False, verify=False)
        self._running = {"train": RunningMetrics(), "eval": RunningMetrics()}
        self._eval_batches = 0
        self._eval_rows: int | None = None

    def _check_processes(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError("SDFTTrainer does not run under FSDP or DeepSpeed yet; use one device, or DDP")
        if self.args.world_size > 1 and (self.accelerator.dispatch_batches or not self.accelerator.even_batches):
            raise ValueError(
                "accelerator_config needs even_batches=True and no dispatch_batches, got even_batches="
                f"{self.accelerator.even_batches}, dispatch_batches={self.accelerator.dispatch_batches}: a process "
                "with fewer batches leaves the others waiting for ever (rows repeated at the end of an evaluation do "
                "not count), and one process cannot hand text to the others"
            )

    # Rollouts and batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[DistillBatch], int]:
        """The micro-batches of one optimizer step, sampled together, and the completions in them over all processes."""
        micro_batches = list(itertools.islice(epoch_iterator, num_batches))
        batches = self._batches(micro_batches, self._seed(self.state.global_step))
        count = torch.tensor(sum(map(len, batches)), dtype=torch.int64, device=device)
        return batches, int(self.accelerator.gather(count).sum())

    def _batches(self, micro_batches: list[Rows], seed: int) -> list[DistillBatch]:
        rows = [row for micro_batch in micro_batches for row in micro_batch]
        for row in rows:
            check_columns(row)
        student = self.encoder.student(rows)
        teacher = self.encoder.teacher(rows) if self.args.loss == "kl" or self.rollouts == "teacher" else None
        completions, logprobs = self._completions(rows, student, teacher, seed)
        batches, start = [], 0
        for micro_batch in micro_batches:
            part = slice(start, start + len(micro_batch))
            start = part.stop
            given = None if logprobs is None or all(row is None for row in logprobs[part]) else logprobs[part]
            batches.append(
                DistillBatch(
                    student[part],
                    teacher[part] if teacher is not None else None,
                    completions[part],
                    sampling_logprobs=given,
                )
            )
        return batches

    def _completions(
        self, rows: Rows, student: list[list[int]], teacher: list[list[int]] | None, seed: int
    ) -> tuple[Completions, list[Any] | None]:
        if callable(self.rollouts):
            return call_rollouts(self.rollouts, student, self.args.num_generations)
        if self.rollouts == "dataset":
            return [[completion] for completion in self.encoder.expert(rows)], None
        if self.rollouts == "given":
            return [row["completion_ids"] for row in rows], [row.get("sampling_logprobs") for row in rows]
        if self.rollouts == "teacher" and teacher is not None:
            with self.distiller.teacher.active() as model:
                return self._generate(model, teacher, seed), None
        return self._generate(self.model, student, seed), None

    def _generate(self, model: nn.Module, prompts: list[list[int]], seed: int) -> Completions:
        args = self.args
        return generate_completions(
            model,
            prompts,
            args.num_generations,
            max_completion_length=args.max_completion_length,
            eos_token_ids=stop_token_ids(model, self.processing_class),
            temperature=args.temperature,
            seed=seed,
            batch_size=args.generation_batch_size,
            generation_kwargs={"top_p": args.top_p, "top_k": args.top_k, **(args.generation_kwargs or {})},
            share_prefill=args.share_prefix is not False,
        )

    def _seed(self, step: int, evaluation: bool = False) -> int:
        entropy = [self.args.seed, step, self.args.process_index, int(evaluation)]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    # Loss

    def _prepare_inputs(self, inputs: DistillBatch) -> DistillBatch:
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: DistillBatch,
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The distillation loss; normalised over the completions of the whole optimizer step."""
        with self.accelerator.autocast():
            out = self._distill(model, inputs, num_items_in_batch)
        mode = "train" if model.training else "eval"
        limit = self.args.max_completion_length
        self._running[mode].add(out, inputs, limit)
        # DDP averages gradients over processes, while the loss is already divided by the completions of all of them.
        loss = out.loss * self.accelerator.num_processes if num_items_in_batch is not None else out.loss
        return (loss, out) if return_outputs else loss

    def _distill(self, model: nn.Module, batch: DistillBatch, num_completions: int | None) -> DistillOutput:
        """Run the distiller, under DDP from inside the wrapper's forward so that gradients are synchronised."""
        inner = self.accelerator.unwrap_model(model)
        if inner is model or not model.training:
            return self.distiller(batch, num_completions)
        own = inner.__dict__.get("forward")
        inner.forward = lambda: self.distiller(batch, num_completions)
        try:
            return model()
        finally:
            if own is None:
                del inner.forward
            else:
                inner.forward = own

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the teacher attached to it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.distiller.attach(optimizer)
        return optimizer

    def floating_point_ops(self, inputs: DistillBatch) -> int:
        """6 FLOP per student parameter and token, 2 per teacher parameter and token (rollouts not counted)."""
        flat = inputs.flatten()
        student = sum(map(len, flat.student_prompts)) + sum(flat.lengths)
        teacher = 0 if flat.teacher_prompts is None else sum(map(len, flat.teacher_prompts)) + sum(flat.lengths)
        return (6 * student + 2 * teacher) * sum(p.numel() for p in self.model.parameters())

    def _track_num_input_tokens(self, inputs: DistillBatch) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = sum(map(len, inputs.flatten().student_prompts)) + sum(inputs.flatten().lengths)
            count = torch.tensor(tokens, dtype=torch.int64, device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum())

    # Evaluation and logging

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Rows,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss on completions of held-out prompts, sampled with the same seed at every evaluation."""
        seed = self._seed(self._eval_batches, evaluation=True)
        rows = self._without_repeated(inputs)
        self._eval_batches += 1
        if not rows:
            return torch.zeros((), device=self.args.device, dtype=torch.float32), None, None
        [batch] = self._batches([rows], seed)
        running = self._running["eval"]
        with torch.no_grad():
            loss = self.compute_loss(model, batch)
            experts = DistillBatch(batch.student_prompts, None, [[ids] for ids in self.encoder.expert(rows)])
            with self.accelerator.autocast():
                metrics = self._expert(experts).metrics
        running.accumulate("loss", loss, len(batch))
        running.accumulate("expert_logprob", metrics["student_logprob"], metrics["tokens"])
        return loss.detach(), None, None

    def _without_repeated(self, rows: Rows) -> Rows:
        """Without the rows that are here again only so that every process has as many, all of them at the data's end.

        Batches of equal size go around the processes in turn, so a batch's first row has a known place in the data.
        """
        if self.args.world_size == 1 or self._eval_rows is None:
            return rows
        place = (self._eval_batches * self.args.world_size + self.args.process_index) * len(rows)
        return rows[: max(self._eval_rows - place, 0)]

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The Trainer's loop, with the distillation metrics added to its own."""
        self._eval_batches = 0
        self._eval_rows = len(dataloader.dataset) if hasattr(dataloader.dataset, "__len__") else None
        self._running["eval"].clear()  # of an evaluation that did not come to its end
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._running["eval"].pop(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the metrics since the last call beside the Trainer's training loss, which every process logs."""
        if {"loss", "learning_rate"} <= logs.keys():
            logs = {**logs, **self._running["train"].pop(self.accelerator)}
            if self.distiller.teacher.kind == "ema":
                logs["teacher_distance"] = self.distiller.teacher.distance().item()
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; True resumes from the last *complete* checkpoint, whatever a kill left half-written."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # Before trainer_state.json, which marks a checkpoint as complete.
        super()._save_rng_state(output_dir)
        state = self.distiller.state_dict()
        if state and self.args.should_save:
            from safetensors.torch import save_file

            save_file({k: v.contiguous() for k, v in state.items()}, os.path.join(output_dir, TEACHER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, TEACHER_FILE)
        if not os.path.isfile(path):
            if self.distiller.state_dict():
                raise ValueError(
                    f"{checkpoint} has no {TEACHER_FILE}: its teacher was another one, or the base under a fresh "
                    "adapter; resume with the teacher and the model the run started from (or teacher_model_kind='base')"
                )
            return
        from safetensors.torch import load_file

        self.distiller.load_state_dict(load_file(path))


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint folder whose trainer state, the file written last, is whole; None if there is none."""
    if not os.path.isdir(output_dir):
        return None
    steps = []
    for name in os.listdir(output_dir):
        prefix, _, number = name.rpartition("-")
        if prefix == PREFIX_CHECKPOINT_DIR and number.isdigit():
            steps.append(int(number))
    for step in sorted(steps, reverse=True):
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return folder
    return None


def _check_dataset(dataset: Any, extra: Sequence[str]) -> None:
    if dataset is None:
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"a dataset must have a length and rows by index, got {type(dataset).__name__}")
    if len(dataset):
        check_columns(dataset[0], extra=extra)


def _load(model: Any, tokenizer: Any, args: SDFTConfig, peft_config: Any) -> tuple[Any, Any]:
    set_seed(args.seed)  # LoRA weights are drawn here
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if tokenizer is None:
        tokenizer = load_tokenizer(name, "pass the model's tokenizer as processing_class")
    if isinstance(model, str):
        model = load_model(model, args.model_init_kwargs)
    refuse_unsupported(model, "student")
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    verify_head(model)  # before the Trainer makes a folder
    if args.disable_dropout:
        disable_dropout(model)
    return model, tokenizer
