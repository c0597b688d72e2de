"""The Triton row kernels: on a GPU as they ship, elsewhere in Triton's interpreter with blocks of 128 logits.

In fp64 the interpreter shows the formulas to 1e-10; in fp32 it shows the arithmetic, except for the hardware's exp2 and
log2. What only a GPU shows (races, the memory model, speed) is left to `benchmarks/gpu_run.sh`.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from sdft_kernels import _dispatch, linear_divergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels._head import IDENTITY, Transform
from sdft_kernels.divergence import rows_torch
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

rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on purpose

CAPPED = (Transform(1.2, 20.0, 1.5), Transform(1.0, 30.0, 1.5))
TRANSFORMS = {"plain": (IDENTITY, IDENTITY), "scaled": (Transform(0.5, None, 0.75),) * 2, "capped": CAPPED}
MODES = {name: (name,) for name in DIFFERENTIABLE} | {"all": DIFFERENTIABLE, "none": ()}


def tile(logits):
    """A copy with rows `row_stride` apart and NaN in the padding, which no kernel may let in."""
    count, vocabulary = logits.shape
    padded = logits.new_full((count, rows_triton.row_stride(vocabulary)), float("nan"))
    padded[:, :vocabulary] = logits
    return padded[:, :vocabulary]


def draw(count, vocabulary, dtype, device, gap=0.1):
    g = torch.Generator().manual_seed(count * vocabulary)
    student = 6 * torch.randn(count, vocabulary, generator=g, dtype=torch.float64)
    teacher = student + gap * torch.randn(count, vocabulary, generator=g, dtype=torch.float64)
    target = torch.randint(vocabulary, (count,), generator=g)
    if count > 1:
        target[1] = -100
    return student.to(device, dtype), teacher.to(device, dtype), target.to(device)


def run_affine(rows, student, teacher, target, weights, clip, transforms, alpha, keep=None, gradient=True):
    tokens = student.new_zeros(len(FIELDS), student.shape[0])
    loss = student.new_zeros(student.shape[0])
    old = student.new_full(student.shape[:1], -3.0) if clip else None
    grad = rows.affine_(
        tile(student), tile(teacher), target, dict(weights), old, clip, transforms, alpha, keep, tokens, loss,
        student.dtype if gradient else None,
    )  # fmt: skip
    return (tokens, loss) if grad is None else (tokens, loss, grad)


def run_pair(rows, student, teacher, target, weights, transforms, alpha, keep=None):
    tokens = student.new_zeros(len(FIELDS), student.shape[0])
    a, b = tile(student), tile(teacher)
    state = rows.divergence_stats(a, b, target, transforms, alpha, keep, tokens)
    grad = rows.divergence_grad_(a, b, state, target, dict(weights), transforms, alpha, keep, student.dtype)
    return tokens, grad


def assert_same(actual, expected, limit):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isnan().equal(e.isnan()), i
        assert relative_error(a, e) < limit, i


def precision(device):
    """fp64 where it runs: a GPU passes scalars to a kernel in fp32, so there the dispatch refuses fp64."""
    return (torch.float32, 1e-5) if device.type == "cuda" else (torch.float64, 1e-10)


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_equal_the_torch_rows(mode, transforms, interpreted):
    """Every kernel x mode: each number alone, all together, and none; with and without target and clip."""
    dtype, limit = precision(interpreted)
    student, teacher, target = draw(3, 203, dtype, interpreted)
    alpha = 0.25 if mode in ("jsd", "all") else None
    weights = {name: w.to(student)[:3] for name, w in random_upstream(3, True).items() if name in MODES[mode]}
    needs_target = mode in ("student_logprob", "all")
    inputs = (student, teacher, target if needs_target else None, weights)
    clip = 2.0 if mode == "all" else None
    options = TRANSFORMS[transforms], alpha
    actual, expected = (run_affine(rows, *inputs, clip, *options) for rows in (rows_triton, rows_torch))
    assert_same(actual, expected, limit)
    actual, expected = (run_pair(rows, *inputs, *options) for rows in (rows_triton, rows_torch))
    assert_same(actual, expected, limit)


@pytest.mark.parametrize("vocabulary", (1, 2, 15, 16, 17, 127, 128, 129, 257))
def test_ragged_vocabularies(vocabulary, interpreted):
    dtype, limit = precision(interpreted)
    inputs = draw(1, vocabulary, dtype, interpreted)
    weights = {name: w.to(inputs[0]) for name, w in random_upstream(1, True).items()}
    actual, expected = (run_affine(r, *inputs, weights, 2.0, CAPPED, 0.25) for r in (rows_triton, rows_torch))
    assert_same(actual, expected, limit)


def test_infinite_and_nan_logits(interpreted):
    """-inf in either model or both, whole blocks of it, rows of it; NaN and +inf: NaN in that row, and only there."""
    inf, nan = float("inf"), float("nan")
    dtype, limit = precision(interpreted)
    student, teacher, target = draw(10, 300, dtype, interpreted)
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
        actual, expected = (run_affine(r, *inputs, None, transforms, 0.25) for r in (rows_triton, rows_torch))
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


def test_a_row_that_is_not_kept_is_zero_whatever_it_holds(interpreted):
    student, teacher, target = draw(4, 203, torch.float32, interpreted)
    student[1], teacher[2] = float("nan"), float("inf")
    keep = torch.tensor([True, False, False, True], device=interpreted)
    weights = {name: torch.ones(4, device=interpreted) for name in DIFFERENTIABLE}
    for tokens, *_, grad in (
        run_affine(rows_triton, student, teacher, target, weights, 2.0, CAPPED, 0.3, keep),
        run_pair(rows_triton, student, teacher, target, weights, CAPPED, 0.3, keep),
    ):
        assert tokens[:, 1:3].eq(0).all() and grad[1:3].eq(0).all()
        assert grad[[0, 3]].isfinite().all() and grad[[0, 3]].ne(0).any(1).all()


def test_a_weight_of_zero_drops_an_infinite_number(interpreted):
    student, teacher, _ = draw(2, 203, torch.float32, interpreted)
    teacher[0, 3] = -float("inf")  # KL(p_s || p_t) is infinite
    weights = {"kl_student_teacher": torch.zeros(2), "kl_teacher_student": torch.ones(2)}
    weights = {name: w.to(interpreted) for name, w in weights.items()}
    tokens, loss, grad = run_affine(rows_triton, student, teacher, None, weights, None, (IDENTITY, IDENTITY), None)
    assert tokens[1, 0] == float("inf") and loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("vocabulary", (203, 256))
def test_bf16_gradient_over_the_fp32_row(vocabulary, interpreted):
    """The rounded gradient lands in the upper half of the student's row while the row is still being read."""
    student, teacher, _ = draw(3, vocabulary, torch.float32, interpreted)
    weights = {"kl_teacher_student": torch.ones(3, device=interpreted)}
    grads, tokens = {}, student.new_zeros(len(FIELDS), 3)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = tile(student), tile(teacher)
        grads[dtype] = rows_triton.affine_(
            a, b, None, weights, None, None, (IDENTITY, IDENTITY), None, None, tokens, tokens[0].clone(), dtype
        )
        assert b.equal(teacher)  # the teacher's tile is read only
    assert grads[torch.bfloat16].dtype == torch.bfloat16
    exact = grads[torch.float32].bfloat16()
    if interpreted.type == "cpu":  # the interpreter truncates where the hardware rounds: up to one bf16 ulp
        assert ((grads[torch.bfloat16] - exact).abs() <= 2**-7 * exact.abs()).all()
    else:
        assert grads[torch.bfloat16].equal(exact)
    with pytest.raises(ValueError, match="does not fit"):
        rows_triton.divergence_grad_(
            tile(student), tile(teacher), tokens, None, {}, (IDENTITY,) * 2, None, None, torch.float8_e5m2
        )


