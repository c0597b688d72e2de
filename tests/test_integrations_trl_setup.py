"""What the TRL integration relies on in TRL, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("trl")

import trl_tiny as tiny  # noqa: E402
from processes import HANG_SECONDS  # noqa: E402
from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # noqa: E402
from trl.experimental.sdft import sdft_trainer as trl_module  # noqa: E402
from trl.models.utils import _ForwardRedirection  # noqa: E402

from sdft_kernels.integrations import trl as integration  # noqa: E402
from sdft_kernels.integrations.trl import FusedSDFTTrainer, check_trainer, fuse, fused_trainer_class  # noqa: E402


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        return tiny.trainer(SDFTTrainer, tiny.model(), None, tmp_path_factory.mktemp("trl"))


def parameters(function) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def test_trl_signatures():
    """Red here after a TRL release: read its sdft_trainer.py again before touching the table."""
    for name, expected in integration.TRL_SIGNATURES.items():
        assert parameters(getattr(SDFTTrainer, name)) == expected, name
    assert parameters(_ForwardRedirection.__call__) == (
        "self", "wrapper_module", "original_module", "method", "args", "kwargs",
    )  # fmt: skip
    assert [field.name for field in dataclasses.fields(trl_module.DistillationLogits)] == [
        "completion_ids", "loss_mask", "student_logits", "teacher_logits",
    ]  # fmt: skip
    assert parameters(trl_module.compute_topk_self_distillation_loss) == (
        "student_logits", "teacher_logits", "distillation_topk", "distillation_alpha", "distillation_add_tail",
    )  # fmt: skip


def test_trl_attributes(stock):
    config = {field.name for field in dataclasses.fields(SDFTConfig)}
    assert config >= {
        "distillation_mode", "distillation_alpha", "distillation_topk", "distillation_add_tail", "distillation_is_clip",
        "steps_per_generation", "gradient_accumulation_steps",
    }  # fmt: skip
    for name in (
        "args", "accelerator", "model", "teacher_model", "temperature", "num_iterations", "num_loss_tokens_to_skip",
        "use_teacher_server", "is_fsdp_enabled", "is_deepspeed_enabled",
    ):  # fmt: skip
        assert hasattr(stock, name), name
    # The only places that compute logits: a fourth would escape the overrides.
    source = inspect.getsource(trl_module.SDFTTrainer)
    assert source.count("self._forward_logits(") == 4
    for name, calls in (
        ("_compute_rollout_logps", 1), ("_compute_server_distillation_loss", 1), ("_compute_teacher_student_logits", 2),
    ):  # fmt: skip
        assert inspect.getsource(getattr(SDFTTrainer, name)).count("self._forward_logits(") == calls


def test_changed_signature_is_an_error(stock, monkeypatch):
    monkeypatch.setattr(SDFTTrainer, "_compute_rollout_logps", lambda self, batch: None)
    with pytest.raises(ImportError, match=r"changed SDFTTrainer._compute_rollout_logps: expected .*'prompt_ids'"):
        fuse(stock)
    assert type(stock) is SDFTTrainer


def test_importing_the_module_imports_no_framework():
    code = (
        "import sys, sdft_kernels.integrations.trl; "
        "print(sorted({'trl', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=HANG_SECONDS
    )
    assert child.stdout == "[]\n", child.stderr
    assert integration.FusedSDFTTrainer is FusedSDFTTrainer and issubclass(FusedSDFTTrainer, SDFTTrainer)


def test_old_or_missing_trl_is_an_error(stock, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.2")
    with pytest.raises(ImportError, match=r"needs trl>=1.16,<2, found trl 1.15.2"):
        fuse(stock)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'sdft-kernels\[trl\]'"):
        fuse(stock)
    for version in ("1.16.0.dev0", "1.16.0", "2.0rc1", "1.20"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert integration._sdft_trainer() is SDFTTrainer


def test_not_a_trainer():
    with pytest.raises(TypeError, match="trainer must be a trl SDFTTrainer, got str"):
        fuse("trainer")
    with pytest.raises(TypeError, match="base must be trl's SDFTTrainer or a subclass of it, got dict"):
        fused_trainer_class(dict)
    assert fused_trainer_class(FusedSDFTTrainer) is fused_trainer_class(SDFTTrainer) is FusedSDFTTrainer
    with pytest.raises(AttributeError, match="no attribute 'Fused'"):
        integration.Fused  # noqa: B018


@pytest.mark.parametrize("name", integration.NEED_LOGITS)
def test_subclass_with_its_own_logits(stock, name):
    own = type("Own", (SDFTTrainer,), {name: lambda self, *args: None})
    trainer = copy.copy(stock)
    trainer.__class__ = own
    with pytest.raises(TypeError, match=f"Own overrides {name}"):
        fuse(trainer)
    assert type(trainer) is own


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(use_teacher_server=True), NotImplementedError, "use_teacher_server=True .* set use_teacher_server=False"),
        (dict(is_fsdp_enabled=True), NotImplementedError, "FSDP .*use DDP"),
        (dict(zero_stage=3), NotImplementedError, "ZeRO-3 .*use ZeRO-1/2"),
        (dict(n_gpu=2), NotImplementedError, "DataParallel.*one process per GPU"),
        (dict(torch_compile=True), NotImplementedError, r"torch_compile=True .*model.base_model.compile\(\)"),
        (dict(mixed_precision="fp16"), NotImplementedError, "fp16 .*bf16=True"),
        (dict(hf_device_map={"model": 0, "lm_head": 1}), NotImplementedError, "spread over .*load it on one device"),
        (dict(distillation_mode="logits"), ValueError, "must be one of 'full_logits', .*got 'logits'"),
    ],
)
def test_refused_setup(stock, monkeypatch, change, error, message):
    (name, value), accelerator = *change.items(), stock.accelerator
    trainer = copy.copy(stock)
    if name == "hf_device_map":
        monkeypatch.setattr(trainer.model, name, value, raising=False)
    elif name in ("n_gpu", "torch_compile", "distillation_mode"):
        trainer.args = types.SimpleNamespace(**{**vars(stock.args), "n_gpu": 0, name: value})
    elif name in ("zero_stage", "mixed_precision"):
        state = types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=change.get("zero_stage", 0)))
        trainer.accelerator = types.SimpleNamespace(
            state=state, unwrap_model=accelerator.unwrap_model, autocast=accelerator.autocast,
            mixed_precision=change.get("mixed_precision", "no"),
        )  # fmt: skip
        trainer.is_deepspeed_enabled = True
    else:
        setattr(trainer, name, value)
    with pytest.raises(error, match=message):
        fuse(trainer)
    assert type(trainer) is SDFTTrainer


def test_a_model_that_is_sharded_already(stock):
    weight = stock.model.get_input_embeddings().weight
    weight.ds_id = 3
    try:
        with pytest.raises(NotImplementedError, match="sharded: .* is partitioned by DeepSpeed ZeRO-3.*use DDP"):
            fuse(stock)
    finally:
        del weight.ds_id
    assert type(stock) is SDFTTrainer


def test_zero_1_and_2_pass(stock):
    trainer = copy.copy(stock)
    trainer.is_deepspeed_enabled = True
    plugin = types.SimpleNamespace(zero_stage=2)
    trainer.accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(deepspeed_plugin=plugin), unwrap_model=stock.accelerator.unwrap_model,
        autocast=stock.accelerator.autocast, mixed_precision="no",
    )  # fmt: skip
    check_trainer(trainer)


def test_refused_head(tmp_path):
    from peft import LoraConfig

    on_head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match="adapter sits on the head .*remove 'lm_head'"):
        tiny.trainer(FusedSDFTTrainer, tiny.model(), None, tmp_path, peft_config=on_head, teacher_model_kind="base")

    hooked = tiny.trainer(SDFTTrainer, tiny.model(), None, tmp_path)
    hooked.model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(ValueError, match="forward hooks on the language-model head"):
        fuse(hooked)

    class Shifted(type(tiny.model())):  # what code from a model repository may do
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    shifted = tiny.trainer(SDFTTrainer, tiny.model(), None, tmp_path)
    shifted.model.__class__ = Shifted
    with pytest.raises(ValueError, match="does something between its head and its logits"):
        fuse(shifted)


def test_logits_are_not_there(tmp_path):
    """Code that reads logits gets the reason and the way out; so does one that brings its own."""
    trainer = tiny.trainer(FusedSDFTTrainer, tiny.model(), None, tmp_path)
    deferred = trainer._compute_teacher_student_logits(trainer.model, trainer.teacher_model, tiny.batch())
    for name in ("student_logits", "teacher_logits"):
        with pytest.raises(RuntimeError, match=f"{name} do not exist .*_forward_logits still computes"):
            getattr(deferred, name)
    own = trl_module.DistillationLogits(*[torch.zeros(1)] * 4)
    with pytest.raises(TypeError, match="must be a DeferredForward, got DistillationLogits"):
        trainer._compute_self_distillation_loss(trainer.model, tiny.batch(), own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(distillation_mode="sampled_token", distillation_alpha=0.5), "supports only distillation_alpha=1.0"),
        (dict(distillation_mode="topk_logits", distillation_topk=None), "requires distillation_topk, got None"),
        (dict(distillation_mode="other"), "must be one of 'full_logits', 'topk_logits', 'sampled_token', got 'other'"),
        (dict(distillation_alpha=1.5), r"alpha must be within \[0, 1\], got 1.5"),
    ],
)
def test_bad_objective(tmp_path, options, message):
    """Options changed after construction, which TRL's own checks do not see."""
    trainer = tiny.trainer(FusedSDFTTrainer, tiny.model(), None, tmp_path)
    for name, value in options.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, tiny.batch())
