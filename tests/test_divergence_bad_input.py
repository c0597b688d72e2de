"""Design section 9, one test a row: what bad, empty, masked, infinite and NaN input gets."""

import math

import pytest
import torch

from sdft_kernels import AffineTokenLoss, _dispatch, linear_divergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels.testing import (
    assert_within_budget,
    make_divergence_inputs,
    random_upstream,
    relative_error,
    run_divergence,
    run_divergence_loss,
)

INF = math.inf


def call(x, **changes):
    options = {k: changes.pop(k) for k in list(changes) if k not in x.tensors()}
    return linear_divergence(**x.replace(**changes).tensors(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_input": torch.zeros(37)}, "student_input must be 2-D"),
        ({"student_weight": torch.zeros(1003, 31)}, r"student_weight must be \(1003, 32\), got \(1003, 31\)"),
        ({"teacher_weight": torch.zeros(1001, 32)}, r"teacher_weight must be \(1003, 32\).*vocabulary"),
        ({"teacher_input": torch.zeros(36, 32)}, r"teacher_input must be \(37, 32\), got \(36, 32\)"),
        ({"student_bias": torch.zeros(5)}, r"student_bias must be \(1003,\)"),
        ({"target": torch.zeros(37)}, "target must be int64, got torch.float32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must be \(37,\)"),
        ({"mask": torch.zeros(37)}, "mask must be bool"),
        ({"teacher_input": torch.zeros(37, 32, dtype=torch.bfloat16)}, "teacher_input is torch.bfloat16 but"),
        ({"student_input": torch.zeros(37, 32).half()}, "fp16"),
        ({"student_weight": torch.zeros(1003, 32, dtype=torch.int32)}, "student_weight must be fp32, bf16 or fp64"),
        ({"student_weight": torch.zeros(0)}, "student_weight is empty.*gathered"),
        ({"student_weight": torch.zeros(1003, 32, device="meta")}, "student_weight is on meta but student_input is on"),
        ({"student_weight": [1.0]}, "student_weight must be a tensor, got list"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"student_softcap": -1.0}, "student_softcap must be positive"),
        ({"jsd_alpha": 1.5}, r"jsd_alpha must be within \[0, 1\], got 1.5"),
        ({"outputs": ("kl",)}, "outputs names 'kl'"),
        ({"outputs": ("jsd",)}, "'jsd', which needs jsd_alpha"),
        ({"target": None, "outputs": ("student_logprob",)}, "'student_logprob', which needs target"),
        ({"precision": "tf32"}, "CUDA"),
        ({"precision": "bf16"}, "precision must be None or 'tf32'"),
        ({"memory_budget": 1000}, "memory_budget=1000 bytes holds no token at a vocabulary of 1003: needs at least"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_value_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        call(make_divergence_inputs(), **change)


def test_implementations_that_cannot_run(monkeypatch):
    monkeypatch.setattr(_dispatch, "_WHY_NOT_NATIVE", "not built: no compiler")
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match=impl):
            call(make_divergence_inputs(), impl=impl)
    with pytest.raises(ValueError, match="vocab_group must be a torch.distributed process group, got object"):
        call(make_divergence_inputs(), vocab_group=object())


def test_target_out_of_range():
    x = make_divergence_inputs()
    for wrong in (1003, -1):
        target = x.target.clone()
        target[5] = wrong
        with pytest.raises(ValueError, match=rf"target\[5\] is {wrong}: must be in \[0, 1003\)"):
            call(x, target=target)
        keep = torch.ones(37, dtype=torch.bool)
        keep[5] = False
        assert call(x, target=target, mask=keep).student_logprob[5] == 0


def test_out_of_range_target_reaching_the_rows_is_nan():
    """What CUDA answers, where looking at the targets would cost a synchronisation: NaN in that token only."""
    from sdft_kernels._head import IDENTITY
    from sdft_kernels.divergence import rows_torch
    from sdft_kernels.divergence.fields import FIELDS

    z = torch.randn(3, 11)
    tokens = torch.zeros(len(FIELDS), 3)
    rows_torch.divergence_stats(z, z.clone(), torch.tensor([4, 11, -100]), (IDENTITY, IDENTITY), None, None, tokens)
    logprob = tokens[FIELDS.index("student_logprob")]
    assert logprob[0] < 0 and logprob[1].isnan() and logprob[2] == 0


def test_teacher_that_requires_grad():
    x = make_divergence_inputs()
    with pytest.raises(ValueError, match="teacher_input requires grad.*no_grad"):
        call(x, teacher_input=x.teacher_input.clone().requires_grad_())
    with pytest.raises(ValueError, match="teacher_weight requires grad.*detach"):
        call(x, teacher_weight=x.teacher_weight.clone().requires_grad_())


def test_dtensor_weight_names_the_fix():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    x = make_divergence_inputs()
    with pytest.raises(ValueError, match=r"DTensor.*forward.*full_tensor\(grad_placements=\[Partial\(\"avg\"\)\]\)"):
        call(x, student_weight=x.student_weight.as_subclass(Sharded))
    with pytest.raises(ValueError, match=r"teacher_weight is a DTensor: pass teacher_weight.detach\(\).full_tensor"):
        call(x, teacher_weight=x.teacher_weight.as_subclass(Sharded))


@pytest.mark.parametrize("pack", (True, False))
def test_no_tokens_and_all_masked(pack):
    for count, mask in ((0, False), (9, True)):
        x = make_divergence_inputs(tokens=count, bias=True)
        if mask:
            x = x.replace(mask=torch.zeros(count, dtype=torch.bool))
        result = run_divergence_loss(x, "torch", pack=pack)
        assert result["loss"] == 0
        for name, value in result.items():
            assert value.eq(0).all(), name
        assert result["grad_student_weight"].shape == (1003, 32)


def test_one_token_and_ragged_vocabularies():
    for tokens, vocabulary, hidden in ((1, 1003, 32), (1, 1, 1), (5, 2, 3), (3, 7, 1)):
        x = make_divergence_inputs("near", tokens=tokens, vocabulary=vocabulary, hidden=hidden)
        up = random_upstream(tokens, True)
        truth = run_divergence(x.to(torch.float64), "reference", up, jsd_alpha=0.3)
        actual = run_divergence(x.to(torch.float64), "torch", up, jsd_alpha=0.3)
        for name in truth:
            assert torch.allclose(actual[name], truth[name], rtol=1e-9, atol=1e-13), (tokens, vocabulary, name)


@pytest.mark.slow
def test_more_logits_than_an_int32_counts():
    """One token in 16 is in the loss: positions reach as far, in a 16th of the time."""
    tokens, vocabulary = 70_001, 30_700
    assert tokens * vocabulary > 2**31
    x = make_divergence_inputs("near", tokens=tokens, vocabulary=vocabulary, hidden=2)
    position = torch.arange(tokens)
    with torch.no_grad():
        every = linear_divergence(**x.replace(mask=(position % 16 == 0) | (position >= tokens - 3)).tensors())
    last = x.replace(**{n: getattr(x, n)[-3:] for n in ("student_input", "teacher_input", "target")})
    truth = linear_divergence(**last.to(torch.float64).tensors(), impl="reference")
    for name, value in truth._asdict().items():
        if value is not None:
            assert torch.allclose(getattr(every, name)[-3:].double(), value, rtol=1e-4, atol=1e-6), name


def test_non_contiguous_views():
    x = make_divergence_inputs("near", bias=True)
    truth = run_divergence_loss(x, "auto")

    def strided(t):
        wide = torch.empty(t.shape[0] * 2, t.shape[1] + 3)
        view = wide[::2, 1:-2]
        view.copy_(t)
        return view

    views = {k: strided(v) for k, v in x.tensors().items() if v is not None and v.dim() == 2}
    views["student_weight"] = x.student_weight.t().contiguous().t()
    for name in views:
        assert not views[name].is_contiguous()
    loss, tokens = linear_divergence_loss(**x.replace(**views).tensors())
    assert torch.allclose(loss, truth["loss"], rtol=1e-5)
    leaves = {k: views[k].detach().requires_grad_() for k in ("student_input", "student_weight")}
    linear_divergence_loss(**x.replace(**(views | leaves)).tensors())[0].backward()
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, truth[f"grad_{name}"]) < 1e-5, name


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("poison", (math.nan, INF, -INF))
def test_masked_tokens_may_hold_anything(poison, pack):
    x = make_divergence_inputs("near", mask=True)
    clean = run_divergence_loss(x, "torch", sdft_token_loss(alpha=0.3), pack=pack)
    dirty = {n: getattr(x, n).masked_fill(~x.mask[:, None], poison) for n in ("student_input", "teacher_input")}
    dirty["target"] = x.target.masked_fill(~x.mask, 10**9)
    result = run_divergence_loss(x.replace(**dirty), "torch", sdft_token_loss(alpha=0.3), pack=pack)
    for name in clean:
        assert torch.equal(result[name], clean[name]), name
    assert result["grad_student_input"][~x.mask].eq(0).all()


