"""The gallery against autograd on full logits, at four GEMMs, with the gradients that its docstrings promise."""

import math
from pathlib import Path

import pytest
import torch
from counting import counting_gemm
from test_divergence_gemms import H, N, V

from sdft_kernels import AffineTokenLoss, linear_divergence_loss, sdft_token_loss
from sdft_kernels.divergence import gallery, operators, rows_torch
from sdft_kernels.divergence.fields import TokenDivergence
from sdft_kernels.divergence.gallery import (
    clipped_kl,
    combine,
    directed_kl,
    entropy_aware_kl,
    entropy_bonus,
    entropy_gate,
    importance_weighted,
    k1_student_teacher,
    k1_teacher_student,
    k2_student_teacher,
    k2_teacher_student,
    k3_student_teacher,
    k3_teacher_student,
    mixed_kl,
    policy_gradient,
    ppo_clip,
    trust_region,
)
from sdft_kernels.testing import make_divergence_inputs, relative_error, run_divergence_loss

TOKENS = 37
GRADS = ("student_input", "student_weight", "student_bias")


class Numbers:
    """A token's numbers by plain PyTorch on full logits: f, r the two KLs, j the JSD at 0.3, s, t, h_s, h_t."""

    def __init__(self, z_s, z_t, target):
        x, y = z_s.log_softmax(-1), z_t.log_softmax(-1)
        p, q = x.exp(), y.exp()
        self.f, self.r = (q * (y - x)).sum(-1), (p * (x - y)).sum(-1)
        m = torch.logaddexp(x + math.log(0.7), y + math.log(0.3))
        self.j = 0.3 * (q * (y - m)).sum(-1) + 0.7 * (p * (x - m)).sum(-1)
        self.s, self.t = (v.gather(1, target[:, None])[:, 0] for v in (x, y))
        self.h_s, self.h_t = -(p * x).sum(-1), -(q * y).sum(-1)


_GENERATOR = torch.Generator().manual_seed(7)
W, A, OLD = torch.randn(3, TOKENS, generator=_GENERATOR, dtype=torch.float64)
OLD = 0.4 * OLD - 1.0
SIDE = W > 0
SHARE = torch.rand(TOKENS, generator=_GENERATOR, dtype=torch.float64)


def surrogate(n, low, high):
    ratio = (n.s - OLD).clamp(-20, 20).exp()
    return torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def importance(n):
    return (n.s - OLD).detach().clamp(-20, 20).exp().clamp(max=2.0)


