"""`train()` of the fused TRL trainer against the stock one: same seed, losses, metrics and weights; LoRA; DDP."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl")

import distill_tiny  # noqa: E402
import trl_tiny as tiny  # noqa: E402
from processes import HANG_SECONDS  # noqa: E402
from trl.experimental.sdft import SDFTTrainer  # noqa: E402

from sdft_kernels.integrations.trl import FusedSDFTTrainer, fuse  # noqa: E402

CLOCK = {
    f"{mode}_{name}" for mode in ("train", "eval") for name in ("runtime", "samples_per_second", "steps_per_second")
} | {"total_flos"}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def perturb_adapter(model) -> None:
    """LoRA starts as the identity (B = 0): a teacher without adapter would be the student, and the loss 0."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("options", "with_lora"),
    [
        # num_iterations=2: rollouts are reused, so the importance ratio is on (rollout log-probabilities).
        (dict(distillation_mode="full_logits", num_iterations=2, teacher_model_kind="base"), False),
        (dict(distillation_mode="topk_logits", distillation_topk=5, temperature=0.8, num_iterations=2), False),
        (dict(distillation_mode="sampled_token", distillation_alpha=1.0, num_loss_tokens_to_skip=1), False),
        (
            dict(
                distillation_mode="full_logits",
                teacher_model_kind="ema",
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                per_device_eval_batch_size=2,
            ),
            False,
        ),
        (dict(distillation_mode="full_logits", teacher_model_kind="base", gradient_checkpointing=True), True),
        (dict(distillation_mode="full_logits", teacher_model_kind="ema", generate_from_teacher=True), True),
    ],
    ids=["full", "topk", "sampled", "ema", "lora-base", "lora-ema"],
)
def test_train_equals_stock(tmp_path, options, with_lora):
    """Three steps: the second and third see what the first did to student, teacher and generator."""
    tiny.model(vocab_size=len(distill_tiny.WORDS) + 5).save_pretrained(tmp_path / "model")
    distill_tiny.tokenizer().save_pretrained(tmp_path / "model")
    runs = []
    for cls in (SDFTTrainer, FusedSDFTTrainer):
        trainer = tiny.trainer(
            cls, str(tmp_path / "model"), None, tmp_path / cls.__name__, peft_config=lora() if with_lora else None,
            max_steps=3, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", **options,
        )  # fmt: skip
        if with_lora:
            perturb_adapter(trainer.model)
        trainer.train()
        saved = tmp_path / cls.__name__ / "checkpoint-2" / "model.safetensors"
        assert saved.exists() == (options.get("save_strategy") == "steps")
        runs.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    (history, weights), (fused_history, fused_weights) = runs
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3 and all(abs(loss) > 1e-3 for loss in losses), losses
    assert len(history) == len(fused_history)
    for entry, fused_entry in zip(history, fused_history, strict=True):
        assert entry.keys() == fused_entry.keys()
        for name in entry.keys() - CLOCK:
            # abs: in sampled_token the loss is a sum with both signs.
            assert fused_entry[name] == pytest.approx(entry[name], rel=1e-5, abs=2e-6), name
    for name, weight in weights.items():
        torch.testing.assert_close(fused_weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_lora_with_the_base_as_teacher(tmp_path):
    """Student and teacher share one frozen head; only the adapter has gradients, and they are the stock ones."""
    base = tiny.model()
    runs = []
    for cls in (SDFTTrainer, FusedSDFTTrainer):
        trainer = tiny.trainer(
            cls, copy.deepcopy(base), None, tmp_path, peft_config=lora(lora_dropout=0.0), teacher_model_kind="base"
        )
        perturb_adapter(trainer.model)
        assert trainer.teacher_model is trainer.model
        runs.append(tiny.loss_and_gradients(trainer, tiny.batch("row")))
    (loss, gradients, _), (fused_loss, fused_gradients, _) = runs
    assert loss > 1e-3 and gradients and all("lora_" in name for name in gradients)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


DDP_ROWS = 4


def ddp_gradients(folder: str, rows: slice, wrap) -> tuple[float, dict[str, torch.Tensor]]:
    student = tiny.model()
    trainer = fuse(tiny.trainer(SDFTTrainer, student, tiny.near(student), folder))
    inputs = {name: value[rows] for name, value in tiny.batch("row", sequences=DDP_ROWS).items()}
    wrapped = wrap(trainer.model)  # kept: a DDP module that is collected before backward reduces nothing
    loss = trainer.compute_loss(wrapped, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_averages_the_gradients(tmp_path, find_unused):
    """Two gloo processes, half a batch each: the gradients of both are those of the whole batch, the head's too.

    With `find_unused_parameters`, transformers' default without gradient checkpointing, DDP looks in the output's graph
    for parameters without gradient: a head used outside its forward would fail there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "ddp"), str(rank), str(int(find_unused))],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            },
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        _, errors = child.communicate(timeout=HANG_SECONDS)
        assert child.returncode == 0, errors
    loss, gradients = ddp_gradients(tmp_path, slice(None), lambda model: model)
    halves = [torch.load(tmp_path / f"ddp{rank}.pt") for rank in range(2)]
    assert sum(half["loss"] for half in halves) / 2 == pytest.approx(loss, rel=1e-6)
    assert halves[0]["loss"] != pytest.approx(halves[1]["loss"], rel=1e-2)
    for half in halves:
        for name, gradient in gradients.items():
            assert (half["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, rank, find_unused = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))
    half = DDP_ROWS // 2

    def wrap(model):
        assert torch.distributed.get_world_size() == 2
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)

    loss, gradients = ddp_gradients(path, slice(rank * half, (rank + 1) * half), wrap)
    torch.save({"loss": loss, "gradients": gradients}, f"{path}{rank}.pt")
    from processes import leave

    leave()
