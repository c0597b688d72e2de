"""A second model as the teacher; and a student that is changed after its teacher was made."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import SelfDistiller, make_teacher  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 11]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(base):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def biased():
    model = tiny.model(3, tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 29)  # with a bias
    return model


TEACHERS = {
    "as loaded": lambda student: tiny.model(3),
    "another size": lambda student: tiny.model(3, hidden_size=16, num_hidden_layers=1),
    "its head has a bias": lambda student: biased(),
    "bf16": lambda student: tiny.model(3).bfloat16(),
    "peft": lambda student: lora(tiny.model(3)),
    "frozen by hand": lambda student: tiny.model(3).requires_grad_(False),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_a_second_model_is_a_teacher_as_it_is(make, share):
    student = tiny.model().train()
    teacher = make(student).train()
    flags = [(name, p.requires_grad) for name, p in teacher.named_parameters()]
    values = copy.deepcopy(teacher.state_dict())
    distiller = SelfDistiller(student, teacher, skip_first_tokens=0, share_prefix=share)
    with torch.autocast("cpu", torch.bfloat16, enabled=teacher.dtype != student.dtype):
        for _ in range(2):  # the second reads the cache
            out = distiller(tiny.batch())
            out.loss.backward()
    assert out.loss > 0.01 and all(p.grad is not None for p in student.parameters())
    assert [(name, p.requires_grad) for name, p in teacher.named_parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters()) and teacher.training
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, values[name]), name


def test_a_teacher_may_share_the_students_tensors():
    """One embedding, tied to both heads: the gradient is the student's, as beside a teacher with a copy of it."""
    grads = []
    for shared in (True, False):
        student, teacher = tiny.model().train(), tiny.model(3)
        weight = student.model.embed_tokens.weight
        weight = weight if shared else nn.Parameter(weight.detach().clone())
        teacher.model.embed_tokens.weight = teacher.lm_head.weight = weight
        SelfDistiller(student, teacher, skip_first_tokens=0)(tiny.batch()).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    torch.testing.assert_close(*grads)
    assert grads[0].norm() > 0.1


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def untied_and_frozen(model):
    untied(model)
    model.lm_head.weight.requires_grad_(False)


def replaced(model):
    norm = model.model.norm
    model.model.norm = copy.deepcopy(norm)


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def removed(model):
    del model.model.layers[1]


def unfrozen(model):
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)


def adapter(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["v_proj"]), model)


CHANGES = {
    "untied": (untied, "lm_head.weight is another tensor"),
    "untied and frozen": (untied_and_frozen, "lm_head.weight is another tensor"),
    "resized": (lambda model: model.resize_token_embeddings(31), "embed_tokens.weight (is another|changed its shape)"),
    "replaced": (replaced, "model.norm.weight is another tensor"),
    "assigned": (assigned, "weight is another tensor"),
    "removed": (removed, r"layers.1.*weight is gone from the model"),
    "cast": (lambda model: model.bfloat16(), "changed its dtype from torch.float32 to torch.bfloat16"),
    "moved": (lambda model: model.to("meta"), "(is another tensor|changed its device from cpu to meta)"),
    "unfrozen": (unfrozen, "q_proj.weight trains, and did not or was not there"),
    "adapter": (adapter, "v_proj.weight is gone from the model"),
}


@pytest.mark.parametrize("kind", ["ema", "frozen"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_model_changed_under_its_teacher_is_an_error(change, message, kind):
    model = tiny.model()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    distiller = SelfDistiller(model, kind)
    change(model)
    if kind == "ema":
        with pytest.raises(RuntimeError, match=f"{message} .*make the SelfDistiller"):
            distiller.teacher.update()
    with pytest.raises(RuntimeError, match=message), distiller.teacher.active():
        pass


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_what_leaves_the_parameters_theirs_is_no_change(kind):
    model = tiny.model()
    teacher = make_teacher(model, kind)
    model.to("cpu").float().train().eval()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.tie_weights()
    model.model.norm.weight.requires_grad_(False)  # frozen from here on: the average goes on to it
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
    teacher.update()
    with teacher.active() as first, teacher.active() as second:  # nested
        assert torch.equal(logits(first), logits(second))


def test_switching_the_student_to_another_adapter_that_trains_is_an_error():
    peft = pytest.importorskip("peft")
    model = lora(tiny.model())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    teacher = make_teacher(model, "ema")
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"lora_A.other.weight trains, and did not"):
        teacher.update()
