"""Fused TRL trainers that compute a prompt once for its completions, beside the stock trainer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl_tiny as tiny  # noqa: E402
from test_integrations_trl import assert_equal, pairs, set_options  # noqa: E402, F401
from trl.experimental.sdft import SDFTTrainer  # noqa: E402

from sdft_kernels.distill import passes  # noqa: E402
from sdft_kernels.integrations import trl_prefix  # noqa: E402
from sdft_kernels.integrations.trl import FusedSDFTTrainer, fuse  # noqa: E402
from sdft_kernels.models.attention_hook import is_hooked  # noqa: E402
from sdft_kernels.models.rope import reset_rope  # noqa: E402


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the packed passes, one number each."""
    computed: list[int] = []
    real = trl_prefix.packed_hidden_states

    def watch(model: Any, *args: Any) -> Any:
        handle = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        try:
            return real(model, *args)
        finally:
            handle.remove()

    monkeypatch.setattr(trl_prefix, "packed_hidden_states", watch)
    return computed


@pytest.mark.parametrize("masks", ["ragged", "row", "none"])
@pytest.mark.parametrize(("mode", "alpha"), [("full_logits", 0.0), ("topk_logits", 0.5), ("sampled_token", 1.0)])
def test_equals_stock_fp32(pairs, tokens, mode, alpha, masks):  # noqa: F811
    pair = pairs("qwen2")
    set_options(pair, mode, alpha, False, 2.0, 1.3)
    assert_equal(pair, tiny.batch(masks, one_prompt=True), 2e-6, 2e-5)
    # The student's prompt of 3 tokens and the teacher's of 5, and completions without their last token: 9, 6 and 9 of
    # them ("none": 2 each, "row": 9, 6, 2).
    completions = {"ragged": 8 + 5 + 8, "row": 8 + 5 + 1, "none": 1 + 1 + 1}[masks]
    assert tokens == [3 + completions, 5 + completions]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "cohere", "phi"])
def test_other_families_equal_stock_fp32(pairs, tokens, family):  # noqa: F811
    pair = pairs(family)
    set_options(pair, "full_logits", 0.5, False, 2.0, 0.7)
    assert_equal(pair, tiny.batch("row", one_prompt=True), 2e-6, 2e-5)
    assert len(tokens) == 2


def test_equals_stock_fp64(pairs, tokens):  # noqa: F811
    """Of Phi, whose norms stay in fp64; those of the others pass through fp32, whatever the model is."""
    pair = pairs("phi", torch.float64)
    set_options(pair, "full_logits", 0.5, False, 2.0, 0.7)
    inputs = tiny.batch("row", torch.float64, one_prompt=True)
    assert_equal(pair, inputs, 1e-10, 1e-10)
    assert len(tokens) == 2


@pytest.mark.parametrize("family", [*tiny.ABSOLUTE, "opt", "bloom", "gpt_neox", "qwen2", "longrope", "dynamic"])
@pytest.mark.parametrize("masks", ["ragged", "row"])
def test_the_loss_does_not_depend_on_sharing(family, masks, tmp_path):
    """Over left-padded batches; nor do hidden states depend on the other sequences of a batch."""
    student = tiny.model(family)
    inputs = tiny.batch(masks, one_prompt=True)
    results = []
    for share in (None, False):
        trainer = tiny.trainer(
            FusedSDFTTrainer, copy.deepcopy(student), tiny.near(student), tmp_path, num_loss_tokens_to_skip=0
        )
        fuse(trainer, share_prefix=share)
        results.append(tiny.loss_and_gradients(trainer, inputs))
    (shared, found, _), (whole, gradients, _) = results
    torch.testing.assert_close(shared, whole, rtol=2e-6, atol=0)
    assert found.keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7 * largest, name
    model = trainer.model.eval()
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        hidden = trl_prefix.completion_hidden(model, ids, mask, 9, share=False).view(3, 9, -1)
        for row, own, seen in zip(hidden, ids, mask.bool(), strict=True):
            reset_rope(model)
            alone = model.base_model(input_ids=own[seen][:-1][None], use_cache=False).last_hidden_state[0]
            tokens = int(seen[-9:].sum())
            torch.testing.assert_close(row[:tokens], alone[-tokens:], rtol=0, atol=2e-5)


def test_rollout_logprobs_are_those_of_the_stock_trainer(pairs, tokens):  # noqa: F811
    stock, fused = pairs("qwen2")
    inputs = tiny.batch(one_prompt=True)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for trainer in (stock, fused):
        trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation = 1, 2
    try:
        expected, found = (trainer._compute_rollout_logps(*(inputs[n] for n in names)) for trainer in (stock, fused))
    finally:
        for trainer in (stock, fused):
            trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation = 2, 2
    mask = inputs["completion_mask"].bool()
    assert len(tokens) == 1 and (found[mask] - expected[mask]).abs().max() < 1e-5


def test_what_is_not_shared(tokens):
    """Prompts that differ, masks that are not padding on the right, completions without a token, attention dropout."""
    model = tiny.model().eval()
    passes.enable_sharing([model], True)

    def hidden(inputs: dict, **changes: torch.Tensor) -> torch.Tensor | None:
        inputs = inputs | changes
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        return trl_prefix.shared_completion_hidden(model, ids, mask, 9)

    one = tiny.batch(one_prompt=True)
    assert hidden(one) is not None
    hole = one["completion_mask"].clone()
    hole[0, 3] = 0
    assert hidden(one, completion_mask=hole) is None
    assert hidden(one, completion_mask=torch.zeros_like(hole)) is None
    assert hidden(one, prompt_mask=torch.zeros_like(one["prompt_mask"])) is None
    assert hidden(tiny.batch()) is None
    model.config.attention_dropout = 0.1  # which no layer reads after it was built
    assert hidden(one) is not None
    model.train()
    assert hidden(one) is not None
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert hidden(one) is None
    model.eval()
    assert hidden(one) is not None


def test_share_prefix_is_an_option_of_both(tmp_path, tokens, caplog, monkeypatch):
    student = tiny.model()
    inputs = tiny.batch(one_prompt=True)
    trainer = tiny.trainer(SDFTTrainer, copy.deepcopy(student), tiny.near(student), tmp_path)
    assert fuse(trainer, share_prefix=False) is trainer
    whole, gradients, _ = tiny.loss_and_gradients(trainer, inputs)
    assert not tokens and not is_hooked(trainer.model.config._attn_implementation)
    fuse(trainer, share_prefix=True)
    shared, found, _ = tiny.loss_and_gradients(trainer, inputs)
    assert len(tokens) == 2
    torch.testing.assert_close(shared, whole, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm(), name

    def refuse(model: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(passes, "enable_shared_prefix", refuse)
    with caplog.at_level(logging.INFO, logger=passes.logger.name):
        assert not tiny.trainer(FusedSDFTTrainer, student, None, tmp_path)._shares_prefix
    assert "prefixes are computed once per completion: no" in caplog.text
    with pytest.raises(ValueError, match="no"):
        fuse(trainer, share_prefix=True)


def test_a_fused_run_shares(tmp_path, tokens):
    """`train()`: generation, a live teacher, two completions a prompt."""
    trainer = tiny.trainer(
        FusedSDFTTrainer, tiny.model(), None, tmp_path, max_steps=2, gradient_accumulation_steps=1, learning_rate=1e-3
    )
    trainer.train()
    assert len(tokens) == 4 and all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history[:-1])
