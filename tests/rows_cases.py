"""Tiles of logits that bite, and one call of an implementation's row kernels on them."""

import torch

from sdft_kernels._head import IDENTITY, Transform
from sdft_kernels.divergence.fields import DIFFERENTIABLE, FIELDS
from sdft_kernels.testing import relative_error

CAPPED = (Transform(1.2, 20.0, 1.5), Transform(1.0, 30.0, 1.5))
TRANSFORMS = {"plain": (IDENTITY, IDENTITY), "scaled": (Transform(0.5, None, 0.75),) * 2, "capped": CAPPED}
MODES = {name: (name,) for name in DIFFERENTIABLE} | {"all": DIFFERENTIABLE, "none": ()}


def tile(rows, logits):
    """A copy with rows as far apart as `rows` wants them and NaN in the padding, which no kernel may let in."""
    count, vocabulary = logits.shape
    padded = logits.new_full((count, rows.row_stride(vocabulary)), float("nan"))
    padded[:, :vocabulary] = logits
    return padded[:, :vocabulary]


def draw(count, vocabulary, dtype, device, gap=0.1):
    """Logits of a student, of a teacher `gap` away from it, and targets, one of them absent."""
    g = torch.Generator().manual_seed(count * vocabulary)
    student = 6 * torch.randn(count, vocabulary, generator=g, dtype=torch.float64)
    teacher = student + gap * torch.randn(count, vocabulary, generator=g, dtype=torch.float64)
    target = torch.randint(vocabulary, (count,), generator=g)
    if count > 1:
        target[1] = -100
    return student.to(device, dtype), teacher.to(device, dtype), target.to(device)


def run_affine(rows, student, teacher, target, weights, clip, transforms, alpha, keep=None, gradient=True):
    """(tokens, loss, gradient) of the fused kernel; with `clip`, every old log-probability is -3."""
    tokens = student.new_zeros(len(FIELDS), student.shape[0])
    loss = student.new_zeros(student.shape[0])
    old = student.new_full(student.shape[:1], -3.0) if clip else None
    grad = rows.affine_(
        tile(rows, student), tile(rows, teacher), target, dict(weights), old, clip, transforms, alpha, keep, tokens,
        loss, student.dtype if gradient else None,
    )  # fmt: skip
    return (tokens, loss) if grad is None else (tokens, loss, grad)


def run_pair(rows, student, teacher, target, weights, transforms, alpha, keep=None):
    """(tokens, gradient) of the two kernels around a callable."""
    tokens = student.new_zeros(len(FIELDS), student.shape[0])
    a, b = tile(rows, student), tile(rows, teacher)
    state = rows.divergence_stats(a, b, target, transforms, alpha, keep, tokens)
    grad = rows.divergence_grad_(a, b, state, target, dict(weights), transforms, alpha, keep, student.dtype)
    return tokens, grad


def assert_same(actual, expected, limit):
    """Relative error of each, and NaN in the same places."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isnan().equal(e.isnan()), i
        assert relative_error(a, e) < limit, i
