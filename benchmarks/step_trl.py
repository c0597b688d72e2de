"""``python -m benchmarks.step_trl``: one SDFT step of SmolLM2-135M-Instruct beside TRL's `SDFTTrainer`.

A step: 8 completions of 64 tokens are sampled for one prompt of 541 tokens, student and frozen teacher (with the
demonstration) run over them, full-vocabulary KL(teacher || student), backward, AdamW. Both trainers get the model in
fp32 and TRL's default template. A step is timed from the end of the one before to its own end, so whatever either
trainer does in between counts. Each trainer, with and without activation checkpointing, runs in processes of its own,
in turns; the first step of a process is a warm-up. The peak is the whole process's resident set. In a further process
both losses are computed from one batch that TRL prepared: they must agree to 1e-4.

The prompt is written from this project's demonstration tasks; ``--data FILE --row N`` takes another (columns `prompt`,
`privileged_context`). The committed table is `benchmarks/data/step_trl.csv`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Trainer, and whether it checkpoints activations; ratios are to the first.
ROLES = {
    "trl": ("trl", False),
    "sdft": ("sdft", False),
    "trl_checkpointed": ("trl", True),
    "sdft_checkpointed": ("sdft", True),
}
COLUMNS = (
    "trainer", "activation_checkpointing", "step_s", "steps", "peak_mib", "step_over_trl", "peak_over_trl",
    "loss_difference", "prompt_tokens", "teacher_prompt_tokens", "completions", "completion_tokens", "threads",
    "device", "torch_version", "transformers_version", "trl_version", "commit",
)  # fmt: skip
LOSS_TOLERANCE = 1e-4


def demonstration_row(tokenizer: Any, tokens: int) -> dict[str, Any]:
    """A task of the demo whose prompt is filled up with other tools' signatures and requests to `tokens` tokens."""
    from benchmarks.demo.make_tasks import make_rows

    rows = make_rows("train")
    request = rows[0]["prompt"][-1]["content"]
    lines: list[str] = []
    for row in rows[1:]:
        text = "\n".join(["You have these tools, with a request for each:", *lines, request])
        prompt = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        if len(ids["input_ids"]) >= tokens:
            break
        lines.append(row["prompt"][-1]["content"])
    return {"prompt": prompt, "privileged_context": rows[0]["privileged_context"]}


def read_row(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    if args.data is None:
        return demonstration_row(tokenizer, args.prompt_tokens)
    with args.data.open(encoding="utf-8") as file:
        row = [json.loads(line) for line in file][args.row]
    return {name: row[name] for name in ("prompt", "privileged_context")}


def _clock(times: list[float]) -> Any:
    """A callback that notes when steps end: some trainers sample before the step begins, some after."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    return Clock()


def _common(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both trainers get: one template, TRL's default, as the string that both take."""
    from sdft_kernels.distill.templates import TRL_FORMAT

    return dict(
        output_dir=folder, distillation_alpha=0.0, num_generations=args.completions, max_steps=args.steps,
        max_completion_length=args.completion_tokens, generation_kwargs={"min_new_tokens": args.completion_tokens},
        gradient_accumulation_steps=1, learning_rate=1e-5, report_to=[], use_cpu=True, bf16=False, fp16=False,
        save_strategy="no", distillation_is_clip=None, disable_tqdm=True, logging_steps=1,
        gradient_checkpointing=args.checkpointing, teacher_model_kind="base", num_loss_tokens_to_skip=0,
        teacher_prompt_template=TRL_FORMAT,
    )  # fmt: skip


def trl_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, row: dict[str, Any], folder: str) -> Any:
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    config = SDFTConfig(
        **_common(args, folder), distillation_mode="full_logits", per_device_train_batch_size=args.completions,
        max_prompt_length=4096,
    )  # fmt: skip
    rows = Dataset.from_list([row] * 16)
    return SDFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def sdft_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, row: dict[str, Any], folder: str) -> Any:
    from sdft_kernels import SDFTConfig, SDFTTrainer

    config = SDFTConfig(**_common(args, folder), per_device_train_batch_size=1)
    return SDFTTrainer(model, config, [row] * 16, processing_class=tokenizer)


def run_steps(args: argparse.Namespace, role: str) -> dict[str, Any]:
    """Train `args.steps` steps; times and the peak of this process."""
    from benchmarks.demo.model import ensure_model, load_model
    from sdft_kernels.cli._bench.worker import peak_resident_bytes

    model, tokenizer = load_model(ensure_model())
    row, times = read_row(args, tokenizer), list[float]()
    kind, args.checkpointing = ROLES[role]
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"trl": trl_trainer, "sdft": sdft_trainer}[kind](args, model, tokenizer, row, folder)
        trainer.add_callback(_clock(times))
        trainer.train()
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes()}


