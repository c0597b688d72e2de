"""Op 1 over drawn shapes, strides, dtypes, masks, -inf columns, options and chunks: what holds whatever they are."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sdft_kernels import AffineTokenLoss, linear_divergence, linear_divergence_loss
from sdft_kernels.divergence.fields import DIFFERENTIABLE
from sdft_kernels.testing import relative_error

# Derandomised: a run tests what the run before it tested, and CI never fails on a draw that nobody changed.
PROFILE = settings(deadline=None, derandomize=True, database=None)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, interpreting -inf
FEW = settings(PROFILE, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
TRAINED = ("student_input", "student_weight", "student_bias")
DIVERGENCES = ("kl_teacher_student", "kl_student_teacher", "jsd")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
# fp32 logits up to 30 carry 2e-6, which a KL of a few nats multiplies by its gap.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}
GRADIENT_TOLERANCE = TOLERANCE | {torch.bfloat16: 0.004}


@dataclass(frozen=True)
class Call:
    """Arguments of one call, and the per-token weights that make a loss of its numbers."""

    tensors: dict[str, Any]
    options: dict[str, Any]
    infinite: tuple[str, ...]  # divergences that -inf on one side makes infinite
    upstream: torch.Tensor  # (5, N)
    tied: bool  # all logits of the teacher are equal but for their rounding, which decides the agreement
    execution: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self):
        return self.tensors["student_input"].shape[0]

    @property
    def skip(self):
        """Numbers that another order of operations may change."""
        return {"top1_agreement"} if self.tied else set()

    @property
    def kept(self):
        mask = self.tensors["mask"]
        return torch.ones(self.count, dtype=torch.bool) if mask is None else mask

    def with_tensors(self, **changes):
        return replace(self, tensors=self.tensors | changes)

    def to(self, dtype):
        cast = {n: v.to(dtype) if v is not None and v.is_floating_point() else v for n, v in self.tensors.items()}
        return self.with_tensors(**cast)


def lay_out(matrix, layout):
    """The same values, read through other strides."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "strided":
        wide = matrix.new_full((2 * matrix.shape[0], 3 * matrix.shape[1]), math.nan)
        wide[::2, ::3] = matrix
        return wide[::2, ::3]
    if layout == "offset":
        padded = matrix.new_full((matrix.shape[0], matrix.shape[1] + 1), math.nan)
        padded[:, 1:] = matrix
        return padded[:, 1:]
    if layout == "expanded":
        return matrix[:1].expand(matrix.shape) if matrix.shape[0] else matrix
    return matrix


