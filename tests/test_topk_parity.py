"""Op 2 against what others compute: TRL's own function, and the formulas of SDPO, OPSD, tinker-cookbook, verl, NeMo-RL.

Value and gradient to 1e-10 in fp64 through the reference and (with a bucket: 1e-9) through the op; in fp32 the op's
error is at most twice that of their formula.
"""

import pytest
import torch
import torch.nn.functional as F
from topk_cases import draw, restrict, run, to, upstream

from sdft_kernels.testing import assert_within_budget, relative_error
from sdft_kernels.topk_divergence import linear_topk_divergence

K = 20
GRADS = ("grad_student_input", "grad_student_weight", "grad_student_bias")


def logits(x, side):
    z = x[f"{side}_input"] @ x[f"{side}_weight"].t()
    return z if x.get(f"{side}_bias") is None else z + x[f"{side}_bias"]


def theirs(x, formula, weight, temperature=1.0):
    """Value and gradients of sum_n weight_n formula(student logits, teacher logits)_n by autograd."""
    x = to(x, x["student_input"].dtype)
    leaves = {n: x[n].requires_grad_() for n in ("student_input", "student_weight", "student_bias")}
    with torch.no_grad():
        teacher = logits(x, "teacher") / temperature
    value = formula(logits(x, "student") / temperature, teacher)
    (weight.to(value.dtype) * value).sum().backward()
    return {"divergence": value.detach()} | {f"grad_{n}": v.grad for n, v in leaves.items()}


def assert_parity(formula, options, ours=None, kinds=("peaked", "near", "nearer", "flat"), cached=None, offset=None):
    """`cached(x)` makes a teacher_topk; `offset(x)` is what their value holds beyond ours (no gradient)."""
    weight = upstream(37)
    for kind in kinds:
        x = draw(kind, bias=True, teacher_hidden=24, vocabulary=503)
        x = {n: v for n, v in x.items() if n not in ("target", "mask")}
        wide = to(x, torch.float64)
        temperature = options.get("temperature", 1.0)
        truth = theirs(wide, formula, weight, temperature)
        eager = theirs(x, formula, weight, temperature)
        for impl, dtype in (("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)):
            arguments, mode = to(x, dtype), dict(options)
            if cached is not None:
                mode["teacher_topk"] = cached(arguments)
                arguments = {n: v for n, v in arguments.items() if not n.startswith("teacher_")}
            actual = run(arguments, impl, weight=weight, **mode) if ours is None else ours(arguments, impl, weight)
            if offset is not None:
                actual["divergence"] = actual["divergence"] + offset(to(x, dtype))
            for name in ("divergence", *GRADS):
                if dtype == torch.float64:
                    # Their 1 - mass keeps 9 digits of a tail of 1e-7; the op sums the tail itself.
                    limit = 1e-9 if impl == "torch" and options.get("tail") == "bucket" else 1e-10
                    assert relative_error(actual[name], truth[name]) < limit, (kind, impl, name)
                else:
                    assert_within_budget(actual[name], eager[name], truth[name], name=f"{kind} {name}")


def teacher_topk(x, k=K, renormalize=False):
    logprobs, ids = logits(x, "teacher").log_softmax(-1).topk(k)
    return ids, logprobs.log_softmax(-1) if renormalize else logprobs


@pytest.mark.parametrize("alpha", (0.0, 0.3, 0.5, 1.0))
@pytest.mark.parametrize("tail", (False, True))
def test_trl_topk_logits(alpha, tail):
    """SDFT and SDPO of TRL: student's top k; TRL's own function. Its trainer divides by the temperature first."""
    theirs_ = pytest.importorskip("trl.experimental.sdft.loss_utils").compute_topk_self_distillation_loss

    def formula(student, teacher):
        return theirs_(student, teacher, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=tail)

    # Their 1 - mass loses what the tail is short of 1: at 20 entries the smallest tail is 1e-8, at 8 it is 1e-5, and
    # only there do two ways of multiplying the same matrices agree to 1e-10.
    k = 8 if tail else K
    options = dict(k=k, alpha=alpha, tail="bucket" if tail else "renormalize")
    assert_parity(formula, options)
    assert_parity(formula, options | {"temperature": 0.7}, kinds=("near",))


def test_trl_defaults_are_ours():
    """SDFTConfig: student's top 100, alpha 0.5, no tail."""
    config = pytest.importorskip("trl.experimental.sdft").SDFTConfig
    fields = config.__dataclass_fields__
    theirs_ = {n: fields[f"distillation_{n}"].default for n in ("alpha", "topk", "add_tail", "mode")}
    assert theirs_ == {"alpha": 0.5, "topk": 100, "add_tail": False, "mode": "topk_logits"}
    loss = pytest.importorskip("trl.experimental.sdft.loss_utils").compute_topk_self_distillation_loss
    x = to(draw(vocabulary=503, bias=True), torch.float64)
    expected = loss(
        logits(x, "student"), logits(x, "teacher"),
        distillation_topk=100, distillation_alpha=0.5, distillation_add_tail=False,
    )  # fmt: skip
    x.pop("target")
    assert relative_error(run(x, "torch", k=100)["divergence"], expected) < 1e-10


def add_tail(log_probs):
    log_s = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(log_s))], dim=-1)


