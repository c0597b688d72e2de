"""Design section 9 for op 2, one test a row: what bad, empty, masked, infinite and NaN input gets."""

import math

import pytest
import torch
from topk_cases import EVERY_OPTION, NAMED, SUPPORTS, TAILS, TRAINED, K, draw, restrict, run

from sdft_kernels.testing import relative_error
from sdft_kernels.topk_divergence import linear_topk_divergence

INF = math.inf
CACHED = (torch.arange(4).expand(37, 4), torch.full((37, 4), -2.0))
WITHOUT = {"teacher_input": None, "teacher_weight": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_input": torch.zeros(37)}, "student_input must be 2-D"),
        ({"student_weight": torch.zeros(1003, 31)}, r"student_weight must be \(1003, 32\), got \(1003, 31\)"),
        ({"student_weight": torch.zeros(0)}, "student_weight is empty.*gathered"),
        ({"teacher_weight": torch.zeros(1001, 32)}, r"teacher_weight must be \(1003, 32\).*vocabulary"),
        ({"teacher_input": torch.zeros(36, 32)}, r"teacher_input must be \(37, 32\)"),
        ({"teacher_input": None}, "teacher_input must be a tensor, got NoneType"),
        ({"teacher_input": torch.zeros(37, 32, requires_grad=True)}, "teacher_input requires grad.*no_grad"),
        ({"teacher_weight": torch.zeros(1003, 32, requires_grad=True)}, "teacher_weight requires grad.*detach"),
        ({"teacher_weight": torch.zeros(1003, 32).bfloat16()}, "teacher_weight is torch.bfloat16 but student_input"),
        ({"student_bias": torch.zeros(5)}, r"student_bias must be \(1003,\)"),
        ({"target": torch.zeros(37)}, "target must be int64"),
        ({"target": torch.full((37,), 1003)}, r"target\[0\] is 1003"),
        ({"mask": torch.zeros(37)}, "mask must be bool"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"student_softcap": -1.0}, "student_softcap must be positive"),
        ({"teacher_logit_scale": INF}, "teacher_logit_scale must be positive and finite"),
        ({"alpha": 1.5}, r"alpha must be within \[0, 1\], got 1.5"),
        ({"k": None}, "k is needed with support='student'"),
        ({"k": 0}, r"k must be within \[1, 1003\], the vocabulary, got 0"),
        ({"k": 1004}, r"k must be within \[1, 1003\], the vocabulary, got 1004"),
        ({"support": "both"}, "support must be one of .* got 'both'"),
        ({"support": torch.arange(4).expand(37, 4)}, r"k must be None or 4, the number of ids, got 7"),
        ({"support": torch.zeros(37, 4, dtype=torch.int64), "k": None}, r"support\[0\] holds an id twice"),
        (
            {"support": torch.arange(1000, 1004).expand(37, 4), "k": None},
            r"support\[0, 3\] is 1003: must be in \[0, 10",
        ),
        ({"support": torch.full((37, 1), -2), "k": None}, r"support\[0, 0\] is -2"),
        ({"support": torch.zeros(36, 1, dtype=torch.int64), "k": None}, r"support must be \(37, 1\)"),
        ({"support": torch.zeros(37, 1), "k": None}, "support must be int64"),
        ({"support": torch.zeros(37, 0, dtype=torch.int64), "k": None}, r"k must be within \[1, 1003\].* got 0"),
        ({"tail": "keep"}, "tail must be one of .* got 'keep'"),
        ({"per_entry_clip": -0.1}, "per_entry_clip must be finite and not negative"),
        ({"outputs": ("kl",)}, "outputs names 'kl'"),
        ({"outputs": ("student_logprob",), "target": None}, "'student_logprob', which needs target"),
        ({"precision": "tf32"}, "CUDA"),
        ({"memory_budget": 1000}, "memory_budget=1000 bytes holds no token at a vocabulary of 1003"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"teacher_topk": CACHED}, "teacher_input has no use beside teacher_topk"),
        (WITHOUT | {"teacher_topk": CACHED, "teacher_softcap": 20.0}, "teacher_softcap has no use beside teacher_topk"),
        (WITHOUT | {"teacher_topk": CACHED[0]}, r"teacher_topk must be \(ids, logprobs\), got Tensor"),
        (WITHOUT | {"teacher_topk": CACHED}, "k must be None or 4, the number of ids, got 7"),
        (WITHOUT | {"teacher_topk": CACHED, "k": None, "support": "union"}, "support='union' needs the teacher's"),
        (
            WITHOUT | {"teacher_topk": CACHED, "k": None, "support": CACHED[0]},
            "support='given' needs the teacher's",
        ),
        (WITHOUT | {"teacher_topk": (CACHED[0], CACHED[1][:, :3])}, r"teacher_topk\[1\] must be \(37, 4\)"),
        (WITHOUT | {"teacher_topk": (CACHED[0], CACHED[0])}, r"teacher_topk\[1\] must be floating"),
        (WITHOUT | {"teacher_topk": (CACHED[0].int(), CACHED[1])}, r"teacher_topk\[0\] must be int64"),
        (WITHOUT | {"teacher_topk": (CACHED[0], CACHED[1].clone().requires_grad_())}, r"teacher_topk\[1\] requires gr"),
        (WITHOUT | {"teacher_topk": (CACHED[0], None)}, r"teacher_topk\[1\] must be a tensor"),
        (WITHOUT | {"teacher_topk": (None, CACHED[1])}, r"teacher_topk\[0\] must be a tensor"),
    ],
)
def test_value_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(**(draw() | {"k": K} | change))


