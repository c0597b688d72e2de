"""Two processes whose batches hold different things: nobody waits, and the numbers are those of one process."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402
from processes import HANG_SECONDS, leave, run_ranks  # noqa: E402
from transformers import PrinterCallback  # noqa: E402

from sdft_kernels.distill import SDFTConfig, SDFTTrainer  # noqa: E402

SHORT, LONG, LONGER = [[9, 8, 1]], [[5, 6, 7, 8, 9, 1], [11]], [[14, 3, 20, 21, 5, 5, 1]]
LOGPROBS = {1: [-2.0], 3: [-3.0, -2.5, -4.0], 6: [-2.0, -3.0, -5.0, -2.0, -3.5, -2.0], 7: [-3.0] * 7}


def given(completions, *with_logprobs):
    rows = [row | {"completion_ids": ids} for row, ids in zip(tiny.rows(len(completions)), completions, strict=True)]
    for i in with_logprobs:
        rows[i]["sampling_logprobs"] = [LOGPROBS[len(ids)] for ids in rows[i]["completion_ids"]]
    return rows


# A sequential sampler gives the first two rows of four to the first process, the last two to the second. Default
# options skip three tokens, so that a process with `SHORT` completions has nothing in the loss.
TRAINING = {
    "no token in the loss": (given([LONG, LONGER, SHORT, SHORT]), {}),
    "no token in any loss": (given([SHORT] * 4), {}),
    "no completion": (given([LONG, LONGER, [], [[]]]), {}),
    "sampling_logprobs": (given([LONG, LONGER, LONG, LONGER], 0, 1), {}),
    "cross-entropy": (given([LONG, LONGER, SHORT, SHORT]), dict(loss="ce")),
    "gradient checkpointing": (given([LONG, [[]], SHORT, []]), dict(gradient_checkpointing=True)),
    "accumulated": (given([LONG, SHORT, [], LONGER], 0), dict(per_device_train_batch_size=1,
                                                              gradient_accumulation_steps=2)),
}  # fmt: skip
EVALUATION = {
    "five rows": (given([LONG, SHORT, LONGER, LONG, LONGER]), {}),
    "one row": (given([LONGER]), {}),
    "no row": ([], {}),
    "cross-entropy": (given([LONG, SHORT, LONGER]), dict(loss="ce")),
    "sampling_logprobs": (given([LONG, LONGER, LONG, SHORT, LONGER], 1, 3), {}),
}
EVALUATION_SIZES = (1, 2, 7)
CLOCK = ("runtime", "per_second", "preparation_time", "epoch")
# What sharing saves depends on which rows stand beside each other.
SHARING = ("tokens_computed", "tokens_saved", "predicted_speedup")


def trainer(folder, train, evaluation, **options):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=2, learning_rate=0.3, rollouts="given", report_to=[],
        per_device_train_batch_size=4 // processes, save_strategy="no", disable_tqdm=True, teacher_model_kind="ema",
        teacher_update_rate=0.5, train_sampling_strategy="sequential", optim="sgd", ddp_timeout=HANG_SECONDS,
        ddp_backend="gloo" if processes > 1 else None, max_completion_length=6, include_num_input_tokens_seen="all",
    )  # fmt: skip
    config = SDFTConfig(**(defaults | options))
    made = SDFTTrainer(tiny.model(), config, train, evaluation, processing_class=tiny.tokenizer())
    made.remove_callback(PrinterCallback)
    return made


def numbers(entry):
    kept = {name: value for name, value in entry.items() if not any(word in name for word in (*CLOCK, *SHARING))}
    sharing = {name.rpartition("tokens_")[0] + "fed": value for name, value in entry.items() if "tokens_saved" in name}
    return kept | {name: value + entry[name.replace("fed", "tokens_computed")] for name, value in sharing.items()}


def trained(folder, name, **overrides):
    rows, options = TRAINING[name]
    made = trainer(folder, rows, None, **(options | overrides))
    made.train()
    logs = [numbers(entry) for entry in made.state.log_history if "loss" in entry]
    return {"logs": logs, "weights": [p.detach().flatten().tolist() for p in made.model.parameters()]}


def evaluated(folder, name, size):
    rows, options = EVALUATION[name]
    return numbers(trainer(folder, None, rows, per_device_eval_batch_size=size, **options).evaluate())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes gave, by the case's name; a case that waits for ever ends the children, and every test.

    The limits are against waiting for ever only: a busy machine needs a fraction of them.
    """
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(__file__, 2, folder, ACCELERATE_USE_CPU="true")
    return json.loads((folder / "results.json").read_text())


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_that_of_one_process(two, tmp_path, name):
    # Accumulated over two batches of one row, the first process sees the first and the third row.
    one = trained(tmp_path, name, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert len(one["logs"]) == 2
    for a, b in zip(one["logs"], two[f"train {name}"]["logs"], strict=True):
        same(a, b)
    for a, b in zip(one["weights"], two[f"train {name}"]["weights"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_is_that_of_one_process_at_any_batch_size(two, tmp_path, name):
    one = evaluated(tmp_path, name, 1)
    assert ("eval_expert_logprob" in one) == (name != "no row")
    assert ("eval_kl_teacher_student_q90" in one) == (name in ("five rows", "one row", "sampling_logprobs"))
    for size in EVALUATION_SIZES:
        same(one, evaluated(tmp_path, name, size))
        same(one, two[f"evaluate {name} {size}"])


def main(folder):
    torch.set_num_threads(1)
    results = {}
    for name in TRAINING:
        results[f"train {name}"] = trained(folder, name)
    for name in EVALUATION:
        for size in EVALUATION_SIZES:
            results[f"evaluate {name} {size}"] = evaluated(folder, name, size)
    for option, value in (("even_batches", False), ("dispatch_batches", True)):
        with pytest.raises(ValueError, match=f"got .*{option}={value}"):
            trainer(folder, TRAINING["cross-entropy"][0], None, accelerator_config={option: value})
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
