"""The benchmarks of a whole step: what is timed, what ratios are to, and the table and plot of `bench step`'s file."""

import argparse
import csv
import json

import pytest
import torch

from benchmarks import step_table, step_trl


def write_rows(path, shapes, variant="packed"):
    columns = ["kernel_name", "kernel_provider", "metric_name", "y_value_50", "extra_benchmark_config_str"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for prompt, completions, measured, predicted in shapes:
            case = json.dumps({"prompt": prompt, "completions": completions})
            numbers = {"speedup": measured, "predicted_speedup": predicted, "speed": 5.0, "memory": 7.0}
            for provider in ("repeated", variant):
                for name, value in numbers.items():
                    writer.writerow(["shared_prefix_step", provider, name, value, case])


def test_step_table(tmp_path, capsys):
    path = tmp_path / "step.csv"
    write_rows(path, [(2048, 1, 0.98, 1.0), (512, 4, 3.124, 2.8), (512, 1, 1.04, 1.0)])
    assert step_table.main([str(path), "--plot", str(tmp_path / "step.png")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | R = 1 | R = 4 |",
        "|---|---|---|",
        "| 512 tokens | 1.04 (1.00) | 3.12 (2.80) |",
        "| 2,048 tokens | 0.98 (1.00) | – |",
    ]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no row of bench step's variant 'packed_cached'"):
        step_table.read_table(path, "packed_cached")


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch):
    pytest.importorskip("transformers")
    times, now = [], iter([10.0, 13.0, 17.5])
    monkeypatch.setattr(step_trl.time, "perf_counter", lambda: next(now))
    clock = step_trl._clock(times)
    for _ in range(3):
        clock.on_step_begin(None, None, None)  # transformers' own, which does nothing
        clock.on_step_end(None, None, None)
    assert times == [10.0, 13.0, 17.5]


def test_ratios_are_to_plain_trl(monkeypatch):
    answers = {
        "losses": {"ours": 1.00001, "theirs": 1.0, "prompt_tokens": 5, "teacher_prompt_tokens": 9},
        "trl": {"seconds": [40.0, 60.0], "peak_bytes": 800 * 2**20},
        "sdft": {"seconds": [10.0], "peak_bytes": 400 * 2**20},
        "sdft_checkpointed": {"seconds": [12.5], "peak_bytes": 200 * 2**20},
    }
    asked = []
    monkeypatch.setattr(step_trl, "child", lambda args, role: asked.append(role) or answers[role])
    args = argparse.Namespace(
        pairs=2, roles=["trl", "sdft", "sdft_checkpointed"], completions=2, completion_tokens=3, threads=1
    )
    rows = step_trl.measure(args)
    assert asked == ["losses", *args.roles, *args.roles]
    assert [row["trainer"] for row in rows] == ["trl", "sdft", "sdft"]
    assert [row["activation_checkpointing"] for row in rows] == ["no", "no", "yes"]
    assert [row["step_over_trl"] for row in rows] == [1.0, 0.2, 0.25]
    assert [row["peak_over_trl"] for row in rows] == [1.0, 0.5, 0.25]
    assert {row["loss_difference"] for row in rows} == {"1.0e-05"} and set(rows[0]) == set(step_trl.COLUMNS)


def test_both_trainers_get_the_same_teacher_prompt_and_dtype(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    import distill_tiny as tiny
    from transformers import AutoModelForCausalLM, TrainerCallback

    args = argparse.Namespace(completions=2, completion_tokens=3, steps=1, checkpointing=False)
    row, prompts = tiny.rows()[0], {}

    class Seen(TrainerCallback):
        def on_self_distillation_batch_prepared(self, *_, **batch):
            ids, mask = batch["teacher_input_ids"][0], batch["teacher_attention_mask"][0]
            prompts["trl"] = ids[mask.bool()].tolist()[: -args.completion_tokens]

    tiny.model().save_pretrained(tmp_path / "model")  # TRL loads its teacher anew
    trainers = {
        name: getattr(step_trl, f"{name}_trainer")(
            args, AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tiny.tokenizer(), row, str(tmp_path / name)
        )
        for name in ("trl", "sdft")
    }
    encoder = type(trainers["sdft"].encoder)
    stock = encoder.teacher

    def teacher(self, *inputs):
        found = stock(self, *inputs)
        prompts["sdft"] = found[0]
        return found

    monkeypatch.setattr(encoder, "teacher", teacher)
    trainers["trl"].add_callback(Seen())
    for trainer in trainers.values():
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert trainer.accelerator.mixed_precision == "no"
    assert prompts["trl"] == prompts["sdft"]
    assert len(prompts["trl"]) > len(row["prompt"][0]["content"].split())  # more than the question
