"""Op 1 against the full-vocabulary losses of others: called where they install, else by formula.

Value and gradient to 1e-10 in fp64 through the reference and through the op; in fp32 the op's error is at most twice
theirs. (TRL's SDFT `full_logits` is in `test_divergence_loss.py`, top-k losses are in `test_topk_parity.py`.)
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sdft_kernels import AffineTokenLoss, linear_divergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels.divergence.gallery import (
    combine,
    importance_weighted,
    k1_student_teacher,
    k1_teacher_student,
    k2_student_teacher,
    k3_student_teacher,
    mixed_kl,
)
from sdft_kernels.testing import KINDS, assert_within_budget, make_divergence_inputs, relative_error

B, L, V = 4, 9, 503
GRADS = ("student_input", "student_weight", "student_bias")
ALPHAS = (0.0, 0.3, 0.5, 1.0)

_G = torch.Generator().manual_seed(11)
MASK = torch.ones(B, L, dtype=torch.bool)
MASK[1, 5:] = MASK[3, 1:] = False
OLD = torch.randn(B, L, generator=_G, dtype=torch.float64) - 2.0
ROLLOUT = torch.rand(B, L, generator=_G, dtype=torch.float64) + 0.5
SAMPLED = torch.randint(V, (B, L), generator=_G)


def draw(kind, seed=0):
    x = make_divergence_inputs(kind, B * L, V, hidden=32, teacher_hidden=40, bias=True, seed=seed)
    # Half of the targets are likely ones, half are anything.
    target = torch.where(torch.arange(B * L) % 2 == 0, x.target.clamp(min=0), SAMPLED.flatten())
    return x.replace(target=target)


def leaves_of(x):
    x = x.to(x.student_input.dtype)
    return x, {name: getattr(x, name).requires_grad_() for name in GRADS}


def theirs(x, loss, scale=(1.0, 1.0)):
    """Value and gradients of loss(student logits, teacher logits, x), (B, L, V) each, by autograd."""
    x, leaves = leaves_of(x)
    z = [getattr(x, f"{side}_input") @ getattr(x, f"{side}_weight").t() for side in ("student", "teacher")]
    z = [z[0] + x.student_bias, z[1] + x.teacher_bias]
    value = loss(*(s * v.view(B, L, V) for s, v in zip(scale, z, strict=True)), x)
    value.backward()
    return {"loss": value.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def ours(x, token_loss, impl, **options):
    """The same of `linear_divergence_loss`."""
    x, leaves = leaves_of(x)
    loss, _ = linear_divergence_loss(**x.tensors(), token_loss=token_loss, impl=impl, **options)
    loss.backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_parity(loss, token_loss, *, fp32=True, mask=None, scale=(1.0, 1.0), **options):
    """In fp64 to 1e-10; `fp32`: within the error budget there too."""
    for kind in KINDS:
        x = draw(kind)
        wide = x.to(torch.float64)
        truth = theirs(wide, loss, scale)
        for impl in ("reference", "torch"):
            actual = ours(wide.replace(mask=mask), token_loss, impl, **options)
            for name, expected in truth.items():
                # A KL of 1e-7 is what is left of terms of 1e-3: two fp64 formulas agree on it to 1e-9.
                limit = 1e-8 if (kind, name) == ("nearer", "loss") else 1e-10
                assert relative_error(actual[name], expected) <= limit, (kind, impl, name)
        if fp32:
            actual, eager = ours(x.replace(mask=mask), token_loss, "torch", **options), theirs(x, loss, scale)
            for name in GRADS:
                assert_within_budget(actual[name], eager[name], truth[name], name=f"{kind} {name}")
    if fp32:
        assert_values_within_budget(loss, token_loss, mask, scale, options)


def assert_values_within_budget(loss, token_loss, mask, scale, options):
    """fp32 values over many draws together: one sum's rounding error can be 0 by luck.

    Where models are near, whose luck is better decides a sum; its terms are judged in `test_divergence_values.py`.
    """
    values = []
    for seed, kind in itertools.product(range(8), ("peaked", "flat")):
        x = draw(kind, seed)
        truth = theirs(x.to(torch.float64), loss, scale)["loss"]
        both = ours(x.replace(mask=mask), token_loss, "torch", **options), theirs(x, loss, scale)
        values.append([v["loss"].double() / truth for v in both])
    actual, eager = (torch.stack(column) for column in zip(*values, strict=True))
    assert_within_budget(actual.float(), eager.float(), torch.ones_like(actual), name="loss")


def divergence_terms(x, y, alpha):
    """Per vocabulary entry, as SDPO, OPSD, GKD and TRL write it on log-probabilities."""
    if alpha == 0:
        return F.kl_div(x, y, reduction="none", log_target=True)
    if alpha == 1:
        return F.kl_div(y, x, reduction="none", log_target=True)
    m = torch.logsumexp(torch.stack([x + math.log(1 - alpha), y + math.log(alpha)]), 0)
    of_teacher, of_student = (F.kl_div(m, v, reduction="none", log_target=True) for v in (y, x))
    return alpha * of_teacher + (1 - alpha) * of_student


def divergence(z_s, z_t, alpha, temperature=1.0):
    return divergence_terms((z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1), alpha).sum(-1)


def logprob(z, target):
    return z.log_softmax(-1).gather(-1, target.view(B, L, 1))[..., 0]


# SDPO's (and verl's) aggregation modes of a (B, L) loss, and the weight per token that each one is.
REDUCTIONS = {
    "token-mean": (
        lambda v: (v * MASK).sum() / MASK.sum(),
        MASK.double() / MASK.sum(),
    ),
    "seq-mean-token-sum": (
        lambda v: (v * MASK).sum(-1).mean(),
        MASK.double() / B,
    ),
    "seq-mean-token-mean": (
        lambda v: ((v * MASK).sum(-1) / (MASK.sum(-1).double() + 1e-8)).mean(),
        MASK / (MASK.sum(-1, keepdim=True).double() + 1e-8) / B,
    ),
    "seq-mean-token-sum-norm": (
        lambda v: (v * MASK).sum(-1).sum() / L,
        MASK.double() / L,
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sdpo_full_logit_distillation(alpha, reduction):
    """SDPO: divergence over the vocabulary, ratio to the rollout policy clipped at 2, rollout weights, a reduction."""
    reduce, weight = REDUCTIONS[reduction]

    def loss(z_s, z_t, x):
        gap = (logprob(z_s, x.target) - OLD.to(z_s)).detach().clamp(-20, 20)
        return reduce(divergence(z_s, z_t, alpha) * gap.exp().clamp(max=2.0) * ROLLOUT.to(z_s))

    token_loss = sdft_token_loss(alpha, (weight * ROLLOUT).flatten(), OLD.flatten(), 2.0)
    assert_parity(loss, token_loss, mask=MASK.flatten(), fp32=reduction == "token-mean")


@pytest.mark.parametrize("clip", (None, 2.0))
def test_sampled_token_of_sdpo_and_trl(clip):
    """TRL's own function and its clip; SDPO's `full_logit_distillation=False` is the same."""
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")

    def loss(z_s, z_t, x):
        target = x.target.view(B, L)
        value = trl.compute_sampled_token_self_distillation_loss(z_s, z_t, target, distillation_alpha=1.0)
        if clip is not None:
            value = trl.apply_importance_sampling_clipping(value, logprob(z_s, x.target), OLD.to(z_s), clip)
        return ((value * MASK).sum(-1) / MASK.sum(-1).clamp(min=1)).mean()

    token_loss = k1_student_teacher((MASK / MASK.sum(-1, keepdim=True).double() / B).flatten())
    if clip is not None:
        token_loss = importance_weighted(token_loss, OLD.flatten(), clip)
    assert_parity(loss, token_loss, mask=MASK.flatten())


@pytest.mark.parametrize("beta", ALPHAS)
def test_opsd_full_vocabulary(beta):
    """OPSD: temperature on both, mean over the labels that are not -100."""

    def loss(z_s, z_t, x):
        return divergence(z_s, z_t, beta, 1.1)[MASK].sum() / MASK.sum()

    assert_parity(loss, sdft_token_loss(beta), mask=MASK.flatten(), temperature=1.1)


def test_opsd_thinking_machines():
    """A = (log p_t - log p_s) without gradient, loss -mean(A log p_s)."""

    def loss(z_s, z_t, x):
        s, t = (logprob(z / 1.1, x.target)[MASK] for z in (z_s, z_t))
        return -((t - s).detach() * s).mean()

    token_loss = k1_student_teacher(1 / MASK.sum().item())
    assert_parity(loss, token_loss, mask=MASK.flatten(), temperature=1.1)


@pytest.mark.parametrize("items", (None, 50))
@pytest.mark.parametrize("beta", ALPHAS)
def test_gkd_of_trl(beta, items):
    """GKD's own function: mean over the valid labels, or over the items of the whole batch."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    if not hasattr(trainer, "generalized_jsd_loss"):
        pytest.skip("this TRL's GKDTrainer has no generalized_jsd_loss")

    def loss(z_s, z_t, x):
        labels = x.target.view(B, L).masked_fill(~MASK, -100)
        return trainer.generalized_jsd_loss(z_s, z_t, labels, beta=beta, temperature=0.9, num_items_in_batch=items)

    token_loss = sdft_token_loss(beta, None if items is None else 1 / items)
    assert_parity(loss, token_loss, mask=MASK.flatten(), temperature=0.9, fp32=items is None)