def test_tiles_without_padding_are_refused(interpreted):
    student, teacher, _ = draw(2, 203, torch.float32, interpreted)
    with pytest.raises(ValueError, match="208 apart"):
        rows_triton.divergence_stats(student, teacher, None, (IDENTITY,) * 2, None, None, student.new_zeros(8, 2))


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("near", torch.bfloat16)], ids=str
)
def test_op_within_budget(kind, dtype, interpreted):
    """The public op, forward and backward,, against fp64 and eager fp32: KLs and mixtures near 0 are what matters."""
    x = make_divergence_inputs(kind, tokens=14, vocabulary=203, hidden=16, dtype=dtype, device=interpreted, bias=True)
    upstream = random_upstream(14, True)
    options = {"jsd_alpha": 0.3} | ({"student_softcap": 20.0, "teacher_softcap": 30.0} if kind == "near" else {})
    truth = run_divergence(x.to(torch.float64), "reference", upstream, **options)
    eager = run_divergence(x.to(torch.float32), "reference", upstream, **options)
    actual = run_divergence(x, "triton", upstream, **options)
    for name in truth:
        if dtype == torch.bfloat16 and name.startswith("grad_"):
            assert relative_error(actual[name], truth[name]) < 0.004, name
        else:
            assert_within_budget(actual[name], eager[name], truth[name], name=name)