# name -> (token loss, its formula per token)
CASES = {
    "mixed": (mixed_kl(0.3, W), lambda n: W * (0.3 * n.f + 0.7 * n.r)),
    "mixed_per_token": (mixed_kl(SHARE), lambda n: SHARE * n.f + (1 - SHARE) * n.r),
    "directed": (directed_kl(SIDE, W), lambda n: W * torch.where(SIDE, n.f, n.r)),
    "k1_student": (k1_student_teacher(W), lambda n: W * (n.s - n.t).detach() * n.s),
    "k1_baseline": (k1_student_teacher(W, baseline=True), lambda n: W * (n.s - n.t - n.r).detach() * n.s),
    "k2_student": (k2_student_teacher(W), lambda n: W * (n.s - n.t) ** 2 / 2),
    "k3_student": (k3_student_teacher(W), lambda n: W * ((n.t - n.s).exp() - 1 - (n.t - n.s))),
    "k3_maximum": (
        k3_student_teacher(maximum=0.01),
        lambda n: ((n.t - n.s).exp() - 1 - (n.t - n.s)).clamp(max=0.01),
    ),
    "k1_teacher": (k1_teacher_student(W), lambda n: -W * n.s),
    "k2_teacher": (k2_teacher_student(W), lambda n: W * (n.t - n.s) ** 2 / 2),
    "k3_teacher": (k3_teacher_student(W), lambda n: W * ((n.s - n.t).exp() - 1 - (n.s - n.t))),
    "entropy_aware": (entropy_aware_kl(1.0, W), lambda n: W * (n.r + torch.where(n.h_t > 1.0, n.f, 0.0))),
    "entropy_switch": (entropy_aware_kl(1.0, W, switch=True), lambda n: W * torch.where(n.h_t > 1.0, n.f, n.r)),
    "teacher_gate": (
        entropy_gate(mixed_kl(0.3, W), maximum=1.0),
        lambda n: torch.where(n.h_t <= 1.0, W * (0.3 * n.f + 0.7 * n.r), 0.0),
    ),
    "student_gate": (
        entropy_gate(k2_student_teacher(W), of="student", minimum=0.5, maximum=1.5),
        lambda n: torch.where((n.h_s >= 0.5) & (n.h_s <= 1.5), W * (n.s - n.t) ** 2 / 2, 0.0),
    ),
    "trust_scale": (
        trust_region(mixed_kl(0.3, W), 0.01),
        lambda n: W * (0.3 * n.f + 0.7 * n.r) * (0.01 / n.f.detach()).clamp(max=1),
    ),
    "trust_drop": (
        trust_region(mixed_kl(0.3, W), 0.01, measure="kl_student_teacher", drop=True),
        lambda n: torch.where(n.r <= 0.01, W * (0.3 * n.f + 0.7 * n.r), 0.0),
    ),
    "clipped": (clipped_kl(0.01, W), lambda n: W * n.f.clamp(max=0.01)),
    "clipped_jsd": (clipped_kl(0.002, W, name="jsd"), lambda n: W * n.j.clamp(max=0.002)),
    "reinforce": (policy_gradient(A, W), lambda n: -W * A * n.s),
    "truncated_importance": (
        policy_gradient(A, old_logprob=OLD, importance_clip=2.0),
        lambda n: -A * importance(n) * n.s,
    ),
    "ppo": (ppo_clip(A, OLD, W), lambda n: -W * surrogate(n, 0.2, 0.2)),
    "clip_higher": (ppo_clip(A, OLD, clip_high=0.28), lambda n: -surrogate(n, 0.2, 0.28)),
    "dual_clip": (
        ppo_clip(A, OLD, dual_clip=1.5),
        lambda n: -torch.where(A < 0, torch.max(surrogate(n, 0.2, 0.2), 1.5 * A), surrogate(n, 0.2, 0.2)),
    ),
    "entropy_bonus": (entropy_bonus(0.1), lambda n: -0.1 * n.h_s),
    "grpo_with_kl_and_bonus": (
        combine(ppo_clip(A, OLD), mixed_kl(0.0, 0.04), entropy_bonus(W)),
        lambda n: -surrogate(n, 0.2, 0.2) + 0.04 * n.r - W * n.h_s,
    ),
    "affine_sum": (
        combine(policy_gradient(A), entropy_bonus(0.1), sdft_token_loss(0.3, weight=W)),
        lambda n: -A * n.s - 0.1 * n.h_s + W * n.j,
    ),
    "sampled_token_clip": (
        importance_weighted(k1_student_teacher(W), OLD, 2.0),
        lambda n: importance(n) * W * (n.s - n.t).detach() * n.s,
    ),
    "gated_importance": (
        entropy_gate(policy_gradient(A, old_logprob=OLD, importance_clip=2.0), maximum=1.0),
        lambda n: torch.where(n.h_t <= 1.0, -A * importance(n) * n.s, 0.0),
    ),
}
AFFINE = {"mixed", "mixed_per_token", "directed", "k1_teacher", "reinforce", "truncated_importance", "entropy_bonus"}
AFFINE |= {"affine_sum"}


def inputs(kind, dtype=torch.float64):
    x = make_divergence_inputs(kind, tokens=TOKENS, vocabulary=203, hidden=24, teacher_hidden=29, bias=True)
    g = torch.Generator().manual_seed(5)
    sampled = torch.randint(203, (TOKENS,), generator=g)
    target = torch.where(torch.rand(TOKENS, generator=g) < 0.3, sampled, x.target.clamp(min=0))
    return x.replace(target=target).to(dtype)


def budget(tokens, vocabulary, hidden, teacher_hidden, itemsize=4):
    """A memory budget that holds this many tokens a chunk."""
    per_token = itemsize * (2 * vocabulary + 3 * (hidden + teacher_hidden))
    return rows_torch.scratch_bytes(TOKENS, vocabulary, itemsize) + tokens * per_token


def full_logits(x, temperature=1.0):
    leaves = [getattr(x, name).clone().requires_grad_() for name in GRADS]
    h, w, b = leaves
    z_t = (x.teacher_input @ x.teacher_weight.t() + x.teacher_bias) / temperature
    return leaves, Numbers((h @ w.t() + b) / temperature, z_t, x.target)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ("peaked", "near", "flat"))
