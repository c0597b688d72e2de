"""Teachers under PEFT: what "adapters off" leaves as it was, and which model a frozen teacher is."""

import copy
import dataclasses
import logging
import sys

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import DistillBatch, SDFTConfig, SDFTTrainer, SelfDistiller, make_teacher  # noqa: E402
from sdft_kernels.distill.adapters import adapter_layers, adapters_change_nothing  # noqa: E402
from sdft_kernels.distill.teacher import ModelTeacher  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 11]])
CHANGES_BASE = ["pissa", "pissa_niter_4", "olora", "corda"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(base=None, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(r=2, target_modules=["q_proj", "up_proj"]) | options)
    return peft.get_peft_model(base if base is not None else tiny.model(), config)


def corda():
    """CorDA needs the covariance of every layer's input first."""
    sys.modules.setdefault("attr", dataclasses)  # PEFT's module imports attrs, which it does not require
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    base = tiny.model()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="corda", corda_config=CordaConfig()
    )
    preprocess_corda(base, config, run_model=lambda: base(input_ids=torch.arange(29)[None]))
    return peft.get_peft_model(base, config)


def model_with(init):
    return corda() if init == "corda" else lora(init_lora_weights=init)


def trained(model, steps=3):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def state(model):
    """All that a pass of the teacher could leave changed."""
    layers = [(m._disable_adapters, m._active_adapter, m.training) for m in adapter_layers(model)]
    return layers, [(name, p.requires_grad) for name, p in model.named_parameters()]


def two_adapters():
    model = lora(init_lora_weights=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


KINDS = ["frozen", "base", "ema"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_pass_inside_disable_adapter_leaves_adapters_off(kind, fresh):
    model = lora(init_lora_weights=fresh)
    distiller = SelfDistiller(model, kind, skip_first_tokens=0)
    trained(model)
    base, adapted = logits(tiny.model()), logits(model)
    before = state(model)
    with model.disable_adapter():
        inside = state(model)
        with torch.no_grad():
            distiller(tiny.batch())
        assert state(model) == inside
        assert torch.equal(logits(model), base)
    assert state(model) == before
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_same_whatever_the_students_adapters_are(kind):
    model = two_adapters()
    teacher = make_teacher(model, kind)
    with teacher.active() as active:
        expected = logits(active)
    model.set_adapter("other", inference_mode=True)
    with teacher.active() as active, teacher.active():  # nested
        assert torch.equal(logits(active), expected)
    with model.disable_adapter(), teacher.active() as active:
        assert torch.equal(logits(active), expected)
    assert adapter_layers(model)[0].active_adapters == ["other"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: adapter_layers(model)[1].enable_adapters(False),
        lambda model: setattr(adapter_layers(model)[0], "_active_adapter", "default"),  # a string, as PEFT's class has
        lambda model: adapter_layers(model)[0].lora_A["default"].requires_grad_(False),
    ],
    ids=["several active", "one layer off", "a string", "one frozen"],
)
def test_every_layers_own_state_comes_back(kind, change):
    model = two_adapters()
    change(model)
    before, function = state(model), logits(model)
    teacher = make_teacher(model, kind)
    with teacher.active():
        pass
    with pytest.raises(ZeroDivisionError), teacher.active():
        raise ZeroDivisionError
    assert state(model) == before and torch.equal(logits(model), function)


@pytest.mark.parametrize("kind", ["frozen", "base"])
def test_modules_trained_whole_beside_an_adapter(kind):
    model = lora(modules_to_save=["norm"])
    start = logits(model)
    teacher = make_teacher(model, kind)
    trained(model)
    before, function = state(model), logits(model)
    with teacher.active() as active:
        assert torch.equal(logits(active), start)
    assert state(model) == before and torch.equal(logits(model), function) and not torch.equal(function, start)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_are_refused_and_stay_merged(kind):
    model = lora(tiny.model().bfloat16(), init_lora_weights=False)
    teacher = make_teacher(model, kind)
    model.merge_adapter()
    merged = logits(model)
    message = r"adapters \['default'\] are merged .* call model.unmerge_adapter\(\) first"
    with pytest.raises(ValueError, match=message), teacher.active():
        pass
    with pytest.raises(ValueError, match=message):
        make_teacher(model, kind)
    assert torch.equal(logits(model), merged)
    assert all(layer.merged for layer in adapter_layers(model))
    with make_teacher(model, "live").active() as active:
        assert torch.equal(logits(active), merged)
    model.unmerge_adapter()
    with teacher.active():
        pass


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "orthogonal", False, *CHANGES_BASE])
def test_a_frozen_teacher_is_the_student_at_the_start(init):
    model = model_with(init)
    start = logits(model)
    teacher = make_teacher(model)
    trained(model)
    with teacher.active() as active:
        assert torch.equal(logits(active), start)
    assert not torch.equal(logits(model), start)
    assert (teacher.nbytes == 0) == (init in (True, "gaussian", "eva"))
    factors = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert teacher.nbytes in (0, factors)
    with model.disable_adapter():
        off = (logits(model) - start).abs().max()
    assert (off > 0.01) == (init not in (True, "gaussian", "eva", "orthogonal"))  # control


