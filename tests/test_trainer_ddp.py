"""Two DDP processes (gloo) take the same step as one process with the whole batch."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402
from processes import leave, run_ranks  # noqa: E402

from sdft_kernels.distill import SDFTConfig, SDFTTrainer  # noqa: E402


def run(folder, batch_size, **options):
    config = SDFTConfig(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=batch_size, max_steps=2, learning_rate=0.3,
        rollouts="dataset", num_loss_tokens_to_skip=0, report_to=[], save_strategy="no", disable_tqdm=True,
        teacher_model_kind="ema", teacher_update_rate=0.5, train_sampling_strategy="sequential", optim="sgd", **options,
    )  # fmt: skip
    trainer = SDFTTrainer(tiny.model(), config, tiny.rows(), processing_class=tiny.tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in trainer.model.parameters()], trainer


def test_two_processes_equal_one(tmp_path):
    run_ranks(__file__, 2, tmp_path / "ddp", ACCELERATE_USE_CPU="true")
    losses, parameters, _ = run(tmp_path / "one", batch_size=4)
    distributed = torch.load(tmp_path / "ddp.pt")
    assert distributed["losses"] == pytest.approx(losses, rel=1e-5)
    for a, b in zip(distributed["parameters"], parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses, parameters, trainer = run(sys.argv[1], batch_size=2, ddp_backend="gloo")
    assert trainer.args.world_size == 2 and trainer.model_wrapped is not trainer.model
    if trainer.args.process_index == 0:
        torch.save({"losses": losses, "parameters": parameters}, sys.argv[1] + ".pt")
    leave()
