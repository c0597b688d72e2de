"""Op 3 against its fp64 reference: values, gradients, and what bad, empty, masked, infinite and NaN input gets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_kernels.testing import KINDS, assert_within_budget, make_divergence_inputs, relative_error
from sdft_kernels.token_logprob import TokenLogprob, linear_token_logprob

INF = math.inf
NAMES = TokenLogprob._fields
OPTIONS = {"plain": {}, "every": {"temperature": 0.7, "logit_scale": 0.5, "softcap": 20.0}}
SMALL = {torch.float64: 640_000, torch.float32: 330_000}  # bytes: chunks of a few tokens at V = 1003


def draw(kind="near", **options):
    x = make_divergence_inputs(kind, **options)
    return dict(input=x.student_input, weight=x.student_weight, target=x.target, bias=x.student_bias, mask=x.mask)


def to(arguments, dtype):
    """Detached copies: no gradient leaks from one run into another."""
    return {k: v.to(dtype).clone() if v is not None and v.is_floating_point() else v for k, v in arguments.items()}


def upstream(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, generator=g, dtype=torch.float64) for name in NAMES}


def run(arguments, impl, weights=None, trained=("input", "weight", "bias"), **options):
    """Every number, and ``grad_*`` of sum_k weights_k . number_k."""
    arguments = to(arguments, arguments["input"].dtype)
    leaves = {k: arguments[k].requires_grad_() for k in trained if arguments[k] is not None}
    tokens = linear_token_logprob(**arguments, impl=impl, **options)
    weights = upstream(arguments["input"].shape[0]) if weights is None else weights
    present = {name: getattr(tokens, name) for name in NAMES if getattr(tokens, name) is not None}
    sum((weights[name].to(value.dtype) * value).sum() for name, value in present.items()).backward()
    return {k: v.detach() for k, v in present.items()} | {f"grad_{k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("extra", ({}, {"bias": True, "mask": True}), ids=("plain", "bias-mask"))
def test_fp64_matches_autograd(extra, pack, options):
    x = draw(dtype=torch.float64, **extra)
    truth = run(x, "reference", **options)
    actual = run(x, "torch", pack=pack, memory_budget=SMALL[torch.float64], **options)
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        assert relative_error(actual[name], value) < 1e-13, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fp32_is_within_budget(kind, options):
    x = draw(kind, bias=True, mask=True)
    eager, truth = run(x, "reference", **options), run(to(x, torch.float64), "reference", **options)
    actual = run(x, "torch", **options)
    for name, value in truth.items():
        assert_within_budget(actual[name], eager[name], value, name=name)


@pytest.mark.parametrize("kind", ("near", "flat"))
def test_bf16_inputs_get_fp32_logits(kind):
    """Numbers as accurate as eager fp32 on the same bits; gradients rounded once, as they leave."""
    x = draw(kind, dtype=torch.bfloat16, bias=True)
    wide, truth = run(to(x, torch.float32), "reference"), run(to(x, torch.float64), "reference")
    actual = run(x, "torch")
    for name in NAMES:
        assert actual[name].dtype == torch.float32
        assert_within_budget(actual[name], wide[name], truth[name], name=name)
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert actual[name].dtype == torch.bfloat16
        assert relative_error(actual[name], truth[name]) < 0.004, name
    eager = run(x, "reference")  # bf16 logits, as everyone has them: the control that this test can fail
    assert relative_error(eager["lse"], truth["lse"]) > 100 * relative_error(actual["lse"], truth["lse"])


def test_autocast_rounds_the_operands_and_not_the_logits():
    x = draw("near")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x, "torch")
    truth = run(to(to(x, torch.bfloat16), torch.float64), "reference")
    for name in NAMES:
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], truth[name]) < 1e-6, name
    assert actual["grad_weight"].dtype == torch.float32


@pytest.mark.parametrize("outputs", [(n,) for n in NAMES] + [("entropy", "lse")])
def test_outputs_and_a_frozen_head(outputs):
    x = draw(dtype=torch.float64)
    for trained in (("input",), ("input", "weight"), ("weight",)):
        truth = run(x, "reference", trained=trained, outputs=outputs)
        actual = run(x, "torch", trained=trained, outputs=outputs, memory_budget=SMALL[torch.float64])
        assert set(actual) == {*outputs, *(f"grad_{k}" for k in trained)}
        for name, value in truth.items():
            assert relative_error(actual[name], value) < 1e-13, (trained, name)


@pytest.mark.parametrize("trained", (("input",), ("input", "weight")))
def test_a_token_without_upstream_gradient_is_untouched(trained):
    """One output is used, the others get None; weights of 0 select."""
    x = draw(dtype=torch.float64)
    bad = dict(x, input=x["input"].index_fill(0, torch.tensor([4]), math.nan))
    leaves = {k: bad[k].clone().requires_grad_() for k in trained}
    tokens = linear_token_logprob(**(bad | leaves), outputs=("logprob",))
    (grad,) = torch.autograd.grad(tokens.logprob[:3].sum(), [leaves["input"]])
    assert grad[:3].ne(0).any() and grad[5:].eq(0).all()
    if trained == ("input",):
        assert grad[4].eq(0).all()


def test_retained_graph_and_no_second_derivative():
    x = draw(dtype=torch.float64)
    leaf = x["input"].clone().requires_grad_()
    total = sum(t.sum() for t in linear_token_logprob(**(x | {"input": leaf})))
    first, second = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    tokens = linear_token_logprob(**(x | {"input": leaf}))
    (grad,) = torch.autograd.grad((scale * tokens.entropy).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_same_bits_twice_and_nearly_the_same_for_any_budget():
    x = draw(bias=True)
    one, two, small = run(x, "torch"), run(x, "torch"), run(x, "torch", memory_budget=SMALL[torch.float32])
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert relative_error(small[name], one[name]) < 1e-6, name


def test_non_contiguous_views():
    x = draw(dtype=torch.float64)
    truth = run(x, "torch")
    wide = torch.empty(74, 35, dtype=torch.float64)
    wide[::2, 1:-2] = x["input"]
    views = dict(input=wide[::2, 1:-2], weight=x["weight"].t().contiguous().t())
    leaves = {k: v.detach().requires_grad_() for k, v in views.items()}
    assert not any(v.is_contiguous() for v in leaves.values())
    weights = upstream(37)
    tokens = linear_token_logprob(**(x | leaves))
    sum((weights[n] * getattr(tokens, n)).sum() for n in NAMES).backward()
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, truth[f"grad_{name}"]) < 1e-14


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 9), vocabulary=st.integers(1, 70), hidden=st.integers(1, 9), mask=st.booleans(),
    bias=st.booleans(), softcap=st.sampled_from((None, 5.0)), temperature=st.sampled_from((0.5, 1.0)),
)  # fmt: skip
def test_any_shape(tokens, vocabulary, hidden, mask, bias, softcap, temperature):
    x = draw("flat", tokens=tokens, vocabulary=vocabulary, hidden=hidden, mask=mask, bias=bias, dtype=torch.float64)
    options = {"softcap": softcap, "temperature": temperature}
    truth, actual = run(x, "reference", **options), run(x, "torch", **options)
    for name, value in truth.items():
        assert torch.allclose(actual[name], value, rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_minus_inf_is_a_smaller_vocabulary(options):
    x = draw("flat", vocabulary=203, dtype=torch.float64)
    x["target"] = x["target"] % 143 + 60
    bias = torch.zeros(203, dtype=torch.float64)
    bias[:60] = -INF
    small = x | {"weight": x["weight"][60:], "target": x["target"] - 60}
    full = x | {"bias": bias}
    for impl in ("torch", "reference"):
        whole, part = run(full, impl, **options), run(small, impl, **options)
        for name, value in part.items():
            got = whole[name][60:] if name == "grad_weight" else whole[name]
            assert relative_error(got, value) < 1e-12, (impl, name)
        assert whole["grad_weight"][:60].eq(0).all() and whole["grad_bias"].isfinite().all()


def test_a_target_of_probability_zero():
    x = draw("flat", vocabulary=50, dtype=torch.float64, bias=True)
    x["target"] = torch.full((37,), 7)
    x["bias"][7] = -INF
    only = {name: torch.zeros(37, dtype=torch.float64) for name in NAMES} | {"logprob": torch.ones(37).double()}
    actual, truth = (run(x, impl, only, outputs=("logprob",)) for impl in ("torch", "reference"))
    assert actual["logprob"].eq(-INF).all()
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert relative_error(actual[name], truth[name]) < 1e-13, name


@pytest.mark.parametrize("poison", (math.nan, INF))
def test_nan_stays_in_its_token(poison):
    x = draw("near")
    x["input"] = x["input"].clone()
    x["input"][7, 3] = poison
    result = run(x, "torch")
    for name in NAMES:
        assert result[name][7].isnan() and result[name].isnan().sum() == 1, name
    rows = result["grad_input"].isnan()
    assert rows[7].all() and rows.sum() == 32
    assert result["grad_weight"].isnan().any()


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("poison", (math.nan, INF, -INF))
def test_masked_tokens_may_hold_anything(poison, pack):
    x = draw("near", mask=True)
    clean = run(x, "torch", pack=pack)
    off = ~x["mask"]
    dirty = x | {"input": x["input"].masked_fill(off[:, None], poison), "target": x["target"].masked_fill(off, 10**9)}
    result = run(dirty, "torch", pack=pack)
    for name in clean:
        assert torch.equal(result[name], clean[name]), name
    assert result["grad_input"][off].eq(0).all() and all(result[n][off].eq(0).all() for n in NAMES)


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("impl", ("torch", "reference"))
def test_no_tokens_and_all_masked(impl, pack):
    for count, mask in ((0, False), (9, True), (1, False)):
        x = draw(tokens=count, bias=True)
        if mask:
            x["mask"] = torch.zeros(count, dtype=torch.bool)
        for name, value in run(x, impl, pack=pack).items():
            assert value.isfinite().all(), name
            assert count == 1 or value.eq(0).all(), name


def test_absent_target():
    x = draw(dtype=torch.float64)
    assert x["target"][2] == -100
    tokens = linear_token_logprob(**x)
    assert tokens.logprob[2] == 0 and tokens.logprob[[0, 1]].lt(0).all() and tokens.entropy[2] > 0


def test_out_of_range_target_reaching_the_rows_is_nan():
    """What CUDA answers, where looking at the targets would cost a synchronisation: NaN in that token only."""
    from sdft_kernels._head import IDENTITY
    from sdft_kernels.token_logprob import rows_torch

    tile, tokens = torch.randn(3, 11), torch.zeros(3, 3)
    rows_torch.token_logprob_(tile, torch.tensor([4, 11, -100]), IDENTITY, NAMES, tokens, torch.ones(3, 3))
    assert tokens[0].isnan().tolist() == [False, True, False] and tokens[1:].isfinite().all()
    assert tile.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(37)}, "input must be 2-D"),
        ({"weight": torch.zeros(1003, 31)}, r"weight must be \(1003, 32\), got \(1003, 31\)"),
        ({"weight": torch.zeros(0)}, "weight is empty.*gathered"),
        ({"weight": torch.zeros(1003, 32).bfloat16()}, "weight is torch.bfloat16 but input is torch.float32"),
        ({"weight": torch.zeros(1003, 32, device="meta")}, "weight is on meta but input is on cpu"),
        ({"input": torch.zeros(37, 32).half()}, "fp16|fp32, bf16 or fp64"),
        ({"bias": torch.zeros(5)}, r"bias must be \(1003,\)"),
        ({"target": torch.zeros(37)}, "target must be int64"),
        ({"target": None}, "target must be a tensor, got NoneType"),
        ({"target": torch.full((37,), 1003)}, r"target\[0\] is 1003: must be in \[0, 1003\)"),
        ({"mask": torch.zeros(37)}, "mask must be bool"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"outputs": ("logp",)}, "outputs names 'logp'"),
        ({"precision": "tf32"}, "CUDA"),
        ({"memory_budget": 1000}, "memory_budget=1000 bytes holds no token at a vocabulary of 1003"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_value_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linear_token_logprob(**(draw() | change))


def test_implementations_that_cannot_run_and_a_dtensor():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    x = draw()
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match=rf"linear_token_logprob\(impl='{impl}'\) cannot run"):
            linear_token_logprob(**x, impl=impl)
    with pytest.raises(ValueError, match=r"DTensor.*forward.*full_tensor\(grad_placements=\[Partial\(\"avg\"\)\]\)"):
        linear_token_logprob(**(x | {"weight": x["weight"].as_subclass(Sharded)}))


def test_agrees_with_op_1():
    from sdft_kernels import linear_divergence

    x = make_divergence_inputs("near", bias=True, mask=True)
    options = {"temperature": 0.7}
    both = linear_divergence(**x.tensors(), **options)
    mine = linear_token_logprob(
        x.student_input, x.student_weight, x.target, bias=x.student_bias, mask=x.mask, **options
    )
    assert torch.allclose(mine.logprob, both.student_logprob, rtol=1e-5, atol=1e-6)
    assert torch.allclose(mine.entropy, both.student_entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.unpoisoned
def test_registered_operator():
    from sdft_kernels.token_logprob.operators import Options

    x = draw(bias=True, mask=True)
    tensors = [x[k] for k in ("input", "weight", "bias", "target", "mask")]
    options = Options(0.7, 1.0, 20.0, torch.float32, None, True, None)
    operator = torch.ops.sdft_kernels.linear_token_logprob.default
    for up, need in (
        (None, (False,) * 3),
        (torch.ones(2, 37), (True, True, True)),
        (torch.ones(2, 37), (True, False, False)),
    ):
        torch.library.opcheck(operator, (*tensors, ["logprob", "lse"], up, *need, *options))


@pytest.mark.unpoisoned
def test_compiles_to_one_graph_with_any_number_of_tokens():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(input, weight, target):
        tokens = linear_token_logprob(input, weight, target)
        return (tokens.logprob * tokens.entropy + tokens.lse).sum()

    for count in (37, 20):
        x = draw(tokens=count)
        leaf = x["input"].clone().requires_grad_()
        compiled(leaf, x["weight"], x["target"]).backward()
        tokens = linear_token_logprob(twin := x["input"].clone().requires_grad_(), x["weight"], x["target"])
        (tokens.logprob * tokens.entropy + tokens.lse).sum().backward()
        assert relative_error(leaf.grad, twin.grad) < 1e-6