@pytest.mark.parametrize("options", [
    dict(), dict(use_rslora=True), dict(use_dora=True), dict(target_modules=["q_proj", "embed_tokens"]),
    *(dict(init_lora_weights=init) for init in CHANGES_BASE),
])  # fmt: skip
def test_no_divergence_before_a_step(options):
    model = corda() if options.get("init_lora_weights") == "corda" else lora(**options)
    batch = tiny.batch()
    batch.teacher_prompts = batch.student_prompts
    out = SelfDistiller(model.eval(), skip_first_tokens=0, share_prefix=False)(batch)
    assert out.loss.abs() < 1e-6 and out.metrics["kl_teacher_student"].abs() < 1e-6


def test_an_adapter_that_was_trained_before_is_part_of_the_frozen_teacher(caplog):
    model = trained(lora())
    start = logits(model)
    with caplog.at_level(logging.WARNING):
        teacher = make_teacher(model)
    assert "adds something before the first step" in caplog.text and "teacher='base'" in caplog.text
    base = make_teacher(model, "base")
    trained(model)
    with teacher.active() as active:
        assert torch.equal(logits(active), start)
    with base.active() as active:
        assert torch.equal(logits(active), logits(tiny.model()))
    assert base.nbytes == 0 and base.kind == "frozen"


def test_another_active_adapter_is_part_of_the_frozen_teacher():
    """A fresh adapter on a trained one: adapters off would take both away."""
    model = lora(init_lora_weights=False)
    model.add_adapter("fresh", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "fresh"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".fresh." in name)
    start = logits(model)
    assert not adapters_change_nothing(model)
    with make_teacher(model).active() as active:
        assert torch.equal(logits(active), start)
    model.base_model.set_adapter("fresh")
    assert adapters_change_nothing(model)


def test_what_an_adapter_adds():
    assert adapters_change_nothing(lora())
    biased = lora(tiny.model(attention_bias=True), target_modules=["q_proj"], lora_bias=True)
    assert adapters_change_nothing(biased)
    layer = adapter_layers(biased)[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].bias[0] = 1e-30
    assert not adapters_change_nothing(biased)  # a bias is added whatever A is
    embedding = lora(target_modules=["embed_tokens"])
    assert adapters_change_nothing(embedding)
    with torch.no_grad():
        adapter_layers(embedding)[0].lora_embedding_A["default"][1, 17] = 1e-30  # one token in 29
    assert not adapters_change_nothing(embedding)
    assert not adapters_change_nothing(lora(use_dora=True))


@pytest.mark.parametrize("init", CHANGES_BASE)
def test_base_is_refused_where_the_initialisation_changed_it(init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}', which changes the base.*teacher='frozen'"):
        make_teacher(model_with(init), "base")


