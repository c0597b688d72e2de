"""`SDFTTrainer`: runs, logs, evaluates, and a resumed run equals an uninterrupted one."""

import json
import os
import shutil

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import SDFTConfig, SDFTTrainer  # noqa: E402
from sdft_kernels.distill.trainer import last_complete_checkpoint  # noqa: E402


def config(folder, **overrides):
    options = dict(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
        max_completion_length=6, num_loss_tokens_to_skip=0, report_to=[], save_steps=2, disable_tqdm=True, seed=3,
        lr_scheduler_type="linear",
    )  # fmt: skip
    return SDFTConfig(**(options | overrides))


def trainer(folder, **overrides):
    return SDFTTrainer(tiny.model(), config(folder, **overrides), tiny.rows(), processing_class=tiny.tokenizer())


def history(trained, keys=("loss", "grad_norm", "kl_teacher_student", "student_entropy", "completions/mean_length")):
    return [[entry[k] for k in keys] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [
    dict(teacher_model_kind="frozen"),
    dict(teacher_model_kind="ema", teacher_update_rate=0.3, gradient_accumulation_steps=2, num_generations=2),
    dict(teacher_model_kind="ema", teacher_update_rate=0.3, teacher_dtype="bfloat16"),
    dict(teacher_model_kind="live", rollouts="teacher", distillation_alpha=0.5),
])  # fmt: skip
def test_resume_gives_the_same_numbers(tmp_path, options):
    straight = trainer(tmp_path / "a", **options)
    straight.train()
    assert len(history(straight)) == 4

    # What a kill after step 2 leaves: the first checkpoint, and the next one half-written.
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    os.makedirs(tmp_path / "b" / "checkpoint-4")
    (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, ')
    resumed = trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(straight)
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, tensor in straight.distiller.state_dict().items():
        assert torch.equal(tensor, resumed.distiller.state_dict()[name]), name


def test_rollouts_differ_between_steps_and_seeds(tmp_path):
    made = trainer(tmp_path)
    rows = tiny.rows(2)
    draw = lambda seed: made._batches([rows], seed)[0].completions  # noqa: E731
    assert draw(made._seed(0)) == draw(made._seed(0))
    assert draw(made._seed(0)) != draw(made._seed(1))


def test_a_frozen_teacher_is_recognised_on_resume(tmp_path):
    trainer(tmp_path, teacher_model_kind="frozen", max_steps=2).train()
    other = SDFTTrainer(
        tiny.model(seed=9), config(tmp_path, teacher_model_kind="frozen"), tiny.rows(),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model the run started from"):
        other.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(str(tmp_path)) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        other.train(resume_from_checkpoint=True)


def test_evaluation_reports_divergence_and_expert_logprob(tmp_path):
    made = SDFTTrainer(
        tiny.model(), config(tmp_path, per_device_eval_batch_size=3), tiny.rows(), tiny.rows(5),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    first, second = made.evaluate(), made.evaluate()
    assert first["eval_expert_logprob"] < 0 and first["eval_kl_teacher_student"] > 0
    for name in ("eval_loss", "eval_expert_logprob", "eval_kl_teacher_student"):
        assert first[name] == second[name]
    assert all(not p.grad_fn for p in made.model.parameters())


def test_gradient_accumulation_normalises_over_the_whole_step(tmp_path):
    """4 prompts at once and 2 + 2 give the same step, although the completions differ in length."""
    whole = trainer(tmp_path / "a", per_device_train_batch_size=4, max_steps=1, generation_batch_size=1)
    parts = trainer(
        tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        generation_batch_size=1,
    )  # fmt: skip
    whole.train()
    parts.train()
    for key in ("loss", "grad_norm", "num_loss_tokens", "kl_teacher_student"):
        a, b = (t.state.log_history[0][key] for t in (whole, parts))
        assert a == pytest.approx(b, rel=1e-4), key


def test_saved_model_loads_again(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(loaded.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny.TEMPLATE
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_cross_entropy_on_the_dataset_is_supervised_fine_tuning(tmp_path):
    """One step of rollouts=dataset, loss=ce against labels through the model's own loss."""
    made = trainer(tmp_path, rollouts="dataset", loss="ce", per_device_train_batch_size=1, max_steps=1, optim="sgd")
    before = tiny.model()
    [batch] = made._batches([[tiny.rows()[0]]], 0)
    prompt, completion = batch.student_prompts[0], batch.completions[0][0]
    ids = torch.tensor([prompt + completion])
    labels = torch.tensor([[-100] * len(prompt) + completion])
    expected = before(input_ids=ids, labels=labels).loss
    expected.backward()
    made.model.train()
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(made.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_an_engine_and_given_completions_replace_sampling(tmp_path):
    calls = []

    def engine(prompts, n):
        calls.append((len(prompts), n))
        return [[[5, 6, 7, 1]] * n for _ in prompts], [[[-2.0] * 4] * n for _ in prompts]

    made = SDFTTrainer(
        tiny.model(), config(tmp_path, num_generations=2, gradient_accumulation_steps=2, max_steps=2), tiny.rows(),
        processing_class=tiny.tokenizer(), rollouts=engine,
    )  # fmt: skip
    made.train()
    assert calls == [(4, 2), (4, 2)]  # once per optimizer step, all micro-batches together
    assert made.state.log_history[0]["num_loss_tokens"] == 32
    assert 0 < made.state.log_history[0]["effective_sample_size"] < 1
    given = [row | {"completion_ids": [[5, 6, 1], [7]]} for row in tiny.rows()]
    made = SDFTTrainer(
        tiny.model(), config(tmp_path, rollouts="given", max_steps=1), given, processing_class=tiny.tokenizer()
    )
    made.train()
    assert made.state.log_history[0]["completions/mean_length"] == 2


def test_bad_configurations_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match="privileged_context"):
        SDFTTrainer(tiny.model(), config(tmp_path), [{"prompt": "the cat"}], processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="completion_ids"):
        SDFTTrainer(tiny.model(), config(tmp_path, rollouts="given"), tiny.rows(), processing_class=tiny.tokenizer())
    with pytest.raises(TypeError, match="rows by index, got generator"):
        SDFTTrainer(tiny.model(), config(tmp_path), (row for row in tiny.rows()), processing_class=tiny.tokenizer())
    for options, error, match in (
        (dict(rollouts="oracle"), ValueError, "rollouts"),
        (dict(teacher_model_kind="sync"), NotImplementedError, "sync"),
        (dict(teacher_model_kind="best"), ValueError, "best"),
        (dict(teacher_dtype="float16"), ValueError, "teacher_dtype must be .* got .float16."),
        (dict(teacher_prompt_template="none"), ValueError, "template"),
        (dict(distillation_mode="topk_logits"), NotImplementedError, "topk_logits"),
        (dict(num_generations=0), ValueError, "num_generations"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(remove_unused_columns=True), ValueError, "remove_unused_columns"),
    ):
        with pytest.raises(error, match=match):
            config(tmp_path, **options)
    long = [{"prompt": " ".join(["cat"] * 95), "privileged_context": "a dog"}]
    made = SDFTTrainer(tiny.model(), config(tmp_path), long, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"example 0: the student prompt has 98 tokens.*context of 96"):
        made.train()
    limited = trainer(tmp_path, max_prompt_length=2)
    with pytest.raises(ValueError, match="max_prompt_length=2"):
        limited.train()
