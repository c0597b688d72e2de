"""The fused TRL trainer against the stock one: real trainers, real methods, the same batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("trl")

import trl_tiny as tiny  # noqa: E402
from trl.experimental.sdft import SDFTTrainer  # noqa: E402
from trl.experimental.sdft.loss_utils import (  # noqa: E402
    compute_full_logit_self_distillation_loss,
    compute_sampled_token_self_distillation_loss,
)

from sdft_kernels.integrations.trl import FusedSDFTTrainer, fuse  # noqa: E402

MODES = [
    *(("full_logits", alpha, False) for alpha in (0.0, 0.5, 1.0)),
    ("sampled_token", 1.0, False),
    *(("topk_logits", alpha, tail) for alpha in (0.0, 0.5, 1.0) for tail in (False, True)),
]


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(stock, fused) trainers with equal students and teachers, by family and dtype."""
    made: dict[Any, Any] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        if (family, dtype) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CI", "1")
                student = tiny.model(family).to(dtype)
                made[family, dtype] = tuple(
                    tiny.trainer(cls, copy.deepcopy(student), tiny.near(student), tmp_path_factory.mktemp("trl"))
                    for cls in (SDFTTrainer, FusedSDFTTrainer)
                )
                # Rotary distances are the same at other positions, but transformers rounds their cosines to fp32. Where
                # positions are learned, nothing is the same.
                if dtype == torch.float64 or family in tiny.ABSOLUTE:
                    right_positions(made[family, dtype][0])
        return made[family, dtype]

    return make


def right_positions(trainer: Any) -> None:
    """Give a stock trainer's models the positions that `generate` gives, which do not count padding on the left."""

    def add(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs = kwargs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        return args, kwargs

    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_pre_hook(add, with_kwargs=True)


def set_options(pair: tuple[Any, Any], mode: str, alpha: float, tail: bool, clip: float | None, temperature: float):
    for trainer in pair:
        trainer.args.distillation_mode, trainer.args.distillation_alpha = mode, alpha
        trainer.args.distillation_add_tail, trainer.args.distillation_topk = tail, 8
        trainer.args.distillation_is_clip, trainer.temperature = clip, temperature
        trainer.num_loss_tokens_to_skip = 2


def assert_equal(pair: tuple[Any, Any], inputs: dict, loss_rtol: float, gradient_rtol: float) -> None:
    """Loss, every parameter's gradient (relative in its norm) and the logged metrics."""
    (loss, gradients, logged), (fused_loss, fused_gradients, fused_logged) = (
        tiny.loss_and_gradients(trainer, inputs) for trainer in pair
    )
    loss_atol = loss_rtol * cancelling_terms(pair[0], inputs)
    torch.testing.assert_close(fused_loss, loss, rtol=loss_rtol, atol=loss_atol)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        error, size = (fused_gradients[name] - gradient).norm().item(), gradient.norm().item()
        assert error <= gradient_rtol * size, (name, error / max(size, 1e-300))
    assert logged.keys() == fused_logged.keys() and logged
    for name, values in logged.items():
        assert fused_logged[name] == pytest.approx(values, rel=loss_rtol, abs=loss_atol), name


@torch.no_grad()
def cancelling_terms(stock: Any, inputs: dict) -> float:
    """Mean size of the token losses where they have both signs (`sampled_token`), else 0.

    Their mean is a sum that cancels, known to eps times the size of its terms by either trainer.
    """
    logits = stock._compute_teacher_student_logits(stock.model, stock.teacher_model, inputs)
    if stock.args.distillation_mode != "sampled_token" or not logits.loss_mask.any():
        return 0.0
    terms = compute_sampled_token_self_distillation_loss(
        logits.student_logits, logits.teacher_logits, logits.completion_ids, distillation_alpha=1.0
    )
    return terms[logits.loss_mask.bool()].abs().mean().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize(("mode", "alpha", "tail"), MODES)
def test_equals_stock_fp32(pairs, mode, alpha, tail, clip, temperature):
    pair = pairs("qwen2")
    set_options(pair, mode, alpha, tail, clip, temperature)
    for masks in ("ragged", "row", "none"):
        assert_equal(pair, tiny.batch(masks), 1e-6, 1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "cohere", "phi"])
@pytest.mark.parametrize(("mode", "alpha", "tail"), MODES)
def test_equals_stock_fp64(pairs, family, mode, alpha, tail):
    """fp64, where only an exact formula passes; heads with a softcap, a logit scale, a bias."""
    pair = pairs(family, torch.float64)
    set_options(pair, mode, alpha, tail, 2.0, 1.3)
    assert_equal(pair, tiny.batch("row", torch.float64), 1e-10, 1e-10)


