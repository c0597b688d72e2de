"""What only a GPU shows: its products and kernels at real vocabularies, streams, graphs and memory.

Written and syntax-checked without one; `benchmarks/gpu_run.sh` runs it on a rented machine.
"""

import functools

import pytest
import torch

from sdft_kernels import AffineTokenLoss, _dispatch, linear_divergence, linear_divergence_loss, linear_token_logprob
from sdft_kernels._gemm import Gemm, exact_matmul
from sdft_kernels.testing import (
    assert_within_budget,
    make_divergence_inputs,
    on_the_same_ids,
    random_logprob_upstream,
    random_upstream,
    relative_error,
    restrict_support,
    run_divergence,
    run_divergence_loss,
    run_token_logprob,
    run_topk_divergence,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
IMPLS = ("triton", "native", "torch")
VOCABULARIES = (32_003, 151_936)  # odd: no row of logits is aligned but for the padding; and Qwen's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_GRADIENT_ERROR = 0.004  # design bar; eager bf16 logits are at 5 to 200 %
KL_ERROR = 0.01  # design bar at a KL of 1e-4; "near" is there
MIB = 2**20
# Several chunks of 61 tokens at 32,003: two tiles, and for the PyTorch rows 39 MiB of scratch and a rounded copy.
SMALL_BUDGET = {"triton": 8 * MIB, "native": 8 * MIB, "torch": 48 * MIB}


@functools.lru_cache(maxsize=4)
def drawn(kind, tokens, vocabulary, hidden, dtype, **options):
    return make_divergence_inputs(kind, tokens, vocabulary, hidden, dtype=dtype, **options)


def draw(kind="near", tokens=61, vocabulary=32_003, hidden=64, dtype=torch.float32, **options):
    """Drawn on the CPU, where the seed means the same everywhere, and copied: no test sees another's gradients."""
    return drawn(kind, tokens, vocabulary, hidden, dtype, **options).to(dtype, DEVICE)


@pytest.fixture(autouse=True)
def _has_a_kernel(request):
    """The native rows are there where they were built for CUDA, and on CUDA for affine losses only."""
    arguments = getattr(request.node, "callspec", None)
    if arguments is not None and arguments.params.get("impl") == "native":
        why = _dispatch.why_not("native", "linear_divergence", DEVICE)
        if why or arguments.params.get("loss") == "callable":
            pytest.skip(why or "no native kernel for callables on CUDA")


@pytest.fixture(autouse=True)
def _exact_references():
    """The references multiply outside the op, so the switches that the op ignores must be off for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def eager_numbers(x):
    """The numbers of a plain call on fp32 logits: products as the op makes them, everything else as one writes it."""

    def log_softmax(hidden, weight):
        exact = {"out_dtype": torch.float32} if hidden.dtype == torch.bfloat16 else {}
        return torch.mm(hidden, weight.t(), **exact).log_softmax(-1)

    s, t = log_softmax(x.student_input, x.student_weight), log_softmax(x.teacher_input, x.teacher_weight)
    label = x.target.clamp_min(0)[:, None]
    numbers = {
        "kl_teacher_student": (t.exp() * (t - s)).sum(-1),
        "kl_student_teacher": (s.exp() * (s - t)).sum(-1),
        "student_logprob": s.gather(1, label)[:, 0].masked_fill(x.target < 0, 0.0),
        "student_entropy": -(s.exp() * s).sum(-1),
        "teacher_logprob": t.gather(1, label)[:, 0].masked_fill(x.target < 0, 0.0),
        "teacher_entropy": -(t.exp() * t).sum(-1),
    }
    return numbers if x.mask is None else {name: v.masked_fill(~x.mask, 0.0) for name, v in numbers.items()}


def assert_as_good_as_eager(actual, eager, truth, dtype):
    """`actual` has what `truth` has. In bf16 numbers are as good as fp32's on the same products, gradients rounded."""
    for name, expected in truth.items():
        if not expected.is_floating_point():
            continue
        if dtype == torch.bfloat16 and name.startswith("grad_"):
            assert relative_error(actual[name], expected) < BF16_GRADIENT_ERROR, name
        elif name in eager:
            assert_within_budget(actual[name], eager[name], expected, name=name)
        else:
            assert relative_error(actual[name], expected) < KL_ERROR, name


# The products: bf16 operands, fp32 results, strided operands and results.


@pytest.mark.parametrize("tokens", (1, 37))
@pytest.mark.parametrize("vocabulary", (1, 203, 32_003))
def test_product_with_an_fp32_result_into_padded_rows(vocabulary, tokens):
    """`torch.mm(out_dtype=, out=)` with rows a stride apart, as in a tile of the Triton kernels; nothing between."""
    x = draw(tokens=tokens, vocabulary=vocabulary, hidden=256, dtype=torch.bfloat16)
    stride = -(-vocabulary // 16) * 16
    tile = torch.full((tokens, stride), 7.0, device=DEVICE)
    Gemm(torch.bfloat16, torch.float32).project(x.student_input, x.student_weight, None, tile[:, :vocabulary])
    wide = x.to(torch.float64)
    truth = wide.student_input @ wide.student_weight.t()
    assert relative_error(tile[:, :vocabulary], truth) < 1e-5  # a bf16 result would be at 2e-3
    assert tile[:, vocabulary:].eq(7.0).all()


@pytest.mark.parametrize("tokens", (1, 37))
def test_products_of_a_gradient_in_the_upper_half_of_its_rows(tokens):
    """dX and dW from a bf16 view with rows twice a stride apart; dW adds to what is there, in place, in fp32."""
    vocabulary, hidden = 32_003, 64
    x = draw(tokens=tokens, vocabulary=vocabulary, hidden=hidden, dtype=torch.bfloat16)
    stride = -(-vocabulary // 16) * 16
    tile = torch.full((tokens, stride), float("nan"), device=DEVICE)
    grad = tile.view(torch.bfloat16)[:, stride : stride + vocabulary]
    g = torch.Generator(DEVICE).manual_seed(0)
    grad.copy_(torch.randn(tokens, vocabulary, generator=g, device=DEVICE))
    gemm = Gemm(torch.bfloat16, torch.float32)
    out = torch.empty_like(x.student_input)
    gemm.grad_input(grad, x.student_weight, out)
    assert relative_error(out, grad.double() @ x.student_weight.double()) < BF16_GRADIENT_ERROR
    total = torch.randn(vocabulary, hidden, generator=g, device=DEVICE)
    before, pointer = total.double(), total.data_ptr()
    gemm.grad_weight(grad, x.student_input, total)
    assert relative_error(total, before + grad.double().t() @ x.student_input.double()) < 1e-5
    assert total.data_ptr() == pointer


def test_grad_input_over_a_long_vocabulary_is_rounded_once():
    """A product that splits its 151,936 terms must not add the parts in bf16."""
    x = draw(tokens=64, vocabulary=151_936, hidden=64, dtype=torch.bfloat16)
    g = torch.Generator(DEVICE).manual_seed(0)
    grad = torch.randn(64, 151_936, generator=g, device=DEVICE).bfloat16()
    out = torch.empty_like(x.student_input)
    Gemm(torch.bfloat16, torch.float32).grad_input(grad, x.student_weight, out)
    truth = grad.double() @ x.student_weight.double()
    once = relative_error(truth.bfloat16(), truth)
    assert relative_error(out, truth) < 1.1 * once


# Op 1.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ("peaked", "near"))
def test_numbers_and_gradients(kind, vocabulary, dtype, impl):
    x = draw(kind, vocabulary=vocabulary, dtype=DTYPES[dtype])
    upstream = random_upstream(61, jsd=True)
    truth = run_divergence(x.to(torch.float64), "reference", upstream, jsd_alpha=0.3)
    actual = run_divergence(x, impl, upstream, jsd_alpha=0.3)
    eager = eager_numbers(x)
    if dtype == "fp32":
        eager |= run_divergence(x, "reference", upstream, jsd_alpha=0.3)
    assert actual.keys() == truth.keys()
    assert_as_good_as_eager(actual, eager, truth, DTYPES[dtype])


def callable_loss(tokens, index):
    gate = tokens.teacher_entropy < 2.0
    return torch.where(gate, tokens.kl_teacher_student, tokens.kl_student_teacher) + 0.01 * tokens.student_logprob


LOSSES = {
    "default": None,
    "everything": AffineTokenLoss(
        kl_teacher_student=0.4, kl_student_teacher=0.3, jsd=0.2, student_logprob=-0.1, student_entropy=0.1, alpha=0.5
    ),
    "callable": callable_loss,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients(loss, vocabulary, dtype, impl):
    """With masked tokens, packed and selected, in several chunks and in one."""
    x = draw("near", vocabulary=vocabulary, dtype=DTYPES[dtype], mask=True)
    truth = run_divergence_loss(x.to(torch.float64), "reference", LOSSES[loss])
    eager = eager_numbers(x)
    if dtype == "fp32":
        eager |= run_divergence_loss(x, "reference", LOSSES[loss])
    for options in ({}, {"pack": False}, {"memory_budget": SMALL_BUDGET[impl]}):
        actual = run_divergence_loss(x, impl, LOSSES[loss], **options)
        assert actual.keys() == truth.keys()
        assert relative_error(actual.pop("loss"), truth["loss"]) < KL_ERROR
        expected = {name: value for name, value in truth.items() if name != "loss"}
        assert_as_good_as_eager(actual, eager, expected, DTYPES[dtype])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_over_many_chunks_of_bf16(impl):
    """The design's bar, at a real vocabulary: N = 2048 in 8 chunks and more, teacher next to student."""
    x = draw("nearer", tokens=2048, vocabulary=32_003, dtype=torch.bfloat16)
    truth = run_divergence_loss(x.to(torch.float64), "reference")
    actual = run_divergence_loss(x, impl, memory_budget=(120 if impl == "torch" else 64) * MIB)
    for name in ("grad_student_input", "grad_student_weight"):
        assert relative_error(actual[name], truth[name]) < BF16_GRADIENT_ERROR, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(dtype, impl):
    x = draw(tokens=300, dtype=DTYPES[dtype], mask=True)
    for kind, loss in LOSSES.items():
        if (kind, impl) == ("callable", "native"):
            continue
        one, two = (run_divergence_loss(x, impl, loss, memory_budget=SMALL_BUDGET[impl]) for _ in range(2))
        for name, value in one.items():
            assert torch.equal(value, two[name]), name


def leaves(x):
    """Arguments by name, whose student tensors require grad."""
    arguments = {name: value for name, value in x.tensors().items() if value is not None}
    for name in ("student_input", "student_weight"):
        arguments[name].requires_grad_()
    return arguments


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_host_synchronisation_without_packing(loss, impl):
    arguments = leaves(draw(dtype=torch.bfloat16, mask=True))

    def step():
        linear_divergence_loss(**arguments, token_loss=LOSSES[loss], pack=False, impl=impl)[0].backward()
        tokens = linear_divergence(**arguments, pack=False, impl=impl)
        (tokens.kl_teacher_student.sum() + tokens.student_entropy.sum()).backward()

    step()  # compiles kernels, makes library handles
    assert_runs_without_synchronising(step)


def test_token_logprob_does_not_synchronise_without_packing():
    x = draw(dtype=torch.bfloat16, mask=True)
    hidden, weight = x.student_input.requires_grad_(), x.student_weight.requires_grad_()

    def step():
        tokens = linear_token_logprob(hidden, weight, x.target, mask=x.mask, pack=False)
        (tokens.logprob.sum() + tokens.entropy.sum()).backward()

    step()
    assert_runs_without_synchronising(step)


def assert_runs_without_synchronising(step):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_control_a_synchronisation_is_seen():
    with pytest.raises(RuntimeError, match="synchroni"):
        assert_runs_without_synchronising(lambda: torch.ones(3, device=DEVICE).sum().item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ("default", "everything"))
def test_cuda_graph_replays_on_new_inputs(loss, impl):
    """Loss, numbers and gradients of a captured step equal those of the same call outside, bit for bit."""
    first = draw("near", dtype=torch.bfloat16, mask=True)
    second = draw("flat", dtype=torch.bfloat16, mask=True, seed=1)
    static = leaves(first)

    def step():
        loss_value, tokens = linear_divergence_loss(**static, token_loss=LOSSES[loss], pack=False, impl=impl)
        loss_value.backward()
        return loss_value.detach(), tokens

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    static["student_input"].grad = static["student_weight"].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_value, tokens = step()
    with torch.no_grad():
        for name, value in second.tensors().items():
            if value is not None:
                static[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected = run_divergence_loss(second, impl, LOSSES[loss], pack=False)
    assert torch.equal(loss_value, expected["loss"])
    for name, value in tokens._asdict().items():
        assert value is None or torch.equal(value, expected[name]), name
    for name in ("student_input", "student_weight"):
        assert torch.equal(static[name].grad, expected[f"grad_{name}"]), name


def start_of_peak():
    """Bytes allocated now, from where the peak is counted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", (256, 768))
def test_peak_memory_obeys_the_budget(budget, impl):
    """Beyond inputs, gradients and one fp32 accumulator. The control holds all logits and must be over."""
    x = draw(tokens=2048, vocabulary=151_936, hidden=64, dtype=torch.bfloat16)
    full = 2048 * 151_936 * 4
    warm = draw(tokens=8, vocabulary=151_936, hidden=64, dtype=torch.bfloat16)
    linear_divergence_loss(**leaves(warm), impl=impl)[0].backward()  # allocates workspaces that libraries keep
    arguments = leaves(x)
    before = start_of_peak()
    linear_divergence_loss(**arguments, memory_budget=budget * MIB, impl=impl)[0].backward()
    used = torch.cuda.max_memory_allocated() - before
    gradients = sum(2 * arguments[name].numel() for name in ("student_input", "student_weight"))
    accumulator = 4 * arguments["student_weight"].numel()
    assert used - gradients - accumulator < (budget + 8) * MIB
    if impl == "torch" and budget == 256:
        before = start_of_peak()
        linear_divergence_loss(**leaves(x), impl="reference")[0].backward()
        assert torch.cuda.max_memory_allocated() - before > 2 * full


def test_a_tile_of_more_than_2_to_31_logits():
    """Offsets within a chunk need 64 bits; the chunks of the default budget, which do not, are the control."""
    x = draw(tokens=16_384, vocabulary=151_936, hidden=16)
    assert 16_384 * 151_936 > 2**31
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of free GPU memory")
    whole, parts = (run_divergence_loss(x, "triton", memory_budget=b) for b in (24 * 2**30, None))
    for name, value in parts.items():
        assert relative_error(whole[name], value) < 1e-3, name  # other shapes of the products; a wrong offset gives 1


# The switches for TF32.


@pytest.mark.parametrize("impl", IMPLS)
def test_tf32_switches_are_ignored(impl):
    x = draw(hidden=256)
    exact = run_divergence_loss(x, impl)
    truth = run_divergence_loss(x.to(torch.float64), "reference")
    torch.set_float32_matmul_precision("high")  # the fixture puts it back
    switched, asked = run_divergence_loss(x, impl), run_divergence_loss(x, impl, precision="tf32")
    assert torch.get_float32_matmul_precision() == "high"
    for name, value in exact.items():
        assert torch.equal(switched[name], value), name
    for name in ("kl_teacher_student", "grad_student_weight"):  # the control: TF32 is there when it is asked for
        assert relative_error(asked[name], truth[name]) > 10 * relative_error(exact[name], truth[name]), name


def test_exact_matmul_is_exact_inside_and_gone_outside():
    torch.set_float32_matmul_precision("high")
    g = torch.Generator(DEVICE).manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=g, device=DEVICE)
    truth = a.double() @ b.double()
    with exact_matmul(None):
        inside = a @ b
    assert relative_error(inside, truth) < 1e-6 < 1e-5 < relative_error(a @ b, truth)


# Compiled, and under autocast.


@pytest.mark.unpoisoned
def test_compiles_to_one_graph():
    x = draw(dtype=torch.bfloat16)
    arguments = leaves(x)

    @torch.compile(fullgraph=True)
    def step(student_input, student_weight):
        rest = {name: value for name, value in arguments.items() if not name.startswith("student_")}
        return 2 * linear_divergence_loss(student_input, student_weight, **rest)[0]

    loss = step(arguments["student_input"], arguments["student_weight"])
    loss.backward()
    expected = run_divergence_loss(x, "auto")
    assert relative_error(loss, 2 * expected["loss"]) < 1e-6
    assert relative_error(arguments["student_weight"].grad, 2 * expected["grad_student_weight"]) < BF16_GRADIENT_ERROR


def test_autocast_and_grad_scaler():
    """bf16 operands, fp32 logits and gradients; a loss scale of 2^16 changes only exponents."""
    x = draw()
    arguments = leaves(x)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, tokens = linear_divergence_loss(**arguments)
    scaler.scale(loss).backward()
    rounded = x.to(torch.bfloat16)
    truth = run_divergence_loss(rounded.to(torch.float64), "reference")
    assert relative_error(tokens.student_logprob, truth["student_logprob"]) < 1e-5
    for name in ("student_input", "student_weight"):
        grad = arguments[name].grad / scaler.get_scale()
        assert grad.dtype == torch.float32
        assert relative_error(grad, truth[f"grad_{name}"]) < BF16_GRADIENT_ERROR, name


# Ops 2 and 3.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("support", "tail", "alpha"),
    [
        ("student", "renormalize", 0.5),
        ("student", "bucket", 0.3),
        ("union", "renormalize", 1.0),
        ("intersection", "renormalize", 0.0),
        ("cached", "drop", 0.0),
        ("given", "renormalize", 0.5),
    ],
)
def test_topk_divergence(support, tail, alpha, dtype):
    x = draw("near", dtype=DTYPES[dtype], mask=True)

    def call(inputs, impl, found=None):
        arguments, mode = restrict_support(inputs.tensors(), support, k=20, cache_dtype=torch.float32)
        mode |= {"tail": tail, "alpha": alpha}
        return run_topk_divergence(arguments, impl, **(mode if found is None else on_the_same_ids(mode, found)))

    actual = call(x, "torch")
    again = call(x, "torch")
    truth = call(x.to(torch.float64), "reference", actual)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name
    if dtype == "fp32":
        assert_as_good_as_eager(actual, call(x, "reference", actual), truth, torch.float32)
        return
    assert relative_error(actual["divergence"], truth["divergence"]) < KL_ERROR
    for name in ("grad_student_input", "grad_student_weight"):
        assert relative_error(actual[name], truth[name]) < BF16_GRADIENT_ERROR, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_token_logprob(vocabulary, dtype):
    x = draw("near", vocabulary=vocabulary, dtype=DTYPES[dtype], mask=True)
    upstream = random_logprob_upstream(61)
    actual, again = (run_token_logprob(x, "torch", upstream) for _ in range(2))
    truth = run_token_logprob(x.to(torch.float64), "reference", upstream)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name
    eager = run_token_logprob(x, "reference", upstream) if dtype == "fp32" else {}
    assert_as_good_as_eager(actual, eager, truth, DTYPES[dtype])
    frozen = run_token_logprob(x, "torch", upstream, ("input",), outputs=("logprob",))
    truth = run_token_logprob(x.to(torch.float64), "reference", upstream, ("input",), outputs=("logprob",))
    limit = 1e-5 if dtype == "fp32" else BF16_GRADIENT_ERROR
    assert relative_error(frozen["grad_input"], truth["grad_input"]) < limit