def test_base_is_refused_where_the_base_trains():
    model = lora()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters outside the adapters train, .*norm.weight.*teacher='frozen'"):
        make_teacher(model, "base")
    assert make_teacher(tiny.model(), "base").nbytes > 0  # without PEFT it is the frozen teacher


def config(folder, **overrides):
    options = dict(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
        max_completion_length=6, num_loss_tokens_to_skip=0, report_to=[], save_steps=2, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return SDFTConfig(**(options | overrides))


def trainer(folder, model, **options):
    return SDFTTrainer(model, config(folder, **options), tiny.rows(), processing_class=tiny.tokenizer())


def history(trained):
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    return [[entry[key] for key in ("loss", "kl_teacher_student")] for entry in entries]


@pytest.mark.parametrize("make", [
    lambda: lora(init_lora_weights="pissa"), lambda: trained(lora()), lambda: lora(),
], ids=["pissa", "trained before", "fresh"])  # fmt: skip
def test_resume_keeps_the_teacher(tmp_path, make):
    straight = trainer(tmp_path, make())
    start = copy.deepcopy(straight.distiller.state_dict())
    straight.train()
    resumed = trainer(tmp_path, make(), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed) == history(straight)
    for name, tensor in resumed.distiller.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_resume_from_another_start_is_refused_or_restored(tmp_path):
    """A checkpoint given as the model would be the teacher of the rest of the run."""
    fresh, before = tmp_path / "fresh", tmp_path / "before"
    trainer(fresh, lora(), max_steps=2).train()
    begun = trainer(before, trained(lora()), max_steps=2)
    start = copy.deepcopy(begun.distiller.state_dict())
    begun.train()
    checkpoint = lambda folder: peft.PeftModel.from_pretrained(  # noqa: E731
        tiny.model(), folder / "checkpoint-2", is_trainable=True
    )
    with pytest.raises(ValueError, match=r"has no teacher.safetensors: .*the model the run started from"):
        trainer(fresh, checkpoint(fresh)).train(resume_from_checkpoint=True)
    trainer(fresh, checkpoint(fresh), teacher_model_kind="base", max_steps=3).train(resume_from_checkpoint=True)
    restored = trainer(before, checkpoint(before), max_steps=3)
    restored.train(resume_from_checkpoint=str(before / "checkpoint-2"))
    for name, tensor in restored.distiller.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    with pytest.raises(ValueError, match="not the base with adapters off"):
        trainer(before, lora(), max_steps=3).train(resume_from_checkpoint=str(before / "checkpoint-2"))


def test_states_of_frozen_adapters():
    fresh, before = make_teacher(lora()), make_teacher(trained(lora()))
    assert fresh.state_dict() == {} and len(before.state_dict()) == 8
    with pytest.raises(ValueError, match="teacher is the base, adapters off, .*teacher='base'"):
        before.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="not the base with adapters off: it has 8 tensors"):
        fresh.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        before.load_state_dict(make_teacher(trained(lora(r=3))).state_dict())


def test_a_restored_teacher_forgets_the_prefixes_of_before():
    """Its copies are written in place, which the cache would take for a change of weights in mid-run."""
    distiller = SelfDistiller(lora(init_lora_weights=False), "frozen", skip_first_tokens=0)
    assert distiller.passes.cache is not None
    prompts = [list(range(1, 12)), list(range(2, 11))]
    batch = DistillBatch(prompts, [[*p, *p] for p in prompts], [[[3, 4, 5], [6, 7]], [[5, 4], [8, 9, 3]]])
    before = distiller(batch)
    distiller.load_state_dict(distiller.state_dict())
    assert torch.equal(distiller(batch).loss, before.loss)


def test_a_teacher_made_by_hand_is_looked_at_too():
    with pytest.raises(ValueError, match="fp16"):
        SelfDistiller(tiny.model(), ModelTeacher(tiny.model().half()))