@pytest.mark.parametrize("family", tiny.ABSOLUTE)
@pytest.mark.parametrize("masks", ["ragged", "row"])
def test_positions_do_not_count_padding_on_the_left(pairs, family, masks, tmp_path):
    """Learned positions: the stock trainer's loss depends on how long the other prompts of a batch are."""
    pair = pairs(family)
    set_options(pair, "full_logits", 0.5, False, 2.0, 0.7)
    inputs = tiny.batch(masks)
    assert_equal(pair, inputs, 1e-6, 1e-5)
    stock = tiny.trainer(SDFTTrainer, copy.deepcopy(pair[1].model), pair[1].teacher_model, tmp_path)
    set_options((stock,), "full_logits", 0.5, False, 2.0, 0.7)
    counted, loss = (tiny.loss_and_gradients(trainer, inputs)[0] for trainer in (stock, pair[1]))
    assert (counted - loss).abs() > 1e-3 * loss.abs()  # control


def test_equals_stock_gemma2(pairs):
    """Eager attention and both of Gemma 2's softcaps."""
    pair = pairs("gemma2")
    set_options(pair, "full_logits", 0.5, False, 2.0, 0.7)
    assert_equal(pair, tiny.batch("row"), 1e-6, 1e-5)


def test_frozen_head_and_no_importance_ratio(pairs):
    pair = pairs("qwen2")
    set_options(pair, "full_logits", 0.5, False, 2.0, 1.0)
    inputs = tiny.batch()
    del inputs["old_per_token_logps"]
    for trainer in pair:
        trainer.model.lm_head.requires_grad_(False)
    try:
        assert_equal(pair, inputs, 1e-6, 1e-5)
        assert all(trainer.model.lm_head.weight.grad is None for trainer in pair)
    finally:
        for trainer in pair:
            trainer.model.lm_head.requires_grad_(True)


def test_evaluation_logs_and_scales_as_stock(pairs):
    """In eval mode the loss is not divided by the accumulation steps, and goes to the other metrics."""
    pair = pairs("qwen2")
    set_options(pair, "full_logits", 1.0, False, None, 1.0)
    results = []
    for trainer in pair:
        trainer.model.eval()
        trainer._metrics["eval"].clear()
        loss, logits, labels = trainer.prediction_step(trainer.model, tiny.batch(), prediction_loss_only=True)
        trainer.model.train()
        assert logits is None and labels is None
        results.append((loss.item(), dict(trainer._metrics["eval"])))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert results[1][1].keys() == results[0][1].keys() and results[1][1]
    for name, values in results[0][1].items():
        assert results[1][1][name] == pytest.approx(values, rel=1e-6)


