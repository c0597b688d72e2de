"""One suite for every implementation of the row kernels, beside the PyTorch rows and the fp64 reference.

Triton: on a GPU as it ships, elsewhere in its interpreter with blocks of 128 logits. CUDA C++: its own source built for
the host, where every thread of a cluster of blocks is a thread (`rows_emulated`). In fp64 an implementation shows its
formulas to 1e-10, in fp32 its arithmetic.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rows_emulated
import torch
from instruction_sets import levels, run_tests
from rows_cases import CAPPED, MODES, TRANSFORMS, assert_same, draw, run_affine, run_pair, tile
from rows_emulated import EmulatedRows

from sdft_kernels import _dispatch, _native, linear_divergence, sdft_token_loss
from sdft_kernels._head import IDENTITY
from sdft_kernels.divergence import driver, rows_native, rows_torch
from sdft_kernels.divergence.fields import DIFFERENTIABLE, FIELDS
from sdft_kernels.testing import (
    KINDS,
    assert_within_budget,
    make_divergence_inputs,
    random_upstream,
    relative_error,
    run_divergence,
    run_divergence_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on purpose


@dataclass(frozen=True)
class Implementation:
    """Row kernels under test, and where they run."""

    name: str
    impl: str  # of the op
    rows: Any
    device: torch.device
    has_pair: bool = True  # the two kernels around a callable, which the CUDA C++ rows lack

    @property
    def precision(self):
        """fp64 where it runs: a GPU passes scalars to a Triton kernel in fp32, so there the dispatch refuses fp64."""
        return (torch.float32, 1e-5) if self.device.type == "cuda" else (torch.float64, 1e-10)


CPU = torch.device("cpu")
# A cluster whose blocks keep the row in shared memory; a block that reads it twice.
EMULATED = {"cuda": EmulatedRows(blocks=2, threads=64), "cuda_reread": EmulatedRows(1, 32, resident=False)}


@pytest.fixture(params=("native", "triton", "native_on_gpu", *EMULATED))
def tested(request, monkeypatch):
    if request.param == "native_on_gpu":
        why = _dispatch.why_not("native", "linear_divergence", "cuda") if torch.cuda.is_available() else "no GPU"
        if why:
            pytest.skip(why)
        return Implementation("native_on_gpu", "native", rows_native, torch.device("cuda"), has_pair=False)
    if request.param == "triton":
        rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
        return Implementation("triton", "triton", rows_triton, request.getfixturevalue("interpreted"))
    if request.param == "native":
        if not _native.has_native():
            pytest.skip(_native.why_not())
        return Implementation("native", "native", rows_native, CPU)
    if rows_emulated.library() is None:
        pytest.skip("no C++ compiler")
    rows = EMULATED[request.param]
    rows_of = driver.rows_of
    monkeypatch.setitem(_dispatch._WRITTEN, "linear_divergence", ("reference", "torch", "cuda"))
    monkeypatch.setattr(_dispatch, "IMPLEMENTATIONS", (*_dispatch.IMPLEMENTATIONS, "cuda"))
    monkeypatch.setattr(driver, "rows_of", lambda impl: rows if impl == "cuda" else rows_of(impl))
    return Implementation(request.param, "cuda", rows, CPU, has_pair=False)


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_equal_the_torch_rows(mode, transforms, tested):
    """Every kernel x mode: each number alone, all together, and none; with and without target and clip."""
    dtype, limit = tested.precision
    student, teacher, target = draw(3, 203, dtype, tested.device)
    alpha = 0.25 if mode in ("jsd", "all") else None
    weights = {name: w.to(student)[:3] for name, w in random_upstream(3, True).items() if name in MODES[mode]}
    needs_target = mode in ("student_logprob", "all")
    inputs = (student, teacher, target if needs_target else None, weights)
    clip = 2.0 if mode == "all" else None
    options = TRANSFORMS[transforms], alpha
    actual, expected = (run_affine(rows, *inputs, clip, *options) for rows in (tested.rows, rows_torch))
    assert_same(actual, expected, limit)
    if tested.has_pair:
        actual, expected = (run_pair(rows, *inputs, *options) for rows in (tested.rows, rows_torch))
        assert_same(actual, expected, limit)


@pytest.mark.parametrize("mode", ("kl_teacher_student", "kl_student_teacher", "jsd", "all"))
@pytest.mark.parametrize("gap", (0.015, 3.0))  # mean KL 1e-4 and 2
def test_fp32_arithmetic_within_the_reference_budget(gap, mode, tested):
    """The op's fp64 reference on the identity head sees the logits themselves; its fp32 error is the yardstick."""
    if tested.name == "triton" and tested.device.type == "cpu" and gap == 3.0:
        pytest.skip("the interpreter adds a block's terms one after the other, a GPU in a tree: 2.6 times, not 2")
    count, vocabulary = 48, 203
    student, teacher, target = draw(count, vocabulary, torch.float32, tested.device, gap)
    weights = {name: torch.ones(count, device=tested.device) for name in MODES[mode]}
    alpha = 0.3 if "jsd" in weights else None
    actual = run_affine(tested.rows, student, teacher, target, weights, None, (IDENTITY,) * 2, alpha)

    def reference(dtype):
        logits = student.detach().to(dtype, copy=True).requires_grad_()
        head = torch.eye(vocabulary, dtype=dtype, device=tested.device)
        numbers = linear_divergence(
            logits, head, teacher.to(dtype), head, target, jsd_alpha=alpha, impl="reference"
        )._asdict()
        loss = sum(numbers[name] for name in weights)
        loss.sum().backward()
        table = [torch.zeros_like(loss) if numbers[name] is None else numbers[name] for name in FIELDS]
        return torch.stack(table).detach(), loss.detach(), logits.grad

    for name, a, eager, truth in zip(
        ("tokens", "loss", "gradient"), actual, reference(torch.float32), reference(torch.float64), strict=True
    ):
        assert_within_budget(a, eager, truth, name=name)


