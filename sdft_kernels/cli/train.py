"""``sdft-kernels train``: self-distillation fine-tuning of a model folder on a JSONL file of demonstrations."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HELP = "Fine-tune a model on demonstrations by self-distillation."

DESCRIPTION = """Self-distillation fine-tuning (SDFT, arXiv 2601.19897): the student answers the plain prompt; the
teacher is the same model shown the prompt and a demonstration; at every token of the answer the teacher's
distribution is distilled into the student.

DATA is JSONL with the columns "prompt" (a string, or chat messages ending in a user turn) and
"privileged_context" (the demonstration: a string or chat messages).

OUTPUT gets the model and tokenizer (load them with from_pretrained), metrics.jsonl with one line per step, and
checkpoint-N folders. A run killed at any moment continues with --resume, to the same numbers."""

EXAMPLES = """examples:
  sdft-kernels train --model ./SmolLM2-135M-Instruct --data demos.jsonl --output out
  sdft-kernels train --model ./model --data demos.jsonl --output out --resume
  sdft-kernels train --model ./model --data demos.jsonl --output out --lora-r 16 --teacher frozen
  sdft-kernels train --model ./model --data demos.jsonl --output sft --rollouts dataset --loss ce
  sdft-kernels train --model ./model --data demos.jsonl --output out --preview

exit status: 0 trained · 1 bad data or a failed run · 2 wrong usage"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train`` to `parser`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add = parser.add_argument
    add("--model", required=True, help="folder or name of a transformers causal language model")
    add("--data", required=True, type=Path, help="JSONL file of demonstrations")
    add("--output", required=True, type=Path, help="folder for the model, metrics and checkpoints")
    add("--eval-data", type=Path, help="JSONL file of held-out demonstrations, evaluated after every epoch")
    add("--resume", action="store_true", help="continue from the last complete checkpoint in OUTPUT")
    add("--preview", action="store_true", help="print the prompts of the first row and stop; nothing is trained")
    _add_method(parser.add_argument_group("method"))
    _add_optimisation(parser.add_argument_group("optimisation"))