@pytest.mark.parametrize("side", ("student_input", "teacher_input"))
@pytest.mark.parametrize("poison", (math.nan, INF))
@pytest.mark.parametrize("loss", (None, sdft_token_loss(alpha=0.5), sdft_token_loss(alpha=1.0), "callable"))
def test_nan_stays_in_its_token(side, poison, loss):
    """NaN in that token's outputs and dX row, and in dW; never a silent finite number, never a neighbour."""
    x = make_divergence_inputs("near")
    bad = getattr(x, side).clone()
    bad[7, 3] = poison
    loss = (lambda t, i: t.kl_teacher_student + t.student_entropy) if loss == "callable" else loss
    result = run_divergence_loss(x.replace(**{side: bad}), "torch", loss)
    own = "student" if side == "student_input" else "teacher"
    numbers = ("kl_teacher_student", "kl_student_teacher", f"{own}_entropy", f"{own}_logprob", "top1_agreement")
    for name in numbers:
        assert result[name][7].isnan(), name
        assert result[name].isnan().sum() == 1, name
    assert result["loss"].isnan()
    rows = result["grad_student_input"].isnan()
    assert rows[7].all() and rows.sum() == 32
    assert result["grad_student_weight"].isnan().any()


def with_absent(x, student=(), teacher=()):
    biases = []
    for columns in (student, teacher):
        bias = torch.zeros(x.student_weight.shape[0], dtype=x.student_weight.dtype)
        bias[list(columns)] = -INF
        biases.append(bias)
    keep = sorted(set(range(x.student_weight.shape[0])) - set(student) - set(teacher))
    return x.replace(student_bias=biases[0], teacher_bias=biases[1], target=None), keep