def test_dropout_draws_the_same_numbers(tmp_path):
    """Student before teacher, as in the stock trainer; a live teacher is in training mode there, so here too."""
    student = tiny.model("qwen2", attention_dropout=0.3)
    losses = []
    for cls in (SDFTTrainer, FusedSDFTTrainer):
        trainer = tiny.trainer(cls, copy.deepcopy(student), None, tmp_path)
        torch.manual_seed(1)
        losses.append(tiny.loss_and_gradients(trainer, tiny.batch())[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert losses[0] > 0.01


def test_rollout_logprobs_equal_stock(pairs):
    pair = pairs("cohere")
    inputs = tiny.batch()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    values = []
    for trainer in pair:
        trainer.temperature = 0.8
        trainer.num_iterations = 2
        values.append(trainer._compute_rollout_logps(*(inputs[name] for name in names)))
        trainer.num_iterations = 1
        assert trainer._compute_rollout_logps(*(inputs[name] for name in names)) is None
    kept = inputs["completion_mask"].bool()
    torch.testing.assert_close(values[1][kept], values[0][kept], rtol=1e-5, atol=1e-5)
    assert not values[1][~kept].any() and not values[1].requires_grad


def test_fuse_in_place(pairs, tmp_path):
    """`fuse` changes a stock trainer, or one of a subclass, into the fused one; twice is once."""

    class Mine(SDFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 3 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    stock, _ = pairs("qwen2")
    set_options((stock, stock), "full_logits", 0.5, False, 2.0, 1.0)
    mine = tiny.trainer(Mine, copy.deepcopy(stock.model), stock.teacher_model, tmp_path)
    set_options((mine, mine), "full_logits", 0.5, False, 2.0, 1.0)
    assert fuse(mine, memory_budget=1 << 20) is mine
    assert type(mine).__name__ == "FusedMine" and isinstance(mine, Mine) and mine._memory_budget == 1 << 20
    fused = type(mine)
    assert fuse(mine) is mine and type(mine) is fused and mine._memory_budget is None
    expected = tiny.loss_and_gradients(stock, tiny.batch("row"))[0]
    found = tiny.loss_and_gradients(mine, tiny.batch("row"))[0]
    torch.testing.assert_close(found, 3 * expected, rtol=1e-6, atol=0)


def test_autocast_reaches_backbone_and_head(pairs, tmp_path):
    """bf16=True with fp32 weights: the backbone runs in bf16 as in the stock trainer, with and without prepare()."""
    student = tiny.model("qwen2")
    teacher = tiny.near(student)
    losses, dtypes = [], set()
    student.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    for cls, prepare in ((SDFTTrainer, True), (FusedSDFTTrainer, True), (FusedSDFTTrainer, False)):
        trainer = tiny.trainer(cls, copy.deepcopy(student), teacher, tmp_path, bf16=True)
        if prepare:
            trainer.accelerator.prepare_model(trainer.model)
            trainer.teacher_model = trainer.accelerator.prepare_model(copy.deepcopy(teacher), evaluation_mode=True)
        dtypes.clear()
        loss, gradients, _ = tiny.loss_and_gradients(trainer, tiny.batch())
        assert dtypes == {torch.bfloat16}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        losses.append(loss.item())
    # bf16 logits are the stock trainer's: 8 bits against our fp32 logits. Without autocast it is the fp32 loss exactly.
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_bf16_model_is_nearer_to_the_exact_loss(pairs, alpha):
    """The loss of the same bf16 hidden states in fp64: fp32 logits, as here, give it to 1e-5; stock has bf16 logits."""
    stock, fused = pair = pairs("qwen2", torch.bfloat16)
    set_options(pair, "full_logits", alpha, False, None, 0.7)
    inputs = tiny.batch("row")
    deferred = fused._compute_teacher_student_logits(fused.model, fused.teacher_model, inputs)
    with torch.no_grad():
        tokens = fused._token_batch(fused.model, inputs, deferred)
        logits = [
            hidden.double() @ model.lm_head.weight.double().T / 0.7
            for hidden, model in ((tokens.student_input, fused.model), (tokens.teacher_input, fused.teacher_model))
        ]
        values = compute_full_logit_self_distillation_loss(*logits, distillation_alpha=alpha)
    exact = (values * tokens.weight).sum().item() / fused.current_gradient_accumulation_steps
    losses = [tiny.loss_and_gradients(trainer, inputs)[0].item() for trainer in pair]
    assert abs(losses[1] - exact) <= 1e-5 * exact
    assert abs(losses[1] - exact) < abs(losses[0] - exact)


class LogitTensors(TorchDispatchMode):
    """Shapes of floating tensors with as many elements as the logits of all tokens, outside registered operators."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.found = elements, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() >= self.elements:
                self.found.add(tuple(value.shape))
        return out


@pytest.mark.parametrize(("mode", "alpha"), [("full_logits", 0.5), ("sampled_token", 1.0), ("topk_logits", 0.5)])
def test_no_tensor_of_all_logits(tmp_path, mode, alpha):
    """Neither in the loss nor in its backward nor for the rollout's log-probabilities; the stock trainer makes many."""
    sequences, length, vocabulary = 32, 48, 4096  # 24 MiB of logits
    student = tiny.model("qwen2", vocab_size=vocabulary)
    pair = [tiny.trainer(cls, copy.deepcopy(student), student, tmp_path) for cls in (SDFTTrainer, FusedSDFTTrainer)]
    set_options((pair[0], pair[1]), mode, alpha, False, 2.0, 1.0)
    inputs = tiny.batch(sequences=sequences, length=length)
    pair[1]._memory_budget = 20 << 20
    found = []
    for trainer in pair:
        trainer.num_iterations = 2
        with LogitTensors(sequences * length * vocabulary) as seen:
            tiny.loss_and_gradients(trainer, inputs)
        with LogitTensors(sequences * length * vocabulary) as rollout:
            trainer._compute_rollout_logps(*list(inputs.values())[:4])
        found.append((seen.found, rollout.found))
    shape = (sequences, length, vocabulary)
    assert shape in found[0][0] and shape in found[0][1]
    assert found[1] == (set(), set())