@pytest.mark.parametrize("pack", (True, False))
def test_loss_with_mask_callable_and_chunks(pack, interpreted):
    dtype, limit = precision(interpreted)
    x = make_divergence_inputs("peaked", 7, 203, 16, mask=True, dtype=dtype, device=interpreted)
    x.student_input[~x.mask] = float("nan")
    budget = 2 * dtype.itemsize * (2 * 208 + 3 * 32)  # two tokens a chunk

    def squared(tokens, index):
        return tokens.kl_teacher_student.square() + tokens.student_entropy + 0.1 * index

    clipped = sdft_token_loss(alpha=0.3, old_logprob=torch.full((7,), -2.0, device=interpreted), importance_clip=2.0)
    for token_loss in (None, clipped, squared):
        options = {"token_loss": token_loss, "pack": pack}
        actual = run_divergence_loss(x, "triton", memory_budget=budget, **options)
        expected = run_divergence_loss(x, "torch", **options)
        for name in expected:
            assert relative_error(actual[name], expected[name]) < max(limit, 1e-9), name
        assert actual["grad_student_input"][~x.mask].eq(0).all()


def test_same_bits_twice_and_whatever_the_neighbours(interpreted):
    student, teacher, target = draw(4, 203, torch.float32, interpreted)
    weights = {name: torch.ones(4, device=interpreted) for name in DIFFERENTIABLE}
    first, again = (run_affine(rows_triton, student, teacher, target, weights, 2.0, CAPPED, 0.3) for _ in range(2))
    alone = {name: w[2:3] for name, w in weights.items()}
    single = run_affine(rows_triton, student[2:3], teacher[2:3], target[2:3], alone, 2.0, CAPPED, 0.3)
    for a, b, c in zip(first, again, single, strict=True):
        assert a.equal(b)
        assert (a[:, 2:3] if a.shape[0] == len(FIELDS) else a[2:3]).equal(c)


@pytest.mark.unpoisoned
def test_offsets_beyond_2_to_the_31(interpreted):
    """Row 2 starts at element 2^31, though no argument exceeds an int32. Memory that is not touched is not there."""
    stride, vocabulary = 2**30, 203
    if interpreted.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 9 GB on the GPU")
    storage = torch.empty(2 * stride + rows_triton.row_stride(vocabulary), device=interpreted)
    logits = storage.as_strided((3, vocabulary), (stride, 1))
    values, _, target = draw(3, vocabulary, torch.float32, interpreted)
    logits.copy_(values)
    keep = torch.tensor([True, False, True], device=interpreted)
    tokens, expected = values.new_zeros(len(FIELDS), 3), values.new_zeros(len(FIELDS), 3)
    rows_triton.divergence_stats(logits, logits, target, (IDENTITY, IDENTITY), None, keep, tokens)
    rows_torch.divergence_stats(values, values.clone(), target, (IDENTITY, IDENTITY), None, keep, expected)
    assert relative_error(tokens, expected) < 1e-5