@pytest.mark.parametrize("options", ({}, {"student_softcap": 20.0, "teacher_softcap": 20.0, "temperature": 0.8}))
def test_minus_inf_in_both_is_a_smaller_vocabulary(options):
    base = make_divergence_inputs("flat", vocabulary=203, dtype=torch.float64)
    x, keep = with_absent(base, range(0, 60), range(0, 60))
    small = base.replace(
        student_weight=base.student_weight[keep], teacher_weight=base.teacher_weight[keep], target=None
    )
    up = random_upstream(37, True, target=False)
    for impl in ("torch", "reference"):
        full = run_divergence(x, impl, up, jsd_alpha=0.3, **options)
        part = run_divergence(small, impl, up, jsd_alpha=0.3, **options)
        for name, value in part.items():
            whole = full[name][keep] if name == "grad_student_weight" else full[name]
            assert relative_error(whole, value) < 1e-12, (impl, name)
        assert full["grad_student_weight"][:60].eq(0).all()
        assert full["grad_student_bias"].isfinite().all()


def test_minus_inf_on_one_side():
    base = make_divergence_inputs("flat", vocabulary=203)
    student_only, _ = with_absent(base, student=(3, 50))
    tokens = linear_divergence(**student_only.tensors(), jsd_alpha=0.3)
    assert tokens.kl_teacher_student.eq(INF).all() and tokens.kl_student_teacher.isfinite().all()
    assert tokens.jsd.isfinite().all() and tokens.student_entropy.isfinite().all()
    teacher_only, _ = with_absent(base, teacher=(3, 50))
    tokens = linear_divergence(**teacher_only.tensors(), jsd_alpha=0.3)
    assert tokens.kl_student_teacher.eq(INF).all() and tokens.kl_teacher_student.isfinite().all()
    # The infinite direction has weight 0 (or none), so the finite one keeps a finite, right gradient.
    zero = AffineTokenLoss(kl_teacher_student=1.0, kl_student_teacher=torch.zeros(37))
    one, jsd = sdft_token_loss(weight=1.0), sdft_token_loss(alpha=0.3)
    for loss, same in ((one, one), (zero, one), (jsd, jsd)):
        actual = run_divergence_loss(teacher_only, "torch", loss)
        # Autograd through the reference would form 0 * inf in the direction that has no weight: leave that one out.
        eager, truth = (
            run_divergence_loss(teacher_only.to(d), "reference", same) for d in (torch.float32, torch.float64)
        )
        for name in ("loss", "grad_student_input", "grad_student_weight", "grad_student_bias"):
            assert actual[name].isfinite().all(), name
            assert_within_budget(actual[name], eager[name], truth[name], name=name)