@pytest.mark.parametrize("share", (0.0, 0.3, 1.0))
def test_nemo_rl_mixed_kl(share):
    """NeMo-RL: w forward + (1 - w) reverse over the global number of valid tokens; w = 0: its full vocabulary."""

    def loss(z_s, z_t, x):
        value = share * divergence(z_s, z_t, 0.0) + (1 - share) * divergence(z_s, z_t, 1.0)
        return (value * MASK).sum() / 77

    assert_parity(loss, mixed_kl(share, (MASK.double() / 77).flatten()), mask=MASK.flatten())


@pytest.mark.parametrize("estimator", ("k2", "k3"))
def test_verl_estimators(estimator):
    """verl's `kl_penalty`, token mean: k2, and k3 with its limits of 20 on the exponent and 10 on the value."""

    def loss(z_s, z_t, x):
        s, t = logprob(z_s, x.target), logprob(z_t, x.target)
        gap = (t - s).clamp(-20, 20)
        value = 0.5 * (s - t).square() if estimator == "k2" else (gap.exp() - gap - 1).clamp(-10, 10)
        return (value * MASK).sum() / MASK.sum()

    weight = (MASK.double() / MASK.sum()).flatten()
    token_loss = k2_student_teacher(weight) if estimator == "k2" else k3_student_teacher(weight, maximum=10.0)
    assert_parity(loss, token_loss, mask=MASK.flatten())