@pytest.mark.parametrize("vocabulary", (1, 2, 15, 16, 17, 127, 128, 129, 257))
def test_ragged_vocabularies(vocabulary, tested):
    dtype, limit = tested.precision
    inputs = draw(1, vocabulary, dtype, tested.device)
    weights = {name: w.to(inputs[0]) for name, w in random_upstream(1, True).items()}
    actual, expected = (run_affine(r, *inputs, weights, 2.0, CAPPED, 0.25) for r in (tested.rows, rows_torch))
    assert_same(actual, expected, limit)


@pytest.mark.parametrize("vocabulary", (1, 7, 8, 9, 31, 33, 4095, 4096, 4097, 8200))
def test_ragged_lanes_and_blocks_in_fp32(vocabulary, tested):
    """fp32 has its own vector loops; 4096 logits are a block of the native rows."""
    if tested.name == "triton" and vocabulary > 300:
        pytest.skip("minutes in the interpreter")
    inputs = draw(2, vocabulary, torch.float32, tested.device)
    weights = {name: w.to(inputs[0]) for name, w in random_upstream(2, True).items()}
    actual = run_affine(tested.rows, *inputs, weights, 2.0, (IDENTITY,) * 2, 0.25)
    wide = (inputs[0].double(), inputs[1].double(), inputs[2], {k: w.double() for k, w in weights.items()})
    expected = run_affine(rows_torch, *wide, 2.0, (IDENTITY,) * 2, 0.25)
    assert_same(actual, expected, 2e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
def test_infinite_and_nan_logits(dtype, tested):
    """-inf in either model or both, whole blocks of it, rows of it; NaN and +inf: NaN in that row, and only there."""
    inf, nan = float("inf"), float("nan")
    limit = 1e-5 if dtype == torch.float32 else tested.precision[1]
    dtype = torch.float32 if tested.device.type == "cuda" else dtype
    student, teacher, target = draw(10, 300, dtype, tested.device)
    student[0, 5:200] = -inf  # a whole block and parts of two
    teacher[1, 5:200] = -inf
    student[2, 130:] = teacher[2, 130:] = -inf
    student[3], teacher[4] = -inf, -inf
    student[5, 7], teacher[6, 290] = nan, nan
    student[7, 7] = inf
    student[8, :150], teacher[8, 150:] = -inf, -inf  # nothing in common
    target[:] = 250
    for mode, transforms in itertools.product(("all", "kl_teacher_student", "jsd"), (TRANSFORMS["plain"], CAPPED)):
        weights = {name: torch.ones_like(student[:, 0]) for name in MODES[mode]}
        inputs = student, teacher, target, weights
        actual, expected = (run_affine(r, *inputs, None, transforms, 0.25) for r in (tested.rows, rows_torch))
        usable = [row for row in range(10) if row not in (3, 4, 5, 6, 7)]
        assert_same([x[..., usable] for x in actual[:2]], [x[..., usable] for x in expected[:2]], limit)
        # With the forward KL alone p_s - p_t is finite even where the KL is not; other gradients of infinity are NaN.
        usable = usable if mode == "kl_teacher_student" else [row for row in usable if expected[1][row].isfinite()]
        assert_same([actual[2][usable]], [expected[2][usable]], limit)
        assert actual[2][usable].isfinite().all()
        tokens, loss, grad = actual
        poisoned = [3, 4, 5, 6] if transforms is CAPPED else [3, 4, 5, 6, 7]  # a cap makes +inf finite
        assert tokens[0, poisoned].isnan().all() and tokens[7, poisoned].isnan().all()
        assert loss[poisoned].isnan().all() and grad[poisoned].isnan().any(1).all()
        assert not tokens[:, 9].isnan().any()


@pytest.mark.parametrize("place", (0, 3, 16, 200, 202))
@pytest.mark.parametrize("side", ("student", "teacher"))
def test_a_nan_anywhere_in_a_row_poisons_it(side, place, tested):
    """Vector maxima and exponentials drop a NaN, so each position in a vector, and the tail, is tried."""
    student, teacher, _ = draw(3, 203, torch.float32, tested.device)
    (student if side == "student" else teacher)[1, place] = float("nan")
    weights = {"kl_teacher_student": torch.ones(3, device=tested.device)}
    for transforms in TRANSFORMS.values():
        tokens, loss, grad = run_affine(tested.rows, student, teacher, None, weights, None, transforms, None)
        assert tokens[:2, 1].isnan().all() and loss[1].isnan() and grad[1].isnan().any()
        assert tokens[:, [0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_a_row_that_is_not_kept_is_zero_whatever_it_holds(tested):
    student, teacher, target = draw(4, 203, torch.float32, tested.device)
    student[1], teacher[2] = float("nan"), float("inf")
    keep = torch.tensor([True, False, False, True], device=tested.device)
    weights = {name: torch.ones(4, device=tested.device) for name in DIFFERENTIABLE}
    results = [run_affine(tested.rows, student, teacher, target, weights, 2.0, CAPPED, 0.3, keep)]
    if tested.has_pair:
        results.append(run_pair(tested.rows, student, teacher, target, weights, CAPPED, 0.3, keep))
    for tokens, *_, grad in results:
        assert tokens[:, 1:3].eq(0).all() and grad[1:3].eq(0).all()
        assert grad[[0, 3]].isfinite().all() and grad[[0, 3]].ne(0).any(1).all()


def test_a_weight_of_zero_drops_an_infinite_number(tested):
    student, teacher, _ = draw(2, 203, torch.float32, tested.device)
    teacher[0, 3] = -float("inf")  # KL(p_s || p_t) is infinite
    weights = {"kl_student_teacher": torch.zeros(2), "kl_teacher_student": torch.ones(2)}
    weights = {name: w.to(tested.device) for name, w in weights.items()}
    tokens, loss, grad = run_affine(tested.rows, student, teacher, None, weights, None, (IDENTITY, IDENTITY), None)
    assert tokens[1, 0] == float("inf") and loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("vocabulary", (203, 256))
def test_bf16_gradient_over_the_fp32_row(vocabulary, tested):
    """The rounded gradient lands in half of the student's row while the row is still being read."""
    rows = tested.rows
    student, teacher, _ = draw(3, vocabulary, torch.float32, tested.device)
    weights = {"kl_teacher_student": torch.ones(3, device=tested.device)}
    grads, tokens = {}, student.new_zeros(len(FIELDS), 3)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = tile(rows, student), tile(rows, teacher)
        grads[dtype] = rows.affine_(
            a, b, None, weights, None, None, (IDENTITY, IDENTITY), None, None, tokens, tokens[0].clone(), dtype
        )
        if tested.rows is not rows_native:  # which may leave exponentials there
            assert b.equal(teacher)
    assert grads[torch.bfloat16].dtype == torch.bfloat16
    exact = grads[torch.float32].bfloat16()
    if tested.name == "triton" and tested.device.type == "cpu":
        # the interpreter truncates where the hardware rounds: up to one bf16 ulp
        assert ((grads[torch.bfloat16] - exact).abs() <= 2**-7 * exact.abs()).all()
    else:
        assert grads[torch.bfloat16].equal(exact)
    with pytest.raises(ValueError, match="does not fit"):
        rows.affine_(
            tile(rows, student), tile(rows, teacher), None, {}, None, None, (IDENTITY,) * 2, None, None, tokens,
            tokens[0].clone(), torch.float8_e5m2,
        )  # fmt: skip


def test_same_bits_twice_and_whatever_the_neighbours(tested):
    student, teacher, target = draw(4, 203, torch.float32, tested.device)
    weights = {name: torch.ones(4, device=tested.device) for name in DIFFERENTIABLE}
    first, again = (run_affine(tested.rows, student, teacher, target, weights, 2.0, CAPPED, 0.3) for _ in range(2))
    alone = {name: w[2:3] for name, w in weights.items()}
    single = run_affine(tested.rows, student[2:3], teacher[2:3], target[2:3], alone, 2.0, CAPPED, 0.3)
    for a, b, c in zip(first, again, single, strict=True):
        assert a.equal(b)
        assert (a[:, 2:3] if a.shape[0] == len(FIELDS) else a[2:3]).equal(c)


@pytest.mark.unpoisoned
def test_offsets_beyond_2_to_the_31(tested):
    """Row 2 starts at element 2^31, though no argument exceeds an int32. Memory that is not touched is not there."""
    rows, stride, vocabulary = tested.rows, 2**30, 203
    if tested.device.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 9 GB on the GPU")
    storage = torch.empty(2 * stride + rows.row_stride(vocabulary), device=tested.device)
    logits = storage.as_strided((3, vocabulary), (stride, 1))
    values, _, target = draw(3, vocabulary, torch.float32, tested.device)
    logits.copy_(values)
    keep = torch.tensor([True, False, True], device=tested.device)
    tokens, expected = values.new_zeros(len(FIELDS), 3), values.new_zeros(len(FIELDS), 3)
    options = {}, None, None, (IDENTITY, IDENTITY), None, keep
    rows.affine_(logits, logits, target, *options, tokens, tokens.new_zeros(3), None)
    rows_torch.affine_(values, values.clone(), target, *options, expected, tokens.new_zeros(3), None)
    assert relative_error(tokens, expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("near", torch.bfloat16)], ids=str
)
def test_op_within_budget(kind, dtype, tested):
    """The public op, forward and backward, against fp64 and eager fp32: KLs and mixtures near 0 are what matters."""
    x = make_divergence_inputs(kind, tokens=14, vocabulary=203, hidden=16, dtype=dtype, device=tested.device, bias=True)
    upstream = random_upstream(14, True)
    options = {"jsd_alpha": 0.3} | ({"student_softcap": 20.0, "teacher_softcap": 30.0} if kind == "near" else {})
    truth = run_divergence(x.to(torch.float64), "reference", upstream, **options)
    eager = run_divergence(x.to(torch.float32), "reference", upstream, **options)
    actual = run_divergence(x, tested.impl, upstream, **options)
    for name in truth:
        if dtype == torch.bfloat16 and name.startswith("grad_"):
            assert relative_error(actual[name], truth[name]) < 0.004, name
        else:
            assert_within_budget(actual[name], eager[name], truth[name], name=name)


@pytest.mark.parametrize("pack", (True, False))
def test_loss_with_mask_callable_and_chunks(pack, tested):
    dtype, limit = tested.precision
    x = make_divergence_inputs("peaked", 7, 203, 16, mask=True, dtype=dtype, device=tested.device)
    x.student_input[~x.mask] = float("nan")
    budget = 2 * dtype.itemsize * (2 * tested.rows.row_stride(203) + 3 * 32)  # two tokens a chunk

    def squared(tokens, index):
        return tokens.kl_teacher_student.square() + tokens.student_entropy + 0.1 * index

    clipped = sdft_token_loss(alpha=0.3, old_logprob=torch.full((7,), -2.0, device=tested.device), importance_clip=2.0)
    for token_loss in (None, clipped, squared) if tested.has_pair else (None, clipped):
        options = {"token_loss": token_loss, "pack": pack}
        actual = run_divergence_loss(x, tested.impl, memory_budget=budget, **options)
        expected = run_divergence_loss(x, "torch", **options)
        for name in expected:
            assert relative_error(actual[name], expected[name]) < max(limit, 1e-9), name
        assert actual["grad_student_input"][~x.mask].eq(0).all()


def test_the_gradient_may_not_lie_elsewhere():
    """The native operator writes where the student's rows start, or says so; and a stage needs its arguments."""
    if not _native.has_native():
        pytest.skip(_native.why_not())
    run = torch.ops.sdft_kernels.divergence_rows_
    s, t, table = torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(5, 2)
    tail = (1.0, 0.0, 1.0, 0.0, 1.0, 1.0, None)
    outputs = (torch.zeros(8, 2), torch.zeros(2), None, None, None)
    with pytest.raises(RuntimeError, match="must start where the student's does"):
        run("affine", s, t, None, None, table, None, *tail, *outputs, torch.zeros(2, 16), 0)
    with pytest.raises(RuntimeError, match="argument of stage 'affine' is missing"):
        run("affine", s, t, None, None, None, None, *tail, *outputs, None, 0)
    with pytest.raises(RuntimeError, match="no stage 'both'"):
        run("both", s, t, None, None, None, None, *tail, *outputs, None, 0)
    with pytest.raises(RuntimeError, match="tokens must have 16 elements, has 14"):
        run("affine", s, t, None, None, table, None, *tail, torch.zeros(7, 2), *outputs[1:], None, 0)
    with pytest.raises(RuntimeError, match="both tiles must be fp32"):
        run("affine", s, t.double(), None, None, table, None, *tail, *outputs, None, 0)


@pytest.mark.parametrize(("variable", "value"), levels("ATEN_CPU_CAPABILITY"))
def test_every_instruction_set(variable, value):
    """The same tests of the native rows in a process that may use no better one."""
    if not _native.has_native():
        pytest.skip(_native.why_not())
    run_tests(variable, value, [Path(__file__)], "native and not instruction_set")