def test_a_row_all_minus_inf_is_nan_in_that_token():
    from sdft_kernels._head import IDENTITY
    from sdft_kernels.divergence import rows_torch
    from sdft_kernels.divergence.fields import FIELDS

    z_s, z_t = torch.randn(3, 50), torch.randn(3, 50)
    z_s[1] = -INF
    z_s[2, :40] = z_t[2, :40] = -INF
    tokens = torch.zeros(len(FIELDS), 3)
    rows_torch.divergence_stats(z_s, z_t, None, (IDENTITY, IDENTITY), 0.3, None, tokens)
    assert tokens[0, 1].isnan() and tokens[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineTokenLoss(jsd=1.0), "needs alpha"),
        (lambda: AffineTokenLoss(alpha=2.0), "alpha must be within"),
        (lambda: AffineTokenLoss(kl_teacher_student=torch.ones(3, requires_grad=True)), "requires grad"),
        (lambda: sdft_token_loss(importance_clip=2.0), "old_logprob and importance_clip go together"),
        (lambda: sdft_token_loss(old_logprob=torch.zeros(3), importance_clip=-1.0), "importance_clip must be positive"),
    ],
)
def test_token_loss_that_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (AffineTokenLoss(kl_teacher_student=torch.ones(5)), {}, r"token_loss.kl_teacher_student must be a float or"),
        (sdft_token_loss(alpha=0.3), {"jsd_alpha": 0.5}, "jsd_alpha=0.5 disagrees with token_loss.alpha=0.3"),
        (AffineTokenLoss(student_logprob=1.0), {"target": None}, "target is needed"),
        (sdft_token_loss(old_logprob=torch.zeros(3), importance_clip=2.0), {}, r"old_logprob must be \(37,\)"),
        (lambda t, i: t.kl_teacher_student.sum(), {}, "one loss per token"),
        (lambda t, i: 3.0, {}, "one loss per token.*float"),
        ("kl", {}, "token_loss must be an AffineTokenLoss or a callable, got str"),
    ],
)
def test_loss_arguments_that_do_not_fit(loss, options, message):
    x = make_divergence_inputs()
    arguments = x.tensors() | options
    with pytest.raises(ValueError, match=message):
        linear_divergence_loss(**arguments, token_loss=loss)
