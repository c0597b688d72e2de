"""A target of -100: out of a mean like a masked token, in a loss of given weights without a log-probability."""

import pytest
import torch

from sdft_kernels import AffineTokenLoss, linear_divergence_loss, sdft_token_loss
from sdft_kernels.divergence import api
from sdft_kernels.testing import make_divergence_inputs, relative_error, run_divergence_loss

IMPLS = ["reference", "torch", "auto"]
MASKS = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])


def with_absent(masked, absent=slice(3, 11)):
    x = make_divergence_inputs("near", tokens=24, mask=masked)
    target = x.target.clone().masked_fill_(x.target == -100, 0)
    target[absent] = -100
    present = target != -100
    return x.replace(target=target), present if x.mask is None else present & x.mask


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@MASKS
def test_a_mean_is_that_of_the_masked_call(impl, alpha, masked):
    x, counted = with_absent(masked)
    loss = sdft_token_loss(alpha)
    got, want = run_divergence_loss(x, impl, loss), run_divergence_loss(x.replace(mask=counted), impl, loss)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["grad_student_input"][~counted].any() and got["grad_student_input"][counted].any()
    # Dividing by all of them, as before, is another number.
    everyone = 24 if x.mask is None else int(x.mask.sum())
    assert relative_error(got["loss"] * counted.sum() / everyone, got["loss"]) > 0.1


@MASKS
def test_without_a_host_synchronisation_where_values_are_not_visible(masked, monkeypatch):
    """What a call on CUDA does: no packing that the caller did not ask for, the same numbers."""
    x, _ = with_absent(masked)
    want = run_divergence_loss(x, "torch")
    monkeypatch.setattr(api, "values_are_visible", lambda tensor: False)
    seen = []
    monkeypatch.setattr(api, "_resolve_loss", lambda *a, original=api._resolve_loss: seen.append(a) or original(*a))
    got = run_divergence_loss(x, "torch")
    assert [options.pack for _, _, options in seen] == [masked]
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-6, name


@pytest.mark.parametrize("pack", [True, False])
def test_nothing_present_is_zero(pack):
    x, counted = with_absent(False, slice(None))
    assert not counted.any()
    got = run_divergence_loss(x, "auto", pack=pack)
    assert got["loss"] == 0 and not got["grad_student_input"].any() and not got["grad_student_weight"].any()


def test_what_an_absent_token_holds_does_not_matter():
    x, counted = with_absent(False)
    want = run_divergence_loss(x, "auto")
    broken = x.student_input.clone()
    broken[~counted] = torch.nan
    got = run_divergence_loss(x.replace(student_input=broken), "auto")
    assert torch.equal(got["grad_student_weight"], want["grad_student_weight"]) and got["loss"] == want["loss"]


def test_given_weights_keep_the_token():
    x, _ = with_absent(False)
    loss, tokens = linear_divergence_loss(**x.tensors(), token_loss=AffineTokenLoss(kl_teacher_student=1 / 24))
    assert (tokens.kl_teacher_student[3:11] > 0).all() and not tokens.student_logprob[3:11].any()
    torch.testing.assert_close(loss, tokens.kl_teacher_student.mean())


@pytest.mark.unpoisoned
def test_in_one_graph():
    x, _ = with_absent(False)
    torch.compiler.reset()
    try:
        compiled = torch.compile(linear_divergence_loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**x.tensors())[0], linear_divergence_loss(**x.tensors())[0])
    finally:
        torch.compiler.reset()  # what is compiled here would count in tests that count frames
