"""Op 1 inside what trainers wrap around it: torch.compile, AMP with a GradScaler, DistributedDataParallel."""

import os
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sdft_kernels import AffineTokenLoss, _native, linear_divergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels._chunks import Head, Need, prepared
from sdft_kernels._gemm import Gemm
from sdft_kernels._head import IDENTITY
from sdft_kernels.divergence import driver
from sdft_kernels.testing import make_divergence_inputs, relative_error, run_divergence_loss

MEAN_JSD = sdft_token_loss(alpha=0.3)


def step_loss(h, w, h_t, w_t, mask, target):
    return linear_divergence_loss(h, w, h_t, w_t, target, mask=mask, token_loss=MEAN_JSD)[0]


def step_tokens(h, w, h_t, w_t, mask, target):
    tokens = linear_divergence(h, w, h_t, w_t, target, mask=mask, jsd_alpha=0.3)
    ratio = (tokens.student_logprob - tokens.student_logprob.detach()).exp()
    return (ratio * tokens.jsd + tokens.student_entropy * tokens.teacher_entropy).sum()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("step", (step_loss, step_tokens))
def test_full_graph_with_a_dynamic_number_of_tokens(step):
    """One graph for every N, and the same numbers as eager."""
    x = make_divergence_inputs("peaked", tokens=32, vocabulary=203, hidden=16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for count in (32, 7, 19):
        results = []
        for function in (compiled, step):
            h, w = x.student_input[:count].clone().requires_grad_(), x.student_weight.clone().requires_grad_()
            h_t, target, mask = x.teacher_input[:count].clone(), x.target[:count].clone(), torch.arange(count) > 2
            for tensor in (h, h_t, target, mask):
                torch._dynamo.mark_dynamic(tensor, 0)
            loss = function(h, w, h_t, x.teacher_weight, mask, target)
            loss.backward()
            results.append((loss.detach(), h.grad, w.grad))
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < 1e-6
    assert counter.frame_count == 1


@pytest.mark.unpoisoned
def test_a_callable_breaks_the_graph_once():
    x = make_divergence_inputs("near", tokens=5, vocabulary=203, hidden=16)

    def step(h, w):
        loss, _ = linear_divergence_loss(
            2 * h, w, x.teacher_input, x.teacher_weight, token_loss=lambda t, index: t.kl_teacher_student.square()
        )
        return 3 * loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter)(x.student_input, x.student_weight)
    torch.testing.assert_close(compiled, step(x.student_input, x.student_weight))
    assert counter.frame_count == 3  # before, the few lines of the op after its loop, after; not one per chunk
    with pytest.raises(torch._dynamo.exc.Unsupported, match="two row kernels"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(x.student_input, x.student_weight)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_autocast_with_a_grad_scaler(dtype):
    """fp32 master weights under autocast and a scaled loss: unscaled, the gradients are those of the plain call."""
    x = make_divergence_inputs("near", tokens=16, vocabulary=503, dtype=torch.float32)
    operands = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    rounded = x.replace(**{name: getattr(x, name).bfloat16().float() for name in operands})
    layer = torch.nn.Linear(32, 503, bias=False)
    layer.weight.data.copy_(rounded.student_weight)
    h = rounded.student_input.clone().requires_grad_()
    optimizer = torch.optim.SGD([layer.weight, h], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, _ = linear_divergence_loss(h, layer.weight, rounded.teacher_input, rounded.teacher_weight)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = run_divergence_loss(rounded.replace(target=None), "auto")
    # Where the last products take bf16, the gradient of the logits is rounded to it as it enters them.
    rounds = Gemm(dtype, torch.float32, native=True).gradient_dtype(h.device) == torch.bfloat16
    limit = 0.004 if rounds and _native.has_native() else 1e-6
    assert relative_error(layer.weight.grad, expected["grad_student_weight"]) < limit
    assert relative_error(h.grad, expected["grad_student_input"]) < limit
    before = layer.weight.detach().clone()
    scaler.step(optimizer)
    assert not layer.weight.equal(before)


def test_master_weights_are_cast_once_where_products_take_bf16():
    """What CUDA does, on CPU: a copy of each head per call, of a shared head one; the gradient keeps fp32."""

    class Casting(Gemm):
        casts = 0

        def prepare(self, weight):
            Casting.casts += 1
            return weight.to(self.operand)

    x = make_divergence_inputs("near", tokens=4, vocabulary=53, hidden=8)
    gemm = Casting(torch.bfloat16, torch.float32)
    student, teacher = (Head(x.student_input, w, None, IDENTITY) for w in (x.student_weight, x.teacher_weight))
    for heads, casts in (((student, teacher), 2), ((student, student._replace(input=x.teacher_input)), 1)):
        Casting.casts = 0
        ready = prepared(gemm, *heads)
        assert Casting.casts == casts and all(head.weight.dtype == torch.bfloat16 for head in ready)
        assert (ready[0].weight is ready[1].weight) == (casts == 1)
    affine = driver.Affine({"kl_teacher_student": torch.ones(4)})
    options = dict(alpha=None, need=Need(True, True), gemm=gemm, rows=driver.rows_of("torch"))
    result = driver.linear_divergence(student, teacher, None, None, token_loss=affine, **options)
    assert result.grad_weight.dtype == torch.float32 and result.grad_input.dtype == torch.float32


class Model(torch.nn.Module):
    """A body and a head; the loss is computed inside forward, where DDP sees it."""

    def __init__(self, x):
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        torch.nn.init.eye_(self.body.weight)
        torch.nn.init.zeros_(self.body.bias)
        self.head = torch.nn.Parameter(x.student_weight.clone())

    def forward(self, h, h_t, w_t):
        loss = AffineTokenLoss(kl_teacher_student=1 / 8)
        return linear_divergence_loss(self.body(h), self.head, h_t, w_t, token_loss=loss)[0]


def ddp_case():
    x = make_divergence_inputs("peaked", tokens=8, vocabulary=203, hidden=16)
    return x, Model(x)


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    from processes import run_ranks

    run_ranks(__file__, 2, tmp_path / "gradients.pt")
    x, model = ddp_case()
    model(x.student_input, x.teacher_input, x.teacher_weight).backward()
    for actual, parameter in zip(torch.load(tmp_path / "gradients.pt"), model.parameters(), strict=True):
        assert relative_error(2 * actual, parameter.grad) < 1e-5  # DDP averages over ranks, the loss is a sum


def ddp_rank(path):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}.ranks", rank=rank, world_size=size)
    x, model = ddp_case()
    part = slice(0, 3) if torch.distributed.get_rank() == 0 else slice(3, 8)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(x.student_input[part], x.teacher_input[part], x.teacher_weight).backward()
    if torch.distributed.get_rank() == 0:
        torch.save([p.grad for p in model.parameters()], path)
    del wrapped  # the group must not die with it: it would join, under the GIL, a thread that waits for the GIL
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ddp_rank(sys.argv[1])