def _add_method(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--teacher", default=None, help="frozen, base, live or ema (default: frozen with --lora-r, else ema)")
    add("--ema-rate", type=float, default=0.01, help="share of the student in every EMA update (%(default)s)")
    add("--ema-device", default=None, help="where the EMA state lives, e.g. cpu (default: beside the parameters)")
    add("--ema-dtype", default="float32", choices=("float32", "bfloat16"), help="of the EMA state (bfloat16: a pair)")
    add("--rollouts", default="student", choices=("student", "teacher", "dataset", "given"), help="completions")
    add("--loss", default="kl", choices=("kl", "ce"), help="divergence to the teacher, or cross-entropy")
    add("--alpha", type=float, default=0.0, help="0: KL(teacher||student), 1: KL(student||teacher), else JSD")
    add("--template", default="turn", help="turn, paper, trl, or a string with {prompt} and {privileged_context}")
    add("--chat-template-kwargs", type=_json_object, help="JSON object for the chat template")
    add("--skip-first-tokens", type=int, default=3, help="first completion tokens, not in the loss (%(default)s)")
    add("--num-generations", type=int, default=1, help="completions per prompt (%(default)s)")
    add("--max-completion-length", type=int, default=256, help="tokens at most (%(default)s)")
    add("--max-prompt-length", type=int, help="a longer prompt is an error; nothing is truncated")
    add("--temperature", type=float, default=1.0, help="of sampling and of the loss (%(default)s)")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=float, default=1.0, help="passes over the data (%(default)s)")
    add("--max-steps", type=int, default=-1, help="optimizer steps; overrides --epochs")
    add("--learning-rate", type=float, default=2e-5, help="peak learning rate (%(default)s)")
    add("--lr-scheduler", default="cosine", help="transformers' name of a schedule (%(default)s)")
    add("--warmup-steps", type=float, default=0, help="steps, or below 1 a share of them (%(default)s)")
    add("--batch-size", type=int, default=8, help="prompts per forward and backward pass (%(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="such passes per optimizer step (%(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    add("--lora-r", type=int, default=0, help="rank of LoRA on every linear layer of the backbone (0: train all)")
    add("--lora-alpha", type=float, help="LoRA scale (default: twice the rank)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights (%(default)s)")
    add("--bf16", action="store_true", help="bf16 autocast over the weights' dtype")
    add("--cpu", action="store_true", help="do not use an accelerator")
    add("--save-steps", type=int, help="steps between checkpoints (default: one per epoch)")
    add("--seed", type=int, default=0, help="of data order, sampling and LoRA weights (%(default)s)")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status.

    Raises:
        ValueError: data, options or a model that cannot be used; nothing has been written then.
    """
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from sdft_kernels.cli._train_files import MetricsFile, read_rows
    from sdft_kernels.distill import SDFTTrainer, preview
    from sdft_kernels.distill.loading import load_model, load_tokenizer
    from sdft_kernels.distill.trainer import last_complete_checkpoint

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of every file it writes
    extra = ("completion_ids",) if args.rollouts == "given" else ()
    rows = read_rows(args.data, extra)
    held_out = read_rows(args.eval_data, extra) if args.eval_data else None
    config = _config(args)
    checkpoint = _checkpoint(args, last_complete_checkpoint)
    tokenizer = load_tokenizer(args.model, "--model needs the tokenizer's files beside the model's")
    if args.preview:
        row = rows[0]
        preview(
            tokenizer, row["prompt"], row["privileged_context"], template=args.template,
            skip_first_tokens=args.skip_first_tokens, chat_template_kwargs=args.chat_template_kwargs,
        )  # fmt: skip
        return 0
    _check_lengths(args, tokenizer, rows, held_out)
    trainer = SDFTTrainer(
        load_model(args.model, {"dtype": args.dtype}),
        config,
        rows,
        held_out,
        tokenizer,
        peft_config=_lora(args),
    )
    teacher = trainer.distiller.teacher
    print(f"teacher: {teacher.kind}, {teacher.nbytes / 2**20:.1f} MiB beyond the student", file=sys.stderr)
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl and the progress bar in its place
    metrics = MetricsFile(args.output / "metrics.jsonl", resumed_step=_step_of(checkpoint))
    trainer.add_callback(metrics.callback())
    trainer.train(checkpoint)
    trainer.save_model(str(args.output))
    print(f"{trainer.state.global_step} steps; model and metrics.jsonl in {args.output}", file=sys.stderr)
    return 0


def _config(args: argparse.Namespace) -> Any:
    from sdft_kernels.distill import SDFTConfig

    # Named only when asked for: transformers 5.24 warns at the name and will call it activation_checkpointing.
    memory: dict[str, Any] = {"gradient_checkpointing": True} if args.gradient_checkpointing else {}
    return SDFTConfig(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler,
        warmup_steps=args.warmup_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        eval_strategy="epoch" if args.eval_data else "no",
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        save_total_limit=2,
        bf16=args.bf16,
        use_cpu=args.cpu,
        seed=args.seed,
        report_to=[],
        disable_tqdm=True,
        teacher_model_kind=args.teacher,
        teacher_update_rate=args.ema_rate,
        teacher_device=args.ema_device,
        teacher_dtype=args.ema_dtype,
        rollouts=args.rollouts,
        loss=args.loss,
        distillation_alpha=args.alpha,
        teacher_prompt_template=args.template,
        chat_template_kwargs=args.chat_template_kwargs,
        num_loss_tokens_to_skip=args.skip_first_tokens,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        max_prompt_length=args.max_prompt_length,
        temperature=args.temperature,
        **memory,
    )


def _checkpoint(args: argparse.Namespace, find: Any) -> str | None:
    """The checkpoint to resume from, or None for a new run; refuses to mix two runs in one folder."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file")
    checkpoint = find(str(args.output))
    if args.resume:
        where = "no complete checkpoint: starting from the beginning"
        print(
            f"resuming in {args.output} from {os.path.basename(checkpoint) if checkpoint else where}", file=sys.stderr
        )
        return checkpoint
    if not args.preview and any(args.output.glob("checkpoint-*")):
        raise ValueError(f"{args.output} already holds checkpoints: pass --resume, or another --output")
    return None


def _step_of(checkpoint: str | None) -> int:
    return int(os.path.basename(checkpoint).rpartition("-")[2]) if checkpoint else 0


def _check_lengths(
    args: argparse.Namespace, tokenizer: Any, rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None
) -> None:
    """Every prompt against the model's context, before anything is written or a model is loaded."""
    from transformers import AutoConfig

    from sdft_kernels.cli._progress import Progress
    from sdft_kernels.distill.data import PromptEncoder

    config = AutoConfig.from_pretrained(args.model)
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        template=args.template,
        chat_template_kwargs=args.chat_template_kwargs,
        max_prompt_length=args.max_prompt_length,
        context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        completion_reserve=args.max_completion_length if args.rollouts in ("student", "teacher") else 0,
    )
    everything = [(args.data, row) for row in rows] + [(args.eval_data, row) for row in held_out or []]
    with Progress(len(everything), "checking prompts") as progress:
        for path, row in everything:
            name = [f"{path}, line {row['line']}"]
            encoder.student([row], name)
            encoder.teacher([row], name)
            progress.step("")


def _lora(args: argparse.Namespace) -> Any:
    if not args.lora_r:
        return None
    from peft import LoraConfig

    alpha = 2 * args.lora_r if args.lora_alpha is None else args.lora_alpha
    return LoraConfig(r=args.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