def test_value_and_gradient(name, kind):
    token_loss, formula = CASES[name]
    assert isinstance(token_loss, AffineTokenLoss) == (name in AFFINE)
    x = inputs(kind)
    leaves, numbers = full_logits(x, 1.3)
    value = formula(numbers)
    value.sum().backward()
    for impl in ("reference", "torch"):
        actual = run_divergence_loss(x, impl, token_loss, jsd_alpha=0.3, temperature=1.3)
        assert abs(actual["loss"] - value.sum()) <= 1e-10 * value.abs().sum(), impl
        for leaf, grad in zip(leaves, GRADS, strict=True):
            assert relative_error(actual[f"grad_{grad}"], leaf.grad) <= 1e-10, (impl, grad)


def test_every_branch_is_taken():
    """What the cases above compare is on both sides of each bound, so a gate that never closes would show."""
    every = [full_logits(inputs(kind), 1.3)[1] for kind in ("peaked", "near", "flat")]
    n = {k: torch.cat([getattr(e, k).detach() for e in every]) for k in ("f", "r", "j", "s", "t", "h_s", "h_t")}
    old = OLD.repeat(3)
    ratio, gap = (n["s"] - old).exp(), n["t"] - n["s"]
    for condition in (
        *(n["h_t"] > 1.0, (n["h_s"] >= 0.5) & (n["h_s"] <= 1.5), n["f"] > 0.01, n["r"] > 0.01, n["j"] > 0.002),
        *(ratio < 0.8, ratio > 1.2, ratio > 1.28, ratio > 1.5, ratio > 2.0, gap.exp() - 1 - gap > 0.01),
    ):
        assert 3 <= condition.sum() <= 108


@pytest.mark.parametrize("pack", (True, False))
def test_masked_tokens_and_chunks(pack):
    """Weights are taken by the caller's positions, whatever the chunks and the packing."""
    x = inputs("near")
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)) < 0.6
    for name in ("k1_baseline", "ppo", "teacher_gate", "trust_scale", "gated_importance"):
        token_loss, formula = CASES[name]
        leaves, numbers = full_logits(x)
        formula(numbers)[mask].sum().backward()
        for limit in (None, budget(5, 203, 24, 29, 8)):
            actual = run_divergence_loss(x.replace(mask=mask), "torch", token_loss, pack=pack, memory_budget=limit)
            assert relative_error(actual["grad_student_weight"], leaves[1].grad) <= 1e-10, name


def every_target(x, token):
    """One token once for every target of the vocabulary."""
    vocabulary = x.student_weight.shape[0]
    hidden = (v[token : token + 1].expand(vocabulary, -1) for v in (x.student_input, x.teacher_input))
    return x.replace(
        **dict(zip(("student_input", "teacher_input"), hidden, strict=True)), target=torch.arange(vocabulary)
    )


def test_exactly_in_expectation():
    """Every target once, weighted by its probability: the sum is the expectation that the docstrings speak of."""
    row = every_target(inputs("flat"), token=0)
    _, n = full_logits(row)
    p_s, p_t = n.s.detach().exp(), n.t.exp()

    def gradient(token_loss):
        return run_divergence_loss(row, "torch", token_loss)["grad_student_weight"]

    one = torch.eye(1, 203, dtype=torch.float64)[0]
    forward, reverse = gradient(mixed_kl(1.0, one)), gradient(mixed_kl(0.0, one))
    assert relative_error(forward, reverse) > 0.1
    for token_loss, expected in (
        (k1_student_teacher(p_s), reverse),
        (k1_student_teacher(p_s, baseline=True), reverse),
        (k2_student_teacher(p_s), reverse),
        (k3_student_teacher(p_s), forward),
        (k1_teacher_student(p_t), forward),
        (k3_teacher_student(p_t), forward),
        (policy_gradient(n.t - n.s.detach(), p_s), reverse),
    ):
        assert relative_error(gradient(token_loss), expected) < 1e-10
    assert relative_error(gradient(k2_teacher_student(p_t)), forward) > 0.1  # as its docstring says
    # Values: k3 is unbiased on either side, k1_student_teacher is no KL.
    for token_loss, expected in ((k3_student_teacher(p_s), n.r[0]), (k3_teacher_student(p_t), n.f[0])):
        assert run_divergence_loss(row, "torch", token_loss)["loss"] == pytest.approx(expected.item(), rel=1e-10)
    assert abs(run_divergence_loss(row, "torch", k1_student_teacher(p_s))["loss"] - n.r[0]) > 0.1 * n.r[0]