def jsd_terms(x, y, beta):
    if beta == 0:
        return F.kl_div(x, y, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(y, x, reduction="none", log_target=True)
    b = torch.tensor(beta, dtype=x.dtype)
    m = torch.logsumexp(torch.stack([x + torch.log(1 - b), y + torch.log(b)]), 0)
    of_teacher, of_student = (F.kl_div(m, v, reduction="none", log_target=True) for v in (y, x))
    return b * of_teacher + (1 - b) * of_student


def test_sdpo_token_mean_with_tail_and_importance_clip():
    """SDPO: student's top k with a bucket, alpha 0.5, ratio clipped at 2, mean over tokens: a weight per token here."""
    g = torch.Generator().manual_seed(3)
    noise, mask = 0.5 * torch.randn(37, generator=g), torch.rand(37, generator=g) < 0.8
    target = torch.randint(503, (37,), generator=g)

    def weights(student_logprob):
        ratio = (student_logprob - (student_logprob + noise)).clamp(-20, 20).exp().clamp(max=2.0)
        return ratio * mask / mask.sum()

    def formula(student, teacher):
        x, y = student.log_softmax(-1), teacher.log_softmax(-1)
        ids = x.topk(K).indices
        per_token = jsd_terms(add_tail(x.gather(1, ids)), add_tail(y.gather(1, ids)), 0.5).sum(-1)
        return per_token * weights(x.gather(1, target[:, None])[:, 0].detach())

    def ours(arguments, impl, weight):
        leaves = {n: arguments[n].requires_grad_() for n in ("student_input", "student_weight", "student_bias")}
        options = dict(k=K, tail="bucket", alpha=0.5, target=target, mask=mask)
        tokens = linear_topk_divergence(**(arguments | leaves), **options, impl=impl)
        value = tokens.divergence * weights(tokens.student_logprob)
        (weight.to(value.dtype) * value).sum().backward()
        return {"divergence": value.detach()} | {f"grad_{n}": v.grad for n, v in leaves.items()}

    assert_parity(formula, {"tail": "bucket"}, ours=ours)


@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("clip", (None, 0.05, 0.001))
def test_opsd(beta, clip):
    """OPSD: teacher's top k, both renormalised, each entry's term clipped; a temperature on both."""

    def formula(student, teacher):
        ids = teacher.topk(K).indices
        x, y = (z.gather(1, ids).log_softmax(-1) for z in (student, teacher))
        terms = jsd_terms(x, y, beta)
        return (terms if clip is None else terms.clamp(max=clip)).sum(-1)

    assert_parity(formula, dict(k=K, support="teacher", alpha=beta, per_entry_clip=clip, temperature=1.1))


def test_tinker_forward_is_a_drop_against_renormalised_teacher():
    """tinker-cookbook SDFT: -sum_k w_k log q_k, w the teacher's top 20 renormalised, q over the whole vocabulary."""

    def formula(student, teacher):
        w, ids = teacher.log_softmax(-1).topk(K)
        return -(w.log_softmax(-1).exp() * student.log_softmax(-1).gather(1, ids)).sum(-1)

    def entropy(x):
        w = teacher_topk(x, renormalize=True)[1]
        return -(w.exp() * w).sum(-1)

    options = dict(tail="drop", alpha=0.0)
    assert_parity(formula, options, cached=lambda x: teacher_topk(x, renormalize=True), offset=entropy)


def test_tinker_reverse():
    """sum_k p_k sg[log p_k - log t_k], both renormalised: KL(p_s || p_t), whose other gradient term is 0."""

    def formula(student, teacher):
        ids = teacher.topk(K).indices
        x, y = (z.gather(1, ids).log_softmax(-1) for z in (student, teacher))
        return (x.exp() * (x - y).detach()).sum(-1)

    assert_parity(formula, dict(k=K, support="teacher", alpha=1.0))


def test_verl_forward_kl_topk():
    """verl: cached top k of the teacher, raw probabilities, at least 0."""

    def formula(student, teacher):
        y, ids = teacher.log_softmax(-1).topk(K)
        return (y.exp() * (y - student.log_softmax(-1).gather(1, ids))).sum(-1).clamp_min(0)

    def ours(arguments, impl, weight):
        leaves = {n: arguments[n].requires_grad_() for n in ("student_input", "student_weight", "student_bias")}
        mine = {n: v for n, v in arguments.items() if not n.startswith("teacher_")} | leaves
        value = linear_topk_divergence(
            **mine, teacher_topk=teacher_topk(arguments), tail="drop", alpha=0.0, impl=impl
        ).divergence.clamp_min(0)
        (weight.to(value.dtype) * value).sum().backward()
        return {"divergence": value.detach()} | {f"grad_{n}": v.grad for n, v in leaves.items()}

    assert_parity(formula, {}, ours=ours)


def test_verl_clamp_matters():
    """A truncated sum is not a divergence: negative where a sharper student holds more of the support."""
    x, mode = restrict(draw("flat", dtype=torch.float64, vocabulary=503), "cached", {"temperature": 2.0})
    mode |= {"tail": "drop", "alpha": 0.0, "temperature": 1.0}
    assert run(x, "torch", **mode)["divergence"].lt(0).any()


def test_nemo_rl_mixed_kl():
    """NeMo-RL: teacher's top k renormalised, w KL(t || s) + (1 - w) KL(s || t): two calls, one cache."""

    def formula(student, teacher):
        ids = teacher.topk(K).indices
        x, y = (z.gather(1, ids).log_softmax(-1) for z in (student, teacher))
        return 0.3 * jsd_terms(x, y, 0.0).sum(-1) + 0.7 * jsd_terms(x, y, 1.0).sum(-1)

    def ours(arguments, impl, weight):
        cached = teacher_topk(arguments)
        arguments = {n: v for n, v in arguments.items() if not n.startswith("teacher_")}
        both = [run(arguments, impl, weight=weight, alpha=a, teacher_topk=cached) for a in (0.0, 1.0)]
        return {n: 0.3 * both[0][n] + 0.7 * both[1][n] for n in ("divergence", *GRADS)}

    assert_parity(formula, {}, ours=ours)


def test_nemo_rl_zero_outside_topk_forward():
    """NeMo-RL zero_outside_topk: the teacher renormalised, the student's global log-probabilities; forward part."""

    def formula(student, teacher):
        y, ids = teacher.topk(K)
        y = y.log_softmax(-1)
        return (y.exp() * (y - student.log_softmax(-1).gather(1, ids))).sum(-1)

    options = dict(tail="drop", alpha=0.0)
    assert_parity(formula, options, cached=lambda x: teacher_topk(x, renormalize=True))


def test_clip_turns_the_gradient_and_a_weight_per_token_does_not():
    """The warning of `per_entry_clip`: where the models disagree the clipped sum points away from the true gradient."""
    z_s, z_t = torch.tensor([[6.0, 0.0]]).double(), torch.tensor([[0.0, 6.0]]).double()
    x = dict(student_weight=torch.eye(2).double(), teacher_weight=torch.eye(2).double(), teacher_input=z_t)

    def gradient(loss):
        leaf = z_s.clone().requires_grad_()

        def divergence(clip):
            return linear_topk_divergence(leaf, **x, k=2, alpha=0.0, per_entry_clip=clip).divergence

        loss(divergence).sum().backward()
        return leaf.grad.flatten()

    def safe(divergence):
        d = divergence(None)
        return d * (0.05 / d.detach()).clamp(max=1)

    true = gradient(lambda divergence: divergence(None))
    clipped, weighted = gradient(lambda divergence: divergence(0.05)), gradient(safe)
    assert F.cosine_similarity(clipped, true, 0) < -0.9
    assert F.cosine_similarity(weighted, true, 0) > 0.999
