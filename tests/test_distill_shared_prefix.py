"""`SelfDistiller` and `SDFTTrainer` over shared prefixes: same numbers, fewer tokens, a cache that is never stale."""

import logging

import distill_tiny as tiny
import pytest
import torch

from sdft_kernels.distill import DistillBatch, SDFTConfig, SDFTTrainer, SelfDistiller, rollouts
from sdft_kernels.models import enable_shared_prefix
from sdft_kernels.models.attention_hook import is_hooked
from sdft_kernels.models.dropout import disable_dropout
from sdft_kernels.prefix_attention import PrefixCache
from sdft_kernels.testing import relative_error


def draw(per_prompt=(3, 1, 2), prompt=12, extra=9, own_teacher_prompts=False, seed=0):
    """Prompts, longer teacher prompts (one a prompt, or one a completion with a common start), ragged completions."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(2, 29, (n,), generator=g).tolist()  # noqa: E731
    students = [ids(prompt) for _ in per_prompt]
    teachers = [ids(extra) + s for s in students]
    if own_teacher_prompts:
        teachers = [[[*t, *ids(2)] for _ in range(r)] for t, r in zip(teachers, per_prompt, strict=True)]
    return DistillBatch(students, teachers, [[ids(2 + 3 * j) for j in range(r)] for r in per_prompt])


def run(model, batch, **options):
    distiller = SelfDistiller(model, skip_first_tokens=0, **options)
    model.zero_grad()
    out = distiller(batch)
    out.loss.backward()
    return distiller, out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("teacher", ("frozen", "ema", "live"))
@pytest.mark.parametrize("own_teacher_prompts", (False, True))
def test_the_same_loss_and_gradients_from_fewer_tokens(own_teacher_prompts, teacher):
    model, batch = tiny.model(), draw(own_teacher_prompts=own_teacher_prompts)
    _, plain, expected = run(model, batch, teacher=teacher, share_prefix=False)
    _, shared, actual = run(model, batch, teacher=teacher, share_prefix=True)
    assert relative_error(shared.loss, plain.loss) < 1e-5 or (shared.loss - plain.loss).abs() < 1e-9
    for name, value in plain.tokens._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(shared.tokens, name), value, rtol=1e-4, atol=1e-6)
    if teacher != "live":
        # Right after its start the teacher is the student: gradients are rounding errors there.
        assert set(actual) == set(expected)
    assert plain.metrics["tokens_saved"] == 0
    assert plain.metrics["predicted_speedup"] == 1
    # A teacher prompt for each completion is shared in part, which the prediction does not count.
    assert shared.metrics["predicted_speedup"] > (1 if own_teacher_prompts else 1.2)
    saved, computed = shared.metrics["tokens_saved"], shared.metrics["tokens_computed"]
    assert saved > 0 and saved + computed == plain.metrics["tokens_computed"]


def test_gradients_of_a_moved_student():
    """A student away from its teacher, whose gradients are not rounding errors."""
    model, batch = tiny.model(), draw()
    results = []
    for share in (False, True):
        model = tiny.model()
        distiller = SelfDistiller(model, "frozen", skip_first_tokens=0, share_prefix=share)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        out = distiller(batch)
        out.loss.backward()
        results.append((out.loss, {name: p.grad for name, p in model.named_parameters()}))
    assert relative_error(results[1][0], results[0][0]) < 1e-5
    for name, grad in results[0][1].items():
        assert relative_error(results[1][1][name], grad) < 1e-4, name


def test_a_frozen_teachers_prompts_are_computed_once():
    model, batch = tiny.model(), draw()
    distiller = SelfDistiller(model, "frozen", skip_first_tokens=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distiller.attach(optimizer)
    first = distiller(batch)
    assert first.metrics["prefix_cache_hits"] == 0 and first.metrics["prefix_cache_mib"] > 0
    first.loss.backward()
    optimizer.step()  # moves the student; the teacher's keys stay right
    again = distiller(batch)
    assert again.metrics["prefix_cache_hits"] == 3
    assert again.metrics["predicted_speedup"] > first.metrics["predicted_speedup"]
    assert torch.equal(again.tokens.teacher_logprob, first.tokens.teacher_logprob)
    assert again.metrics["tokens_computed"] < first.metrics["tokens_computed"]
    cold = SelfDistiller(tiny.model(), "frozen", skip_first_tokens=0, prefix_cache=PrefixCache(10**6))(batch)
    assert torch.equal(cold.tokens.teacher_logprob, first.tokens.teacher_logprob)


def test_prompts_that_share_their_beginning_go_without_the_cache():
    distiller = SelfDistiller(tiny.model(), "frozen", skip_first_tokens=0)
    metrics = distiller(draw(own_teacher_prompts=True)).metrics
    assert metrics["tokens_saved"] > 0 and metrics["prefix_cache_mib"] == 0
    assert distiller(draw()).metrics["prefix_cache_mib"] > 0  # the control


@pytest.mark.parametrize("teacher", ("ema", "live"))
def test_a_teacher_that_moves_forgets_what_it_computed(teacher):
    model, batch = tiny.model(), draw()
    distiller = SelfDistiller(model, teacher, ema_rate=0.5, skip_first_tokens=0, prefix_cache=2**20, share_prefix=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    distiller.attach(optimizer)
    distiller(batch)
    assert distiller(batch).metrics["prefix_cache_hits"] == 3
    # An entropy bonus moves a student that equals its teacher.
    hidden = distiller.passes.student_states(*(lambda f: (f.student_prompts, f.completions))(batch.flatten()))
    hidden.square().mean().backward()
    optimizer.step()
    moved = distiller(batch)
    assert moved.metrics["prefix_cache_hits"] == 0
    fresh = SelfDistiller(model, distiller.teacher, skip_first_tokens=0, share_prefix=False)(batch)
    torch.testing.assert_close(moved.tokens.teacher_logprob, fresh.tokens.teacher_logprob, rtol=1e-4, atol=1e-5)


def test_nothing_to_share_takes_the_plain_path(monkeypatch):
    from sdft_kernels.distill import passes

    def fail(*_, **__):
        raise AssertionError("packed")

    monkeypatch.setattr(passes, "packed_hidden_states", fail)
    batch = draw(per_prompt=(1, 1))
    out = SelfDistiller(tiny.model(), "ema", skip_first_tokens=0)(batch)
    assert out.metrics["tokens_saved"] == 0
    with pytest.raises(AssertionError, match="packed"):  # the control
        SelfDistiller(tiny.model(), "ema", skip_first_tokens=0)(draw())


def test_a_model_that_cannot_share_runs_separately_and_says_so(caplog):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, state_size=4, tie_word_embeddings=True)
    )
    with pytest.raises(ValueError, match="separately"):
        SelfDistiller(model, "live", share_prefix=True)
    with caplog.at_level(logging.INFO, logger="sdft_kernels"):
        out = SelfDistiller(model, "live", skip_first_tokens=0)(draw())
    assert "prefixes are computed once per completion" in caplog.text
    assert out.metrics["tokens_saved"] == 0


def test_attention_dropout_in_training_runs_separately():
    model = tiny.model(attention_dropout=0.1)
    assert SelfDistiller(model, "live", skip_first_tokens=0)(draw()).metrics["tokens_saved"] > 0  # in eval mode
    model.train()
    distiller = SelfDistiller(model, "frozen", skip_first_tokens=0, prefix_cache=0)
    student_only = distiller(draw())
    model.eval()
    assert student_only.metrics["tokens_saved"] < distiller(draw()).metrics["tokens_saved"]
    model.train()
    with pytest.raises(ValueError, match="attention dropout"):
        SelfDistiller(model, "live", share_prefix=True)(draw())


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    )


def test_dropout_that_gpt2_has_by_default(caplog):
    model = gpt2().train()
    with caplog.at_level(logging.INFO, logger="sdft_kernels"):
        distiller, out, _ = run(model, draw(), teacher="frozen", prefix_cache=0)
        distiller(draw())
    assert caplog.text.count("GPT2LMHeadModel has attention dropout in training") == 1
    teacher_only = out.metrics["tokens_saved"]
    disable_dropout(model)
    assert run(model, draw(), teacher="frozen", prefix_cache=0)[1].metrics["tokens_saved"] > teacher_only > 0
    with pytest.raises(ValueError, match="attention dropout 0.1 in training"):
        run(gpt2().train(), draw(), share_prefix=True)


def test_a_rate_that_only_the_configuration_has_stops_nothing():
    """`disable_dropout` leaves the configuration alone, which layers read when they are built."""
    model = tiny.model(attention_dropout=0.1)
    disable_dropout(model)
    assert model.config.attention_dropout == 0.1
    _, out, _ = run(model.train(), draw(), teacher="live")
    _, expected, _ = run(tiny.model().train(), draw(), teacher="live")
    assert torch.equal(out.loss, expected.loss) and out.metrics["tokens_saved"] == expected.metrics["tokens_saved"] > 0


def test_a_packed_pass_that_fails_in_mid_run_is_computed_separately(caplog):
    """A rate in a place where no one looks for it: the attention function sees it."""
    model = tiny.model().train()
    expected = run(model, draw(), teacher="live", share_prefix=False)[1].tokens.student_logprob
    distiller = SelfDistiller(model, "live", skip_first_tokens=0)
    strict = SelfDistiller(model, "live", skip_first_tokens=0, share_prefix=True)
    attention = type(model.model.layers[0].self_attn)
    rates = property(lambda self: 1e-9 if self.training else 0.0, lambda self, value: None)
    with pytest.MonkeyPatch.context() as patch:
        for layer in model.model.layers:
            del layer.self_attn.attention_dropout
        patch.setattr(attention, "attention_dropout", rates, raising=False)
        with caplog.at_level(logging.INFO, logger="sdft_kernels"):
            first, again = distiller(draw()), distiller(draw())
        with pytest.raises(ValueError, match="attention dropout"):
            strict(draw())
    assert caplog.text.count("attention dropout 1e-09 in training") == 1 and not distiller.passes.shares
    assert again.metrics["tokens_saved"] == 0
    torch.testing.assert_close(first.tokens.student_logprob, expected, rtol=1e-5, atol=1e-5)


def test_where_the_teacher_cannot_share_the_student_is_as_it_was():
    from transformers import StableLmConfig, StableLmForCausalLM

    student = tiny.model()
    sizes = {name: getattr(student.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    teacher = StableLmForCausalLM(StableLmConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    teacher.requires_grad_(False)
    distiller = SelfDistiller(student, teacher)
    assert not distiller.passes.shares
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="only 0 of 2 layers"):
        SelfDistiller(student, teacher, share_prefix=True)
    assert student.config._attn_implementation == "sdpa"
    enable_shared_prefix(student)
    SelfDistiller(student, teacher)
    assert is_hooked(student.config._attn_implementation)  # the caller's own


def test_a_cache_without_sharing_is_refused():
    with pytest.raises(ValueError, match="prefix_cache needs shared prefixes"):
        SelfDistiller(tiny.model(), share_prefix=False, prefix_cache=2**20)


def test_lora_shares_and_caches_its_base():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = draw()
    _, plain, expected = run(model, batch, share_prefix=False)
    distiller, shared, actual = run(model, batch, share_prefix=True)
    assert distiller.teacher.kind == "frozen"
    assert relative_error(shared.loss, plain.loss) < 1e-5
    for name, grad in expected.items():
        assert relative_error(actual[name], grad) < 1e-4, name
    assert distiller(batch).metrics["prefix_cache_hits"] == 3


@pytest.mark.parametrize("share", (None, False))
def test_the_trainer_logs_what_it_saved(share, tmp_path, monkeypatch):
    prefilled = []
    real = rollouts.prefilled_inputs
    monkeypatch.setattr(rollouts, "prefilled_inputs", lambda *args: prefilled.append(args) or real(*args))
    args = SDFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=3, report_to=[],
        max_completion_length=4, save_strategy="no", use_cpu=True, share_prefix=share, teacher_model_kind="base",
        num_loss_tokens_to_skip=0,
    )  # fmt: skip
    trainer = SDFTTrainer(tiny.model(), args, tiny.rows(2), processing_class=tiny.tokenizer())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["tokens_computed"] > 0 for entry in logs)
    assert len(prefilled) == (0 if share is False else 2)
    if share is False:
        assert all(entry["tokens_saved"] == 0 and "prefix_cache_hits" not in entry for entry in logs)
    else:
        assert all(entry["tokens_saved"] > 0 for entry in logs)
        assert [entry["prefix_cache_hits"] for entry in logs] == [0, 2]  # the second epoch finds both prompts