def test_implementations_that_cannot_run():
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match=rf"linear_topk_divergence\(impl='{impl}'\) cannot run"):
            linear_topk_divergence(**draw(), k=K, impl=impl)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
def test_no_tokens_and_all_masked(support, tail):
    full, mode = restrict(draw(vocabulary=203, tokens=9, bias=True), support, {"tail": tail})
    for pack in (True, False):
        for count in (0, 9):
            x = {
                n: v[:count] if v is not None and n in ("student_input", "teacher_input", "target") else v
                for n, v in full.items()
            }
            cut = {n: v[:count] if isinstance(v, torch.Tensor) else v for n, v in mode.items()}
            if "teacher_topk" in mode:
                cut["teacher_topk"] = tuple(v[:count] for v in mode["teacher_topk"])
            mask = torch.zeros(count, dtype=torch.bool) if count else None
            for name, value in run(x | {"mask": mask}, "torch", pack=pack, **cut).items():
                assert value.eq(-1 if name == "ids" else 0).all(), name


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("poison", (math.nan, INF, -INF))
@pytest.mark.parametrize("tail", TAILS)
def test_masked_tokens_may_hold_anything(poison, pack, tail):
    for support in SUPPORTS:
        x, mode = restrict(draw(mask=True, bias=True), support, {"tail": tail, "pack": pack})
        clean, off = run(x, "torch", **mode), ~x["mask"]
        dirty = {n: x[n].masked_fill(off[:, None], poison) for n in ("student_input", "teacher_input") if n in x}
        dirty["target"] = x["target"].masked_fill(off, 10**9)
        if support == "given":
            mode = mode | {"support": mode["support"].masked_fill(off[:, None], 10**9)}
        if "teacher_topk" in mode:
            ids, logprobs = mode["teacher_topk"]
            mode = mode | {
                "teacher_topk": (ids.masked_fill(off[:, None], -7), logprobs.masked_fill(off[:, None], poison))
            }
        result = run(x | dirty, "torch", **mode)
        for name in clean:
            assert torch.equal(result[name], clean[name]), (support, name)
        assert result["grad_student_input"][off].eq(0).all() and result["ids"][off].eq(-1).all()


@pytest.mark.parametrize("side", ("student_input", "teacher_input"))
@pytest.mark.parametrize("poison", (math.nan, INF))
@pytest.mark.parametrize("tail", TAILS)
def test_nan_stays_in_its_token(side, poison, tail):
    """NaN in that token's divergence and dX row, and in dW; never a silent finite number, never a neighbour."""
    for support in (*NAMED, "given"):
        for trained in (TRAINED, TRAINED[:1]):
            x, mode = restrict(draw(vocabulary=203), support, {"tail": tail})
            x[side] = x[side].clone()
            x[side][7, 3] = poison
            result = run(x, "torch", trained=trained, **mode)
            assert result["divergence"].isnan().nonzero().tolist() == [[7]], support
            rows = result["grad_student_input"].isnan()
            assert rows[7].all() and rows.sum() == 32, support
            assert trained == TRAINED[:1] or result["grad_student_weight"].isnan().any()


def test_nan_in_a_cached_teacher():
    for support in ("cached", "cached-intersection"):
        for tail in TAILS:
            x, mode = restrict(draw(vocabulary=203), support, {"tail": tail})
            mode["teacher_topk"][1][7] = math.nan
            result = run(x, "torch", **mode)
            assert result["divergence"].isnan().nonzero().tolist() == [[7]]
            assert result["grad_student_input"].isnan().any(-1).nonzero().tolist() == [[7]]