def test_the_baseline_is_the_mean_and_lowers_the_variance():
    for token in range(TOKENS):
        _, n = full_logits(every_target(inputs("flat"), token))
        p, centred = n.s.exp(), n.s - n.t - n.r
        assert abs((p * centred).sum()) < 1e-12
        assert (p * centred.square()).sum() < (p * (n.s - n.t).square()).sum()


def test_k3_keeps_its_digits_in_fp32():
    """At gaps of 1e-3 exp(gap) - 1 - gap has one digit left in fp32."""
    s = torch.tensor([-3e-3, -1e-3, -2e-4, 2e-4, 1e-3, 3e-3])
    exact = (-s.double()).expm1() + s.double()
    for factory, sign in ((k3_student_teacher, 1), (k3_teacher_student, -1)):
        tokens = TokenDivergence(student_logprob=sign * s, teacher_logprob=torch.zeros(6))
        value = factory()(tokens, torch.arange(6))
        assert ((value - exact).abs() <= 1e-3 * exact).all()
        assert ((-s).exp() - 1 + s - exact).abs().max() > 0.01 * exact.max()


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_an_infinite_kl_is_dropped(drop, impl):
    """-inf in the student only: KL(p_t || p_s) is infinite; a trust region on it leaves nothing, not NaN."""
    x = inputs("near")
    bias = x.student_bias.clone()
    bias[:3] = -math.inf
    x = x.replace(student_bias=bias)
    result = run_divergence_loss(x, impl, trust_region(mixed_kl(1.0), 0.5, drop=drop))
    assert result["kl_teacher_student"].isinf().all() and result["loss"] == 0
    assert result["grad_student_input"].eq(0).all()
    reverse = run_divergence_loss(x, impl, directed_kl(torch.zeros(TOKENS, dtype=torch.bool)))
    assert reverse["loss"] > 0 and reverse["grad_student_input"].isfinite().all()
    weighted = run_divergence_loss(x, impl, clipped_kl(0.5, torch.zeros(TOKENS)))
    assert weighted["loss"] == 0 and weighted["grad_student_input"].eq(0).all()