def test_fast_llm_scales_only_the_teacher_by_the_temperature():
    """Fast-LLM: student z s, teacher z s / T, sum over all rows by their number."""
    options = dict(student_logit_scale=0.7, teacher_logit_scale=0.7 / 1.5)
    assert_parity(lambda z_s, z_t, x: divergence(z_s, z_t, 0.0).mean(), None, scale=(0.7, 0.7 / 1.5), **options)


@pytest.mark.parametrize("beta", ALPHAS)
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_liger_chunked_jsd(beta, temperature):
    """Liger's fused linear JSD on CPU, its soft loss alone. It sums chunks in fp32 even for fp64 inputs."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed")
    labels = torch.zeros(B * L, dtype=torch.long).masked_fill(~MASK.flatten(), -100)
    function = liger.LigerFusedLinearJSDFunction

    def fused(x):
        x, leaves = leaves_of(x)
        heads = (x.student_input, x.student_weight, x.teacher_input, x.teacher_weight)
        value = function.apply(
            *heads, labels, x.student_bias, x.teacher_bias, 0.0, 1.0, beta, -100, temperature, False, 8
        )
        value.backward()
        return {"loss": value.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def on_logits(z_s, z_t, x):
        z = ((v / temperature).view(B * L, V) for v in (z_s, z_t))
        return function.distillation_loss_fn(*z, beta=beta, target=labels) / MASK.sum()

    token_loss, mask = sdft_token_loss(beta), MASK.flatten()
    assert_parity(on_logits, token_loss, mask=mask, temperature=temperature, fp32=False)
    for kind in KINDS:
        x = draw(kind)
        truth = fused(x.to(torch.float64))
        for impl in ("reference", "torch"):
            actual = ours(x.to(torch.float64).replace(mask=mask), token_loss, impl, temperature=temperature)
            assert relative_error(actual["loss"], truth["loss"]) < 1e-6
            for name in GRADS:
                assert relative_error(actual[name], truth[name]) <= 1e-10, (kind, impl, name)
        actual, eager = ours(x.replace(mask=mask), token_loss, "torch", temperature=temperature), fused(x)
        for name in GRADS:
            assert_within_budget(actual[name], eager[name], truth[name], name=f"{kind} {name}")


def test_liger_with_its_hard_loss():
    """Its default: half cross-entropy, half JSD. The cross-entropy is in fp32 (and never at the temperature)."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    module = liger.LigerFusedLinearJSDLoss(compiled=False, chunk_size=8)
    weight = (MASK.double() / MASK.sum()).flatten()
    token_loss = combine(k1_teacher_student(0.5 * weight), sdft_token_loss(0.5, 0.5 * weight))
    assert isinstance(token_loss, AffineTokenLoss)
    for kind in KINDS:
        x, leaves = leaves_of(draw(kind))
        labels = x.target.masked_fill(~MASK.flatten(), -100)
        heads = (x.student_input, x.student_weight, x.teacher_input, x.teacher_weight)
        module(*heads, labels, x.student_bias, x.teacher_bias).backward()
        wide = draw(kind).to(torch.float64).replace(mask=MASK.flatten())
        truth = ours(wide, token_loss, "reference")
        actual = ours(draw(kind).replace(mask=MASK.flatten()), token_loss, "torch")
        for name, leaf in leaves.items():
            assert relative_error(leaf.grad, truth[name]) < 1e-4, name  # the same loss
            assert_within_budget(actual[name], leaf.grad, truth[name], name=f"{kind} {name}")