@pytest.mark.parametrize("options", ({}, EVERY_OPTION), ids=("plain", "every"))
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", NAMED)
def test_minus_inf_in_both_is_a_smaller_vocabulary(support, tail, options):
    """Also where fewer entries are finite than k: those of probability 0 on both sides contribute nothing."""
    base = draw("flat", vocabulary=103, dtype=torch.float64)
    base.pop("target")
    for gone, k in ((60, K), (98, K)):
        bias = torch.zeros(103, dtype=torch.float64)
        bias[:gone] = -INF
        small = base | {n: base[n][gone:] for n in ("student_weight", "teacher_weight")}
        small |= {n: torch.zeros(103 - gone, dtype=torch.float64) for n in ("student_bias", "teacher_bias")}
        full = base | {"student_bias": bias, "teacher_bias": bias}
        mode = dict(tail=tail, support=support, alpha=0.3, **options)
        for impl in ("torch", "reference"):
            whole, part = run(full, impl, k=k, **mode), run(small, impl, k=min(k, 103 - gone), **mode)
            for name, value in part.items():
                got = whole[name][gone:] if name in ("grad_student_weight", "grad_student_bias") else whole[name]
                if name != "ids":
                    assert relative_error(got, value) < 1e-8, (impl, gone, name)
            assert whole["grad_student_weight"][:gone].eq(0).all() and whole["grad_student_bias"].isfinite().all()


def test_minus_inf_on_one_side():
    x = draw("flat", vocabulary=103, dtype=torch.float64)
    ids = torch.arange(90, 100).expand(37, 10)
    bias = torch.zeros(103, dtype=torch.float64)
    bias[95] = -INF
    for tail in TAILS:
        for side, infinite, finite in (("student", 0.0, 1.0), ("teacher", 1.0, 0.0)):
            only = x | {f"{side}_bias": bias}
            assert run(only, "torch", support=ids, tail=tail, alpha=infinite)["divergence"].eq(INF).all()
            for alpha in (finite, 0.3):
                actual, truth = (
                    run(only, impl, support=ids, tail=tail, alpha=alpha) for impl in ("torch", "reference")
                )
                for name in ("divergence", "grad_student_input", "grad_student_weight"):
                    assert actual[name].isfinite().all(), name
                    assert relative_error(actual[name], truth[name]) < 1e-11, (tail, side, alpha, name)


def test_a_row_without_a_distribution_is_nan_and_a_support_without_probability_too():
    x = draw("flat", vocabulary=23, dtype=torch.float64)
    nothing = torch.full((23,), -INF, dtype=torch.float64)
    for tail in TAILS:
        for support in NAMED:
            every = linear_topk_divergence(**(x | {"student_bias": nothing}), k=3, support=support, tail=tail)
            assert every.divergence.isnan().all(), (support, tail)
    nothing[10:] = 0
    ids = torch.arange(3).expand(37, 3)
    for side in ("student_bias", "teacher_bias"):
        assert linear_topk_divergence(**(x | {side: nothing}), support=ids).divergence.isnan().all()


def test_an_empty_support_is_no_difference():
    """Disjoint top-k sets, or a row of padding: 0 and no gradient, for any tail but a bucket of everything: 0 too."""
    x = draw("flat", vocabulary=203, dtype=torch.float64)
    empty = torch.full((37, 3), -1)
    for tail in TAILS:
        result = run(x, "torch", support=empty, tail=tail, outputs=("divergence", "student_mass", "teacher_mass"))
        for name, value in result.items():
            assert value.eq(0).all(), (tail, name)


def test_a_dtensor_weight_names_the_fix():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    x = draw()
    with pytest.raises(ValueError, match=r"DTensor.*forward.*full_tensor\(grad_placements=\[Partial\(\"avg\"\)\]\)"):
        linear_topk_divergence(**(x | {"student_weight": x["student_weight"].as_subclass(Sharded)}), k=K)


def test_ties_at_the_last_place_take_one_of_the_tied():
    x = draw("flat", vocabulary=53, dtype=torch.float64)
    x["student_weight"] = x["student_weight"][torch.arange(53) // 2]  # every logit twice
    tokens = linear_topk_divergence(**x, k=5)
    z = x["student_input"] @ x["student_weight"].t()
    chosen = z.gather(1, tokens.ids).sort(-1, descending=True).values
    assert torch.allclose(chosen, z.topk(5).values, rtol=1e-12)
    assert all(len(set(row)) == 5 for row in tokens.ids.tolist())
