"""Teachers: what they hold, when they move, what they leave untouched."""

import copy

import pytest
import torch

from sdft_kernels._ema import ema_update_

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import SelfDistiller, make_teacher  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 11]])


def step(model, optimizer):
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options)
    return peft.get_peft_model(tiny.model(), config)


def moved(model, steps=3):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for _ in range(steps):
        step(model, optimizer)


def test_frozen_keeps_the_start_and_live_follows():
    model = tiny.model()
    start = logits(model)
    frozen, live = make_teacher(model, "frozen"), make_teacher(model, "live")
    moved(model)
    assert not torch.allclose(logits(model), start)
    with frozen.active() as teacher:
        assert torch.equal(logits(teacher), start)
    with live.active() as teacher:
        assert torch.equal(logits(teacher), logits(model))
    assert frozen.distance() > 0 and live.distance() == 0
    assert frozen.nbytes == sum(p.numel() * 4 for p in model.parameters()) and live.nbytes == 0


def test_passes_run_in_eval_mode_without_gradients_and_leave_no_trace():
    model = tiny.model().train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    parameters = list(model.parameters())
    for kind in ("frozen", "live", "ema"):
        with make_teacher(model, kind).active() as teacher:
            assert not any(m.training for m in teacher.modules()) and not torch.is_grad_enabled()
        with pytest.raises(ZeroDivisionError), make_teacher(model, kind).active():
            raise ZeroDivisionError
        assert [m.training for m in model.modules()] == modes
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied


def test_frozen_parameters_are_shared():
    model = tiny.model()
    model.model.embed_tokens.weight.requires_grad_(False)
    teacher = make_teacher(model, "ema")
    assert not any("embed" in name for name in teacher.copies)
    assert teacher.head().weight is model.lm_head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_ema_is_exact_in_fp32(dtype, device):
    model = tiny.model().to(dtype)
    teacher = make_teacher(model, "ema", ema_rate=0.01, device=device)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator).to(dtype))
        teacher.update()
        for name, parameter in model.named_parameters():
            expected[name] = expected[name] + 0.01 * (parameter.detach().double() - expected[name])
    assert teacher.updates == 60
    for name, state in teacher.state.items():
        assert state.dtype == torch.float32
        torch.testing.assert_close(state.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(teacher.copies[name], state.to(dtype))
        if dtype == torch.float32:
            assert teacher.copies[name].data_ptr() == state.data_ptr()  # no second copy
    gap = sum(((p.detach().double() - expected[n]) ** 2).sum() for n, p in model.named_parameters()).sqrt()
    assert teacher.distance().item() == pytest.approx(gap.item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_compensated_ema_follows_the_exact_one(dtype, device):
    model = tiny.model().to(dtype)
    teacher = make_teacher(model, "ema", ema_rate=0.01, device=device, ema_dtype=torch.bfloat16)
    start = {n: p.detach().double() for n, p in model.named_parameters()}
    expected = dict(start)
    for _ in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.003 * torch.randn(parameter.shape).to(dtype))
        teacher.update()
        for name, parameter in model.named_parameters():
            expected[name] = expected[name] + 0.01 * (parameter.detach().double() - expected[name])
    for name, state in teacher.state.items():
        average = teacher.average(name)
        assert state.dtype == teacher.low[name].dtype == torch.bfloat16 and average.dtype == torch.float32
        assert (average.double() - expected[name]).norm() < 0.01 * (expected[name] - start[name]).norm()
        if dtype == torch.bfloat16:
            assert teacher.copies[name].data_ptr() == state.data_ptr()  # no second copy
        else:
            assert torch.equal(teacher.copies[name], average.to(dtype))
    gap = sum(((p.detach().double() - expected[n]) ** 2).sum() for n, p in model.named_parameters()).sqrt()
    assert teacher.distance().item() == pytest.approx(gap.item(), rel=1e-3)


@pytest.mark.parametrize(("dtype", "fp32", "pair"), [(torch.bfloat16, 6, 4), (torch.float32, 4, 8)])
def test_bytes_of_an_ema_by_its_dtype(dtype, fp32, pair):
    model = tiny.model().to(dtype)
    count = sum(p.numel() for p in model.parameters())
    assert make_teacher(model, "ema").nbytes == fp32 * count
    assert make_teacher(model, "ema", ema_dtype=torch.bfloat16).nbytes == pair * count


def test_compensated_state_survives_a_round_trip_bit_by_bit():
    model = tiny.model().to(torch.bfloat16)
    distiller = SelfDistiller(model, "ema", ema_rate=0.3, ema_dtype=torch.bfloat16)
    moved(model)
    distiller.teacher.update()
    assert all(low.any() for low in distiller.teacher.low.values())
    fresh = SelfDistiller(tiny.model().to(torch.bfloat16), "ema", ema_rate=0.3, ema_dtype=torch.bfloat16)
    saved = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    fresh.load_state_dict(saved)
    fresh.model.load_state_dict(model.state_dict())
    for distilled in (distiller, fresh):
        distilled.teacher.update()
    assert fresh.teacher.updates == 2
    for name, tensor in distiller.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    with fresh.teacher.active() as a:
        logits_fresh = logits(a)
    with distiller.teacher.active() as b:
        assert torch.equal(logits_fresh, logits(b))


def test_state_of_another_ema_dtype_is_refused_both_ways():
    pair, plain = (make_teacher(tiny.model(), "ema", ema_dtype=d) for d in (torch.bfloat16, torch.float32))
    with pytest.raises(ValueError, match=r"kept with ema_dtype=torch.float32, this teacher's has torch.bfloat16"):
        pair.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"kept with ema_dtype=torch.bfloat16, this teacher's has torch.float32"):
        plain.load_state_dict(pair.state_dict())
    with pytest.raises(ValueError, match=r"ema_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        make_teacher(tiny.model(), "ema", ema_dtype=torch.float16)


def test_ema_at_rate_one_is_the_student():
    model = tiny.model()
    teacher = make_teacher(model, "ema", ema_rate=1.0)
    moved(model)
    teacher.update()
    with teacher.active() as active:
        assert torch.equal(logits(active), logits(model))


@pytest.mark.parametrize("fused", [False, True])
def test_attached_teacher_moves_with_each_step_and_not_when_the_scaler_skips(fused):
    """A fused optimizer's step runs even when gradients overflow, and skips inside."""
    model = tiny.model()
    distiller = SelfDistiller(model, "ema")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    distiller.attach(optimizer)
    distiller.attach(optimizer)  # replaces, does not double
    step(model, optimizer)
    assert distiller.teacher.updates == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for broken, updates in ((True, 1), (False, 2)):
        before = model.lm_head.weight.detach().clone()
        scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
        if broken:
            model.lm_head.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.lm_head.weight) == broken
        assert distiller.teacher.updates == updates
    distiller.detach()
    step(model, optimizer)
    assert distiller.teacher.updates == 2


def test_forgetting_to_attach_raises_at_the_second_training_forward():
    model = tiny.model().train()
    distiller = SelfDistiller(model, "ema")
    distiller(tiny.batch())
    with pytest.raises(RuntimeError, match="attach"):
        distiller(tiny.batch())
    with torch.no_grad():
        distiller(tiny.batch())  # evaluation is free to go on
    for kind in ("frozen", "live"):
        free = SelfDistiller(model, kind)
        free(tiny.batch())
        free(tiny.batch())


