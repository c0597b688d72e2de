"""A loss scaled before backward, as in gradient accumulation: bf16 gradients are off by their rounding alone."""

import pytest
import torch

from sdft_kernels import linear_divergence, linear_divergence_loss, linear_token_logprob, linear_topk_divergence
from sdft_kernels.divergence import operators
from sdft_kernels.testing import make_divergence_inputs, relative_error

SCALES = (1 / 3, 1.3, 1.0 / 1024)  # in bf16 0.334, 0.2 % too much, 1.297, 0.24 % too little, and exact
BIAS = 6e-4  # what is left of rounding each number by itself, on average


def inputs(dtype=torch.bfloat16):
    return make_divergence_inputs("flat", 37, 203, 16, dtype=torch.bfloat16, bias=True).to(dtype)


def loss(x, h, w, b, **options):
    return linear_divergence_loss(h, w, x.teacher_input, x.teacher_weight, student_bias=b, **options)[0]


def numbers(x, h, w, b):
    return linear_divergence(h, w, x.teacher_input, x.teacher_weight, student_bias=b).kl_student_teacher.sum()


def logprob(x, h, w, b):
    return linear_token_logprob(h, w, x.target, bias=b, outputs=("logprob",)).logprob.sum()


def topk(x, h, w, b):
    return linear_topk_divergence(h, w, x.teacher_input, x.teacher_weight, student_bias=b, k=5).divergence.sum()


def bucket(x, h, w, b):
    return linear_topk_divergence(
        h, w, x.teacher_input, x.teacher_weight, student_bias=b, k=5, tail="bucket"
    ).divergence.sum()


def callable_loss(x, h, w, b):
    return loss(x, h, w, b, token_loss=lambda t, _: t.kl_teacher_student)


def gradients(function, x, scale, frozen, **options):
    trained = [x.student_input, x.student_weight, x.student_bias]
    trained = [t.detach().clone().requires_grad_(i == 0 or not frozen) for i, t in enumerate(trained)]
    total = function(x, *trained)
    total = total if scale is None else total * scale
    return torch.autograd.grad(total, [t for t in trained if t.requires_grad], **options)


def bias(gradient, expected):
    """By how much the gradient is too long: the roundings of its numbers cancel there, that of a factor does not."""
    a, e = gradient.double(), expected.double()
    return abs((a * e).sum() / (e * e).sum() - 1).item()


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("function", (loss, callable_loss, numbers, logprob, topk, bucket), ids=lambda f: f.__name__)
def test_a_scale_is_not_rounded(function, frozen, monkeypatch):
    monkeypatch.setattr(operators, "SCALE_BLOCK", 1000)
    x = inputs()
    plain, truth = (gradients(function, y, None, frozen) for y in (x, inputs(torch.float64)))
    for scale in SCALES:
        for a, p, t in zip(gradients(function, x, scale, frozen), plain, truth, strict=True):
            assert a.dtype == torch.bfloat16
            assert bias(a, scale * p.double()) < BIAS, (scale, tuple(a.shape))
            assert relative_error(a, scale * t) < 2 * relative_error(p, t), (scale, tuple(a.shape))
    # Control: the scale rounded too.
    assert max(bias(p * torch.tensor(1 / 3).bfloat16(), p.double() / 3) for p in plain) > 2 * BIAS


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_every_way_through_backward_gives_the_same_bits(dtype, monkeypatch):
    """In place, of a graph that is kept, in blocks, and the product in fp32 (fp64) rounded once."""
    x = inputs(dtype)
    plain = gradients(loss, x, None, False)
    wide = torch.promote_types(dtype, torch.float32)
    expected = [(g.to(wide) * torch.tensor(1 / 3, dtype=wide)).to(dtype) for g in plain]
    for block in (2**20, 100):
        monkeypatch.setattr(operators, "SCALE_BLOCK", block)
        for keep in (False, True):
            for a, e in zip(gradients(loss, x, 1 / 3, False, retain_graph=keep), expected, strict=True):
                assert a.equal(e), (block, keep)


@pytest.mark.unpoisoned
def test_compiled_backward_rounds_once_too():
    x = inputs()
    step = torch.compile(lambda *t: loss(x, *t) / 3, fullgraph=True, backend="aot_eager")
    trained = [t.detach().clone().requires_grad_() for t in (x.student_input, x.student_weight, x.student_bias)]
    found = torch.autograd.grad(step(*trained), trained)
    for a, e in zip(found, gradients(lambda *t: loss(*t) / 3, x, None, False), strict=True):
        assert a.equal(e)