TRANSFORMS = {
    "plain": ({}, {}),
    "softcap": (
        dict(
            temperature=0.8,
            student_logit_scale=1.2,
            student_softcap=20.0,
            teacher_logit_scale=0.9,
            teacher_softcap=30.0,
        ),
        (0.8, 1.2, 20.0, 0.9, 30.0),
    ),
}


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("beta", ALPHAS)
def test_trl_chunked_divergence_function(beta, transforms):
    """TRL's kernel: fp32 inside whatever comes in, so it is judged in fp32; per-token values, entropy, gradients."""
    function = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    options, theirs_ = TRANSFORMS[transforms]
    upstream = torch.randn(B * L, generator=torch.Generator().manual_seed(4))

    def run(x, values):
        value, entropy = values(x)
        (value * upstream.to(value)).sum().backward()
        return {"value": value.detach(), "entropy": entropy.detach()}

    def trl(x):
        x, leaves = leaves_of(x)
        heads = (x.student_input, x.student_weight, x.student_bias, x.teacher_input, x.teacher_weight, x.teacher_bias)
        out = run(x, lambda x: function.apply(*heads, beta, *(theirs_ or ())))
        return out | {name: leaf.grad for name, leaf in leaves.items()}

    def mine(x, impl):
        x, leaves = leaves_of(x)

        def values(x):
            tokens = linear_divergence(**x.tensors(), jsd_alpha=beta, impl=impl, **options)
            return tokens.jsd, tokens.student_entropy

        return run(x, values) | {name: leaf.grad for name, leaf in leaves.items()}

    for kind in KINDS:
        x = draw(kind)
        truth, actual, eager = mine(x.to(torch.float64), "reference"), mine(x, "torch"), trl(x)
        for name in truth:
            assert_within_budget(actual[name], eager[name], truth[name], name=f"{kind} {name}")
            if kind in ("peaked", "flat"):  # nearer, theirs has few digits left
                assert relative_error(eager[name], truth[name]) < 1e-3, (kind, name)


@pytest.mark.parametrize("items", (None, 50))
def test_trl_distillation_trainer_reduction(items):
    """`_chunked_divergence_loss` of TRL's DistillationTrainer: masks, mean over valid tokens or items of the batch."""
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    x = draw("flat")
    theirs_, leaves = leaves_of(x)
    loss, entropy, count = module._chunked_divergence_loss(
        theirs_.student_input.view(B, L, -1), theirs_.teacher_input.view(B, L, -1),
        theirs_.student_weight, theirs_.teacher_weight, MASK, 0.3, items,
        student_lm_head_bias=theirs_.student_bias, teacher_lm_head_bias=theirs_.teacher_bias, temperature=0.9,
    )  # fmt: skip
    loss.backward()
    mask = MASK.flatten()
    token_loss = sdft_token_loss(0.3, None if items is None else 1 / items)
    actual = ours(x.replace(mask=mask), token_loss, "torch", temperature=0.9)
    _, tokens = linear_divergence_loss(**x.replace(mask=mask).tensors(), token_loss=token_loss, temperature=0.9)
    assert count == mask.sum()
    assert actual["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert tokens.student_entropy.sum() == pytest.approx(entropy.item(), rel=1e-5)
    for name, leaf in leaves.items():
        assert relative_error(actual[name], leaf.grad) < 1e-5, name