def compare_losses(args: argparse.Namespace) -> dict[str, Any]:
    """The relative difference of both losses on the first batch that TRL prepares, where its teacher is the student."""
    from transformers import TrainerCallback

    from benchmarks.demo.model import ensure_model, load_model
    from sdft_kernels import DistillBatch, SelfDistiller

    model, tokenizer = load_model(ensure_model())
    row, ours = read_row(args, tokenizer), list[Any]()
    args.steps, args.checkpointing = 1, False
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(args, model, tokenizer, row, folder)

        class Ours(TrainerCallback):
            def on_self_distillation_batch_prepared(self, *_: Any, **batch: Any) -> None:
                length = batch["completion_ids"].shape[1]
                students = [ids.tolist() for ids in batch["prompt_ids"]]
                teachers = [
                    ids[mask.bool()].tolist()[:-length]
                    for ids, mask in zip(batch["teacher_input_ids"], batch["teacher_attention_mask"], strict=True)
                ]
                completions = batch["completion_ids"].tolist()
                distiller = SelfDistiller(trainer.accelerator.unwrap_model(trainer.model), "live", skip_first_tokens=0)
                ours.append(distiller(DistillBatch([students[0]], [teachers[0]], [completions])).loss.item())
                ours.append((len(students[0]), len(teachers[0])))

        stock, theirs = trainer.compute_loss, list[float]()

        def compute_loss(*inputs: Any, **options: Any) -> Any:
            loss = stock(*inputs, **options)
            theirs.append(loss.item())
            return loss

        trainer.compute_loss = compute_loss
        trainer.add_callback(Ours())
        trainer.train()
    return {"ours": ours[0], "theirs": theirs[0], "prompt_tokens": ours[1][0], "teacher_prompt_tokens": ours[1][1]}


def child(args: argparse.Namespace, role: str) -> dict[str, Any]:
    """Run this file for one role in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step_trl", *args.raw, "--role", role]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{role} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table, TRL's first."""
    import torch

    from sdft_kernels.cli._bench.report import commit
    from sdft_kernels.cli._progress import Progress
    from sdft_kernels.cli.env import cpu_model, package_version

    runs: dict[str, list[dict[str, Any]]] = {role: [] for role in args.roles}
    with Progress(1 + args.pairs * len(args.roles), "step") as progress:
        losses = child(args, "losses")
        progress.step("losses agree")
        for pair in range(args.pairs):
            for role in args.roles:
                runs[role].append(child(args, role))
                progress.step(f"{role}: {pair + 1}/{args.pairs}")
    difference = abs(losses["ours"] - losses["theirs"]) / abs(losses["theirs"])
    took = {role: median(t for run in runs[role] for t in run["seconds"]) for role in args.roles}
    peak = {role: max(run["peak_bytes"] for run in runs[role]) for role in args.roles}
    return [
        dict(
            trainer=ROLES[role][0], activation_checkpointing="yes" if ROLES[role][1] else "no",
            step_s=round(took[role], 2), steps=sum(len(run["seconds"]) for run in runs[role]),
            peak_mib=round(peak[role] / 2**20), step_over_trl=round(took[role] / took["trl"], 4),
            peak_over_trl=round(peak[role] / peak["trl"], 4), loss_difference=f"{difference:.1e}",
            prompt_tokens=losses["prompt_tokens"], teacher_prompt_tokens=losses["teacher_prompt_tokens"],
            completions=args.completions, completion_tokens=args.completion_tokens, threads=args.threads,
            device=cpu_model()[0], torch_version=torch.__version__,
            transformers_version=package_version("transformers"), trl_version=package_version("trl"), commit=commit(),
        )
        for role in args.roles
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_trl", description=__doc__)
    parser.add_argument("--pairs", type=int, default=2, help="processes of each trainer (default 2)")
    parser.add_argument("--steps", type=int, default=2, help="of a process, the first not counted (default 2)")
    parser.add_argument("--completions", type=int, default=8, metavar="R")
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="L")
    parser.add_argument("--prompt-tokens", type=int, default=541, metavar="P", help="at least (default 541)")
    parser.add_argument("--data", type=Path, metavar="JSONL", help="take the prompt from here")
    parser.add_argument("--row", type=int, default=0, help="of --data")
    parser.add_argument(
        "--roles", nargs="+", choices=tuple(ROLES), default=tuple(ROLES), metavar="ROLE", help=f"of {', '.join(ROLES)}"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, metavar="CSV", help="write the table here (replaced)")
    parser.add_argument("--role", choices=(*ROLES, "losses"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.roles = list(dict.fromkeys([next(iter(ROLES)), *args.roles]))  # the first is what the others are divided by
    args.raw = list(sys.argv[1:] if argv is None else argv)
    if args.role is not None:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(compare_losses(args) if args.role == "losses" else run_steps(args, args.role)))
        return 0
    table = measure(args)
    from sdft_kernels.cli._table import print_table

    shown = COLUMNS[:11]
    print_table("one SDFT step", shown, [[str(row[name]) for name in shown] for row in table])
    if args.output is not None:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)
    return int(float(table[0]["loss_difference"]) > LOSS_TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