def test_trust_region_keeps_the_direction_of_a_token():
    x = inputs("peaked")
    far = full_logits(x)[1].f.argmax()
    x = x.replace(mask=torch.arange(TOKENS) == far)
    plain, bounded = (run_divergence_loss(x, "torch", t) for t in (mixed_kl(1.0), trust_region(mixed_kl(1.0), 0.01)))
    a, b = plain["grad_student_input"].flatten(), bounded["grad_student_input"].flatten()
    assert plain["kl_teacher_student"].max() > 0.02
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 1 - 1e-12
    assert bounded["loss"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", CASES)
def test_four_gemms(name, monkeypatch):
    gemm = counting_gemm(N, V, H)
    monkeypatch.setattr(operators, "Gemm", gemm)
    x = make_divergence_inputs(tokens=TOKENS, vocabulary=V, hidden=H)
    x = x.replace(target=x.target.clamp(min=0)).tensors()
    for tensor in ("student_input", "student_weight"):
        x[tensor].requires_grad_()
    options = {"token_loss": CASES[name][0], "jsd_alpha": 0.3, "memory_budget": budget(20, V, H, H)}
    loss, _ = linear_divergence_loss(**x, **options, impl="torch")  # whose scratch the budget counts
    loss.backward()
    assert sum(gemm.done) == pytest.approx(4 * TOKENS / N)  # counted in units of N tokens
    assert len(gemm.done) == 2 * 4  # two chunks


BAD = [
    (lambda: mixed_kl(1.5), r"share must be within \[0, 1\], got 1.5"),
    (
        lambda: mixed_kl(W[:, None]),
        r"share must be a float or an \(N,\) tensor of numbers, got torch.float64 \(37, 1\)",
    ),
    (lambda: directed_kl(W), r"teacher_student must be an \(N,\) bool tensor, got torch.float64 \(37,\)"),
    (lambda: k2_student_teacher(W.clone().requires_grad_()), "weight requires grad"),
    (lambda: policy_gradient(A.clone().requires_grad_()), "advantage requires grad"),
    (lambda: k3_student_teacher(maximum=0.0), "maximum must be positive, got 0.0"),
    (lambda: entropy_aware_kl(-1.0), "threshold must be at least 0, got -1.0"),
    (lambda: entropy_aware_kl(math.nan), "threshold must be at least 0, got nan"),
    (lambda: entropy_gate(mixed_kl(), of="both", maximum=1.0), "of must be 'teacher' or 'student', got 'both'"),
    (lambda: entropy_gate(mixed_kl()), "minimum or maximum is needed"),
    (lambda: entropy_gate(mixed_kl(), minimum=2.0, maximum=1.0), r"\[2.0, 1.0\]"),
    (lambda: entropy_gate(sdft_token_loss(), maximum=1.0), "mean=True needs the number of tokens"),
    (lambda: entropy_gate(3, maximum=1.0), "expected an AffineTokenLoss or a callable, got int"),
    (lambda: trust_region(mixed_kl(), 0.0), "limit must be positive, got 0.0"),
    (lambda: trust_region(mixed_kl(), 1.0, measure="student_entropy"), "measure must be one of"),
    (lambda: clipped_kl(-1.0), "limit must be positive, got -1.0"),
    (lambda: clipped_kl(1.0, name="kl"), "name must be one of"),
    (lambda: policy_gradient(A, old_logprob=OLD), "give both or neither"),
    (lambda: ppo_clip(A, OLD, clip_low=1.0), "expected 0 <= clip_low < 1"),
    (lambda: ppo_clip(A, OLD, clip_high=-0.1), "clip_high >= 0"),
    (lambda: ppo_clip(A, OLD, dual_clip=1.0), "dual_clip must be above 1, got 1.0"),
    (lambda: ppo_clip(A, OLD[:, None]), r"old_logprob must be an \(N,\) tensor, got torch.float64 \(37, 1\)"),
    (lambda: ppo_clip(A, OLD.clone().requires_grad_()), "old_logprob requires grad"),
    (lambda: importance_weighted(mixed_kl(), OLD, 0.0), "importance_clip must be positive, got 0.0"),
    (lambda: importance_weighted(mixed_kl(), 0.0, 2.0), r"old_logprob must be an \(N,\) tensor, got float 0.0"),
    (lambda: combine(), "at least one token loss"),
    (lambda: combine(sdft_token_loss(0.3, 1.0), sdft_token_loss(0.4, 1.0)), "one alpha"),
    (lambda: combine(sdft_token_loss(), ppo_clip(A, OLD)), "mean=True needs the number of tokens"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_what_a_loss_needs_is_named(impl):
    x = inputs("near").replace(target=None)
    for token_loss in (k1_student_teacher(), k3_student_teacher(), ppo_clip(A, OLD), k1_teacher_student()):
        with pytest.raises(ValueError, match="target"):
            linear_divergence_loss(**x.tensors(), token_loss=token_loss, impl=impl)
    for token_loss in (clipped_kl(0.1, name="jsd"), entropy_gate(sdft_token_loss(0.3, 1.0), maximum=1.0)):
        with pytest.raises(ValueError, match="uses jsd, which needs jsd_alpha in the call"):
            linear_divergence_loss(**x.tensors(), token_loss=token_loss, impl=impl)
    with pytest.raises(ValueError, match=r"must be a float or \(37,\)"):
        linear_divergence_loss(**x.tensors(), token_loss=mixed_kl(0.5, torch.ones(36)), impl=impl)


def test_elementwise(monkeypatch):
    """The debug switch evaluates halves of a chunk and compares."""
    monkeypatch.setenv("SDFT_KERNELS_DEBUG", "1")
    for name, (token_loss, _) in CASES.items():
        loss, _ = linear_divergence_loss(**inputs("near").tensors(), token_loss=token_loss, jsd_alpha=0.3)
        assert loss.isfinite(), name


def test_the_documentation_lists_the_gallery():
    """docs/token_losses.md has a row for every public function, and none for what does not exist."""
    text = (Path(__file__).parent.parent / "docs" / "token_losses.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1].partition("(")[0] for line in text.splitlines() if line.startswith("| `")}
    public = {n for n, v in vars(gallery).items() if callable(v) and getattr(v, "__module__", "") == gallery.__name__}
    assert {n for n in public if not n.startswith("_")} == rows
