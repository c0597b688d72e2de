"""torch's default dtype, which whoever loads a model may set, decides nothing: every tensor is made with a dtype."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import distill_tiny
import pytest
import torch

from sdft_kernels import (
    PrefixTree,
    _native,
    linear_divergence_loss,
    linear_token_logprob,
    linear_topk_divergence,
    sdft_token_loss,
    shared_prefix_attention,
)
from sdft_kernels._ema import ema_update_, ema_update_hilo_, split_hilo
from sdft_kernels.distill import SelfDistiller
from sdft_kernels.divergence import gallery
from sdft_kernels.testing import make_divergence_inputs

PACKAGE = Path(__file__).resolve().parent.parent / "sdft_kernels"
MAKERS = {
    *("tensor", "as_tensor", "scalar_tensor", "asarray", "zeros", "ones", "empty", "empty_strided", "full", "eye"),
    *("arange", "range", "linspace", "logspace", "rand", "randn", "normal", "hann_window", "complex"),
}
DEFAULT = {"get_default_dtype", "set_default_dtype", "Tensor"}


def undecided(source):
    """Lines that make a tensor, and leave its dtype to the default."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        if name in DEFAULT or (name in MAKERS and all(keyword.arg != "dtype" for keyword in node.keywords)):
            yield node.lineno


def test_every_tensor_is_made_with_a_dtype():
    found = [f"{path}:{line}" for path in sorted(PACKAGE.rglob("*.py")) for line in undecided(path.read_text())]
    assert found == []


def test_a_tensor_without_one_is_seen():
    source = (
        "torch.tensor(x)\ntorch.ones(3, device=d)\ntorch.ones(3, dtype=torch.int64)\nx.new_ones(3)\ntorch.Tensor([1])"
    )
    assert list(undecided(source)) == [1, 2, 5]


def loss_of(x, impl, **options):
    weight = x.student_weight.detach().requires_grad_()
    arguments = x.tensors() | {"student_weight": weight, "student_input": x.student_input.detach().requires_grad_()}
    loss, tokens = linear_divergence_loss(**arguments, impl=impl, **options)
    grads = torch.autograd.grad(loss, [arguments["student_input"], weight])
    return [loss.detach(), *(t for t in tokens if t is not None), *grads]


def divergences():
    """The loss with every kind of token loss, in every implementation on CPU."""
    x = make_divergence_inputs("near", 5, 203, 16, mask=True)
    old = torch.linspace(-3, -1, 5, dtype=torch.float32)
    losses = {
        "mean": None,
        "clipped": sdft_token_loss(0.3, 0.37, old, 2.0),
        "ppo": gallery.ppo_clip(torch.tensor([1, -2, 3, 0, 1]), old),
        "directed": gallery.directed_kl(torch.tensor([True, False, True, False, True]), 0.37),
    }
    numbers = []
    for impl in ("reference", "torch", *(("native",) if _native.has_native() else ())):
        for token_loss in losses.values():
            for pack in (True, False):
                numbers += loss_of(x, impl, token_loss=token_loss, pack=pack)
    return numbers


def other_heads():
    x = make_divergence_inputs("near", 5, 203, 16, mask=True)
    hidden, weight = x.student_input.detach().requires_grad_(), x.student_weight.detach()
    numbers = []
    for impl in ("reference", "torch"):
        tokens = linear_token_logprob(hidden, weight, x.target, mask=x.mask, impl=impl)
        numbers += [t.detach() for t in tokens] + list(torch.autograd.grad(sum(t.sum() for t in tokens), hidden))
        for support, tail in (("union", "bucket"), ("student", "renormalize"), ("intersection", "drop")):
            found = linear_topk_divergence(
                hidden, weight, x.teacher_input, x.teacher_weight, x.target, k=5, support=support, tail=tail,
                mask=x.mask, impl=impl,
            )  # fmt: skip
            numbers += [t.detach() for t in found if t is not None]
            numbers += torch.autograd.grad(found.divergence.sum(), hidden)
    return numbers


def attention():
    tree = PrefixTree([5, 3, 4], [-1, 0, 0])
    g = torch.Generator().manual_seed(0)
    q, k, v, sinks = (
        torch.randn(s, generator=g, dtype=torch.float32) for s in ((12, 4, 16), (12, 2, 16), (12, 2, 16), (4,))
    )
    q.requires_grad_()
    numbers = []
    for impl in ("reference", "composition", *(("native",) if _native.has_native() else ())):
        for softcap in (None, 20.0):
            out, lse = shared_prefix_attention(
                q, k, v, tree, softcap=softcap, window=4, sinks=sinks, return_lse=True, impl=impl
            )
            numbers += [out.detach(), lse.detach(), *torch.autograd.grad(out.sum() + lse.sum(), q)]
    return numbers


def averages():
    g = torch.Generator().manual_seed(0)
    ema, param = (torch.randn(33, generator=g, dtype=torch.float32) for _ in range(2))
    high, low = split_hilo(param)
    rows = torch.randn(11, 3, generator=g, dtype=torch.float32).t()  # not contiguous: in PyTorch
    return [
        ema_update_(ema, param, 0.01), *ema_update_hilo_(high, low, ema, 0.01), ema_update_(rows.clone(), rows, 0.5)
    ]  # fmt: skip


def steps():
    """A distiller's loss, metrics and gradients: importance weights, sampling correction, weights of completions."""
    batch = distill_tiny.batch()
    lengths = [[len(c) for c in group] for group in batch.completions]
    logprobs = lambda scale: [[[-scale * (0.3 + 0.7 * t) for t in range(n)] for n in g] for g in lengths]  # noqa: E731
    batch = replace(
        batch,
        old_logprobs=logprobs(1.0),
        sampling_logprobs=logprobs(1.1),
        weights=[[0.37 + n for n in g] for g in lengths],
    )
    numbers = []
    for options in ({}, {"alpha": 0.3}, {"loss": "ce"}, {"token_loss": lambda t, _: t.kl_student_teacher}):
        torch.manual_seed(0)
        model = MODEL[0]
        distiller = SelfDistiller(model, teacher="frozen", importance_clip=2.0, skip_first_tokens=1, **options)
        model.zero_grad()
        out = distiller(batch)
        out.loss.backward()
        numbers += [out.loss.detach(), *(v for _, v in sorted(out.metrics.items()))]
        numbers += [p.grad for p in model.parameters()]
    return numbers


MODEL = []


@pytest.mark.parametrize("numbers", (divergences, other_heads, attention, averages, steps), ids=lambda f: f.__name__)
@pytest.mark.parametrize("default", (torch.bfloat16, torch.float64), ids=str)
def test_the_same_bits_under_any_default(default, numbers):
    MODEL[:] = [distill_tiny.model()] if numbers is steps else []
    expected = [x.clone() for x in numbers()]
    torch.set_default_dtype(default)
    try:
        found = [x.clone() for x in numbers()]
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), i