@st.composite
def calls(draw, dtypes=(torch.float64,), minus_inf=True, vocabulary=70):
    """A call: student ~ teacher or unrelated, logits up to about 30."""
    n, v = draw(st.integers(0, 9)), draw(st.integers(1, vocabulary))
    h, h_t = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    peak, gap = draw(st.sampled_from((1.0, 8.0, 25.0))), draw(st.sampled_from((0.0, 1e-3, 0.1, None)))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student_input, student_weight = peak * normal(n, h) / 2, normal(v, h) / h**0.5
    if gap is None or h != h_t:
        teacher_input, teacher_weight = peak * normal(n, h_t) / 2, normal(v, h_t) / h_t**0.5
    else:
        teacher_input, teacher_weight = student_input + gap * normal(n, h), student_weight.clone()
    bias = {side: normal(v) if draw(st.booleans()) else None for side in ("student", "teacher")}
    infinite: tuple[str, ...] = ()
    least = 0  # columns from here on are finite in both
    if minus_inf and v > 2 and draw(st.booleans()):
        infinite, least = mask_columns(draw, bias, v)
    target = torch.randint(least, v, (n,), generator=g) if draw(st.booleans()) else None
    if target is not None and n > 1:
        target[draw(st.integers(0, n - 1))] = -100
    layouts = {n: draw(st.sampled_from(LAYOUTS)) for n in ("student_input", "teacher_input", "teacher_weight")}
    mask = {"none": None, "some": torch.rand(n, generator=g) < 0.6, "all": torch.zeros(n, dtype=torch.bool)}
    tensors = dict(
        student_input=lay_out(student_input, layouts["student_input"]),
        student_weight=lay_out(student_weight, draw(st.sampled_from(LAYOUTS[:-1]))),
        teacher_input=lay_out(teacher_input, layouts["teacher_input"]),
        teacher_weight=lay_out(teacher_weight, layouts["teacher_weight"]),
        target=target,
        mask=mask[draw(st.sampled_from(("none", "none", "some", "some", "all")))],
        student_bias=bias["student"],
        teacher_bias=bias["teacher"],
    )
    if gap is not None and h == h_t and draw(st.booleans()):  # one head: with one bias too, one stacked product
        layouts["teacher_weight"] = ""
        tensors["teacher_weight"] = tensors["student_weight"]
        if not infinite and draw(st.booleans()):
            tensors["teacher_bias"] = tensors["student_bias"]
    options = dict(
        temperature=draw(st.sampled_from((0.5, 1.0, 1.7))),
        jsd_alpha=draw(st.sampled_from((None, 0.0, 1e-3, 0.3, 0.5, 0.9, 1.0))),
        student_logit_scale=draw(st.sampled_from((0.3, 1.0))),
        teacher_logit_scale=draw(st.sampled_from((1.0, 1.1))),
        student_softcap=draw(st.sampled_from((None, 12.0))),
        teacher_softcap=draw(st.sampled_from((None, 20.0))),
    )
    tied = layouts["teacher_weight"] == "expanded"
    call = Call(tensors, options, infinite, normal(5, n), tied, dict(pack=draw(st.booleans())))
    call = call.to(draw(st.sampled_from(dtypes)))
    tokens_a_chunk = draw(st.sampled_from((None, 1, 3)))
    if tokens_a_chunk is not None:
        least = least_budget(call, call.execution["pack"])
        call.execution["memory_budget"] = least + (tokens_a_chunk - 1) * bytes_per_token(call)
    return call