def test_registered_operator_and_full_graph(interpreted):
    """opcheck and torch.compile with the Triton rows inside the operator."""
    x = make_divergence_inputs("near", tokens=3, vocabulary=203, hidden=16, device=interpreted)
    head = (x.student_input, x.student_weight, None, x.teacher_input, x.teacher_weight, None, x.target, None)
    tail = (0.5, 1.0, 1.0, 1.0, None, None, torch.float32, None, True, None, "triton", None)
    weights = torch.ones(1, 3, device=interpreted)
    args = (*head, weights, ["jsd"], None, None, True, True, False, *tail)
    op = torch.ops.sdft_kernels.linear_divergence.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.unpoisoned
def test_compiles_without_a_graph_break(interpreted):
    dtype, limit = precision(interpreted)
    x = make_divergence_inputs("peaked", 3, 203, 16, dtype=dtype, device=interpreted)

    def step(h, w):
        return linear_divergence_loss(h, w, x.teacher_input, x.teacher_weight, impl="triton")[0]

    h, w = x.student_input.requires_grad_(), x.student_weight.requires_grad_()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(h, w)
    loss.backward()
    want = run_divergence_loss(x, "torch")
    assert relative_error(loss, want["loss"]) < limit
    assert relative_error(w.grad, want["grad_student_weight"]) < limit


def test_exp_and_log_are_accurate_where_the_kernels_use_them(interpreted):
    """Why the kernels have an exp of their own: e^x as 2^fl(x log2 e) is off by 1e-6 at x = -20."""
    x = torch.linspace(-60, 0, 4001, dtype=torch.float32)
    naive = torch.exp2((x * 1.4426950408889634).double())
    assert ((naive - x.double().exp()) / x.double().exp()).abs().max() > 1e-6
    z = torch.stack([x, x - 1.0]).to(interpreted)
    tokens = z.new_zeros(len(FIELDS), 2)
    grad = rows_triton.affine_(
        tile(z), tile(z.roll(1, 1)), None, {"kl_teacher_student": z.new_ones(2)}, None, None, (IDENTITY, IDENTITY),
        None, None, tokens, z.new_zeros(2), torch.float32,
    )  # fmt: skip
    truth = z.double().softmax(-1) - z.roll(1, 1).double().softmax(-1)
    eager = z.softmax(-1) - z.roll(1, 1).softmax(-1)
    assert_within_budget(grad, eager, truth)


def test_dispatch(monkeypatch):
    """By name an implementation runs or says why not; on CPU `auto` is PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _dispatch.resolve("auto") == "torch"
    with pytest.raises(RuntimeError, match="run on CUDA, not on cpu"):
        _dispatch.resolve("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.resolve("triton") == "triton" and _dispatch.resolve("auto") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    assert _dispatch.resolve("auto", device="cuda:0") == "triton"
    assert _dispatch.resolve("auto", device="cuda:0", dtype=torch.float64) == "torch"
    with pytest.raises(RuntimeError, match="not enough for fp64"):
        _dispatch.resolve("triton", device="cuda:0", dtype=torch.float64)
    assert _dispatch.resolve("auto", "linear_token_logprob", device="cuda:0") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        _dispatch.resolve("triton", device="cuda:0")
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install"):
        _dispatch.resolve("triton")


def test_shipped_tables():
    """Lines in order, the last without a limit, blocks that Triton accepts; a newer device takes the newest table."""
    tables = rows_triton.configurations()
    for capability, table in tables.items():
        limits = [c.max_vocabulary for c in table]
        assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
        for c in table:
            assert c.block & (c.block - 1) == 0 and c.block >= 32 * c.num_warps
            assert c.num_warps * 32 * c.max_registers <= 65536
        assert rows_triton.choose(table[0].max_vocabulary, capability) == table[0]
        assert rows_triton.choose(262144, capability) == table[-1]
    assert rows_triton.choose(5, 90) == tables[80][0] and rows_triton.choose(5, 121) == tables[100][0]


def test_outputs_names_by_the_public_call(interpreted):
    x = make_divergence_inputs("near", tokens=2, vocabulary=203, hidden=16, device=interpreted)
    tokens = linear_divergence(**x.tensors(), outputs=("kl_teacher_student",), impl="triton")
    assert tokens.kl_student_teacher is None and tokens.kl_teacher_student.shape == (2,)