@pytest.mark.parametrize("kind", ["live", "frozen", "ema"])
def test_a_teacher_pass_under_autocast_leaves_the_student_its_gradients(kind):
    """Autocast caches weights cast without gradients; a student pass that reused them would train nothing."""
    grads = []
    for autocast in (False, True):
        model = tiny.model().train()
        distiller = SelfDistiller(model, kind, skip_first_tokens=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = distiller(tiny.batch()).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


def test_lora_defaults_to_the_base_with_adapters_off_at_no_cost():
    model = lora().train()
    base = logits(tiny.model())
    flags = [p.requires_grad for p in model.parameters()]
    teacher = make_teacher(model)
    assert teacher.kind == "frozen" and teacher.nbytes == 0
    moved(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, base)
    with teacher.active() as active:
        torch.testing.assert_close(logits(active), base)
    assert torch.equal(logits(model), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_lora_ema_is_a_second_set_of_adapter_weights():
    model = lora(init_lora_weights=False)
    teacher = make_teacher(model, "ema", ema_rate=0.5)
    assert teacher.nbytes == sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    before = copy.deepcopy(model)
    moved(model)
    teacher.update()
    with torch.no_grad():
        for (name, a), b in zip(before.named_parameters(), model.parameters(), strict=True):
            if "lora_" in name:
                a.lerp_(b, 0.5)
    with teacher.active() as active:
        torch.testing.assert_close(logits(active), logits(before))


def test_training_a_lora_student_changes_the_student_only():
    model = lora().train()
    distiller = SelfDistiller(model, skip_first_tokens=0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    distiller.attach(optimizer)
    losses = []
    for _ in range(8):
        out = distiller(tiny.batch())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    with distiller.teacher.active() as active:
        torch.testing.assert_close(logits(active), logits(tiny.model()))


def test_state_survives_a_round_trip_and_misfits_are_refused():
    model = tiny.model()
    teacher = make_teacher(model, "ema", ema_rate=0.3)
    moved(model)
    teacher.update()
    fresh = make_teacher(tiny.model(), "ema", ema_rate=0.3)
    fresh.load_state_dict(teacher.state_dict())
    assert fresh.updates == 1
    for name in teacher.state:
        assert torch.equal(fresh.state[name], teacher.state[name])
    with pytest.raises(ValueError, match="does not fit"):
        make_teacher(tiny.model(num_hidden_layers=1), "ema").load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        make_teacher(tiny.model(intermediate_size=40), "ema").load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match="no state"):
        make_teacher(model, "live").load_state_dict(teacher.state_dict())


def test_what_a_teacher_may_be():
    model = tiny.model()
    assert make_teacher(model).kind == "ema"
    assert make_teacher(model, "base").kind == "frozen"  # TRL's name
    assert make_teacher(model, tiny.model(1)).kind == "model"
    assert make_teacher(model, model).kind == "live"
    for kind in ("sync", "cached"):
        with pytest.raises(NotImplementedError, match=kind):
            make_teacher(model, kind)
    with pytest.raises(ValueError, match="one of"):
        make_teacher(model, "best")
    with pytest.raises(ValueError, match="ema_rate"):
        make_teacher(model, "ema", ema_rate=0.0)
    with pytest.raises(ValueError, match="requires grad"):
        make_teacher(tiny.model().requires_grad_(False), "frozen")


def test_why_the_ema_state_is_fp32():
    """A student 1 % away, 250 updates at rate 0.01: fp32 closes 1 - 0.99^250 = 92 % of the gap, plain bf16 2 %."""
    start = 0.02 * torch.randn(100_000)
    student = (start + 0.01 * 0.02 * torch.randn(100_000)).bfloat16()
    gap = student.float() - start.bfloat16().float()
    closed = []
    for dtype in (torch.float32, torch.bfloat16):
        state = start.bfloat16().to(dtype)
        for _ in range(250):
            state = ema_update_(state, student, 0.01) if dtype == torch.float32 else state.lerp(student, 0.01)
        closed.append(((state.float() - start.bfloat16().float()) @ gap / (gap @ gap)).item())
    assert closed[0] == pytest.approx(1 - 0.99**250, abs=1e-3)
    assert 0.01 < closed[1] < 0.04