def mask_columns(draw, bias, v):
    """-inf in some columns of the student's bias, the teacher's, or both; which divergences that makes infinite."""
    sides = draw(st.sampled_from(("both", "student", "teacher", "apart")))
    count = draw(st.integers(1, (v - 1) // 2))
    for i, side in enumerate(("student", "teacher")):
        if sides in (side, "both", "apart"):
            column = torch.zeros(v, dtype=torch.float64) if bias[side] is None else bias[side]
            start = count * i if sides == "apart" else 0
            column[start : start + count] = -math.inf
            bias[side] = column
    infinite = {"both": (), "student": DIVERGENCES[:1], "teacher": DIVERGENCES[1:2], "apart": DIVERGENCES[:2]}[sides]
    return infinite, 2 * count if sides == "apart" else count


def bytes_per_token(call):
    t = call.tensors
    size = 8 if t["student_input"].dtype == torch.float64 else 4
    return size * (2 * t["student_weight"].shape[0] + 3 * (t["student_input"].shape[1] + t["teacher_input"].shape[1]))


def least_budget(call, pack):
    """What the op itself asks for one token a chunk."""
    with pytest.raises(ValueError, match="needs at least") as error:
        linear_divergence(**call.tensors, **call.options, pack=pack, impl="torch", memory_budget=1)
    return int(re.search(r"at least (\d+)", str(error.value)).group(1))


def usable(call):
    """Differentiable numbers that are finite here: autograd through the reference forms 0 * inf in the others."""
    alpha = call.options["jsd_alpha"]
    jsd_is = {0.0: DIVERGENCES[0], 1.0: DIVERGENCES[1]}.get(alpha, "jsd")
    names = [n for n in DIFFERENTIABLE if n not in call.infinite]
    names = [n for n in names if n != "jsd" or (alpha is not None and jsd_is not in call.infinite)]
    return [n for n in names if n != "student_logprob" or call.tensors["target"] is not None]


def with_grad(call):
    tensors = {n: v.detach() if v is not None else None for n, v in call.tensors.items()}
    return tensors | {n: tensors[n].requires_grad_() for n in TRAINED if tensors[n] is not None}


def gradients(tensors):
    return {f"grad_{n}": tensors[n].grad for n in TRAINED if tensors[n] is not None}


def run(call, impl, **execution):
    """Every number, and the gradients of sum_k upstream_k number_k over the usable ones."""
    tensors = with_grad(call)
    tokens = linear_divergence(**tensors, **call.options, **execution, impl=impl)
    total = torch.zeros((), dtype=torch.float64)
    for name in usable(call):
        total = total + (call.upstream[DIFFERENTIABLE.index(name)] * getattr(tokens, name).double()).sum()
    total.backward()
    return {n: v.detach() for n, v in tokens._asdict().items() if v is not None} | gradients(tensors)


def run_loss(call, impl, token_loss, **execution):
    tensors = with_grad(call)
    loss, tokens = linear_divergence_loss(**tensors, token_loss=token_loss, **call.options, **execution, impl=impl)
    loss.backward()
    return {"loss": loss.detach()} | gradients(tensors)


def affine(call):
    weights = {n: call.upstream[DIFFERENTIABLE.index(n)] for n in usable(call)}
    return AffineTokenLoss(**weights, alpha=call.options["jsd_alpha"] if "jsd" in weights else None)


def assert_close(actual, truth, dtype, skip=()):
    """Each number to the tolerance, absolute and relative; each gradient in norm, absolute where it is small."""
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        if name in skip:
            continue
        value, expected = actual[name].double(), expected.double()
        assert value.shape == expected.shape, name
        if name.startswith("grad_"):
            limit = GRADIENT_TOLERANCE[dtype]
            error, scale = (value - expected).norm(), 1 + expected.norm()
            assert error <= limit * scale, (name, error, scale)
        else:
            limit = TOLERANCE[dtype]
            assert torch.allclose(value, expected, rtol=limit, atol=limit), (name, value, expected)


@settings(PROFILE, max_examples=150)
@given(call=calls())
def test_equals_the_reference_in_fp64(call):
    assert_close(run(call, "torch", **call.execution), run(call, "reference"), torch.float64, call.skip)


@settings(PROFILE, max_examples=60)
@given(call=calls(), data=st.data())
def test_one_number_on_a_frozen_head(call, data):
    """Three GEMMs: the gradient of the hidden states is formed in forward and scaled in backward."""
    assume(usable(call))
    name = data.draw(st.sampled_from(usable(call)))
    found = []
    for impl, execution in (("reference", {}), ("torch", call.execution)):
        tensors = {n: v if v is None else v.detach() for n, v in call.tensors.items()}
        leaf = tensors["student_input"].requires_grad_()
        tokens = linear_divergence(**tensors, **call.options, **execution, outputs=(name,), impl=impl)
        (call.upstream[0] * getattr(tokens, name)).sum().backward()
        found.append({f"grad_{name}": leaf.grad})
    assert_close(found[1], found[0], torch.float64)


@settings(PROFILE, max_examples=60)
@given(call=calls())
def test_losses_equal_the_reference_in_fp64(call):
    def bent(tokens, index):
        values = [getattr(tokens, n) for n in usable(call)]
        return sum((call.upstream[0][index] * v * (1 + v.detach().tanh()) for v in values), start=0 * values[0])

    for token_loss in (affine(call), bent):
        truth = run_loss(call, "reference", token_loss)
        assert_close(run_loss(call, "torch", token_loss, **call.execution), truth, torch.float64)


def minus_inf_in_the_student(impl, device="cpu"):
    """A callable without JSD on two tokens whose student bias masks a column; the gradient of `student_input`."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(2, 3, generator=g), torch.randn(5, 3, generator=g)
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0, 0.0])
    h, w, bias = (t.to(device, torch.float64 if impl == "reference" else torch.float32) for t in (h, w, bias))
    leaf = h.clone().requires_grad_()
    loss, _ = linear_divergence_loss(
        leaf, w, 0.5 * h, w, student_bias=bias, token_loss=lambda tokens, _: tokens.kl_student_teacher, impl=impl
    )
    loss.backward()
    return leaf.grad.cpu()


def test_callable_with_minus_inf_in_the_student_alone():
    assert relative_error(minus_inf_in_the_student("torch"), minus_inf_in_the_student("reference")) < 1e-6


def test_triton_callable_with_minus_inf_in_the_student_alone(interpreted):
    actual = minus_inf_in_the_student("triton", interpreted)
    assert relative_error(actual, minus_inf_in_the_student("reference")) < 1e-6


@settings(PROFILE, max_examples=60)
@given(call=calls(dtypes=(torch.float32, torch.bfloat16)))
def test_close_to_fp64_in_fp32_and_bf16(call):
    dtype = call.tensors["student_input"].dtype
    truth = run(call.to(torch.float64), "reference")
    skip = {"top1_agreement", *call.infinite}  # ties are rounding's; p_t of 1e-40 is 0 in fp32, so that KL is finite
    skip |= {"jsd"} if call.infinite and call.options["jsd_alpha"] in (0.0, 1.0) else set()
    assert_close(run(call, "torch", **call.execution), truth, dtype, skip)


@settings(PROFILE, max_examples=60)
@given(call=calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_never_negative_and_finite(call):
    actual = run(call, "torch", **call.execution)
    alpha, v = call.options["jsd_alpha"], call.tensors["student_weight"].shape[0]
    for name in (*DIVERGENCES, "student_entropy", "teacher_entropy"):
        if name in actual:
            assert (actual[name] >= 0).all(), name
            may_be_infinite = name in call.infinite or (name == "jsd" and alpha in (0.0, 1.0) and call.infinite)
            assert may_be_infinite or actual[name].isfinite().all(), name
    for name in ("student_entropy", "teacher_entropy"):
        assert (actual[name] <= math.log(v) * (1 + 1e-6) + 1e-6).all()
    if alpha is not None and 0 < alpha < 1:
        bound = -alpha * math.log(alpha) - (1 - alpha) * math.log1p(-alpha)  # the mixture's own entropy
        assert (actual["jsd"] <= bound + 1e-5).all()
    assert torch.isin(actual["top1_agreement"], torch.tensor([0.0, 1.0], dtype=actual["top1_agreement"].dtype)).all()
    for name in TRAINED:
        if call.tensors[name] is not None:
            assert actual[f"grad_{name}"].isfinite().all(), name


@settings(PROFILE, max_examples=60)
@given(call=calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)), poison=st.sampled_from((math.nan, math.inf)))
def test_masked_tokens_are_exactly_zero_whatever_they_hold(call, poison):
    assume(call.tensors["mask"] is not None)
    kept = call.kept
    clean = run(call, "torch", **call.execution)
    dirty = {n: call.tensors[n].masked_fill(~kept[:, None], poison) for n in ("student_input", "teacher_input")}
    if call.tensors["target"] is not None:
        dirty["target"] = call.tensors["target"].masked_fill(~kept, 10**6)
    actual = run(call.with_tensors(**dirty), "torch", **call.execution)
    for name, value in actual.items():
        if name in ("grad_student_weight", "grad_student_bias"):
            assert torch.equal(value, clean[name]), name
            assert kept.any() or value.eq(0).all(), name
        else:
            assert value[~kept].eq(0).all(), name
            assert torch.equal(value[kept], clean[name][kept]), name


@settings(PROFILE, max_examples=60)
@given(call=calls(), seed=st.integers(0, 2**20))
def test_permuted_tokens_permute_the_outputs(call, seed):
    order = torch.randperm(call.count, generator=torch.Generator().manual_seed(seed))
    moved = {n: call.tensors[n] for n in ("student_input", "teacher_input", "target", "mask")}
    moved = {n: None if v is None else v[order] for n, v in moved.items()}
    expected = run(call, "torch", **call.execution)
    actual = run(replace(call.with_tensors(**moved), upstream=call.upstream[:, order]), "torch", **call.execution)
    for name, value in expected.items():
        if name not in ("grad_student_weight", "grad_student_bias"):
            expected[name] = value[order]
    assert_close(actual, expected, torch.float64, call.skip)


@settings(PROFILE, max_examples=60)
@given(call=calls(), side=st.sampled_from(("student", "teacher")), shift=st.sampled_from((-200.0, 3.0, 300.0)))
def test_a_constant_added_to_all_logits_of_one_model_changes_nothing(call, side, shift):
    call = replace(call, options=call.options | {f"{side}_softcap": None})
    bias = call.tensors[f"{side}_bias"]
    bias = torch.zeros(call.tensors["student_weight"].shape[0], dtype=torch.float64) if bias is None else bias
    before, after = (run(call.with_tensors(**{f"{side}_bias": b}), "torch") for b in (bias, bias + shift))
    assert_close(after, before, torch.float64, call.skip)


@settings(PROFILE, max_examples=60)
@given(call=calls(), alpha=st.sampled_from((0.0, 1e-3, 0.3, 0.5, 0.8, 1.0)))
def test_swapped_models_swap_the_divergences(call, alpha):
    """JSD(alpha) of (s, t) is JSD(1 - alpha) of (t, s); the KLs, entropies and log-probabilities change places."""
    swap = {"student": "teacher", "teacher": "student"}

    def other(name):
        side, _, rest = name.partition("_")
        return f"{swap[side]}_{rest}" if side in swap else name

    call = replace(call, options=call.options | {"jsd_alpha": alpha})
    there = replace(
        call,
        tensors={other(n): v for n, v in call.tensors.items()},
        options={other(n): v for n, v in call.options.items()} | {"jsd_alpha": 1 - alpha},
    )
    with torch.no_grad():
        here = linear_divergence(**call.tensors, **call.options, impl="torch")._asdict()
        back = linear_divergence(**there.tensors, **there.options, impl="torch")._asdict()
    names = {n: other(n) for n in here} | {DIVERGENCES[0]: DIVERGENCES[1], DIVERGENCES[1]: DIVERGENCES[0]}
    here, back = ({n: v for n, v in d.items() if v is not None} for d in (here, back))
    assert_close({n: back[names[n]] for n in here}, here, torch.float64, call.skip)


@settings(PROFILE, max_examples=40)
@given(call=calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_the_same_bits_twice(call):
    first, second = (run(call, "torch", **call.execution) for _ in range(2))
    first |= run_loss(call, "torch", affine(call), **call.execution)
    second |= run_loss(call, "torch", affine(call), **call.execution)
    for name in first:
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name
        assert torch.equal(first[name].isnan(), second[name].isnan()), name


@settings(PROFILE, max_examples=60)
@given(call=calls(), tokens_a_chunk=st.sampled_from((1, 2, 5)))
def test_chunks_and_packing_change_nothing(call, tokens_a_chunk):
    whole = run(call, "torch")
    for pack in (True, False):
        limit = least_budget(call, pack) + (tokens_a_chunk - 1) * bytes_per_token(call)
        actual = run(call, "torch", pack=pack, memory_budget=limit)
        for name, value in whole.items():
            if name in call.skip:
                continue
            assert relative_error(actual[name], value) < 1e-10 or (actual[name] - value).norm() < 1e-12, name


@FEW
@given(call=calls(dtypes=(torch.float32, torch.bfloat16), vocabulary=300))
def test_triton_is_close_to_fp64(interpreted, call):
    """Interpreted, 0.1 s a row: few draws, of up to three blocks of the vocabulary."""
    dtype = call.tensors["student_input"].dtype
    truth = run(call.to(torch.float64), "reference")
    call = call.with_tensors(**{n: None if v is None else v.to(interpreted) for n, v in call.tensors.items()})
    skip = {"top1_agreement", *call.infinite}
    skip |= {"jsd"} if call.infinite and call.options["jsd_alpha"] in (0.0, 1.0) else set()
    actual = {n: v.cpu() for n, v in run(call, "triton", pack=call.execution["pack"]).items()}
    assert_close(actual, truth, dtype, skip)
    assert all((actual[n] >= 0).all() for n in (*DIVERGENCES, "student_entropy") if n in actual)
