"""`SelfDistiller` against TRL's SDFT loss and against a plain full-logits computation; edges and options."""

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels import AffineTokenLoss  # noqa: E402
from sdft_kernels.distill import DistillBatch, SelfDistiller  # noqa: E402


def logits_of(model, prompts, completions):
    """(B, L, V) logits that predict the completions, one sequence at a time, padded with zeros."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion:
            logits = model(input_ids=torch.tensor([list(prompt) + list(completion)])).logits
            rows.append(logits[0, len(prompt) - 1 : -1])
        else:
            rows.append(torch.zeros(0, model.config.vocab_size))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def padded(values, lengths):
    return torch.nn.utils.rnn.pad_sequence(list(torch.as_tensor(values).split(lengths)), batch_first=True)


def make(alpha=0.0, **options):
    student, teacher = tiny.model(0), tiny.model(1).eval().requires_grad_(False)
    return student, teacher, SelfDistiller(student, teacher, alpha=alpha, **{"skip_first_tokens": 1, **options})


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_same_gradients(a, b, rtol):
    for x, y in zip(gradients(a), gradients(b), strict=True):
        assert (x - y).norm() <= rtol * y.norm().clamp(min=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("importance_clip", [None, 1.5])
def test_equals_trl(alpha, importance_clip):
    """TRL 1.16: full logits, temperature on both sides, per-sequence mean then batch mean, IS clip per token."""
    loss_utils = pytest.importorskip("trl.experimental.sdft.loss_utils")
    student, teacher, distiller = make(alpha, temperature=0.7, importance_clip=importance_clip)
    batch = tiny.batch()
    flat = batch.flatten()
    generator = torch.Generator().manual_seed(2)
    old = (-3.4 + torch.randn(sum(flat.lengths), generator=generator)).tolist()
    nested = iter(old)
    batch.old_logprobs = [[[next(nested) for _ in c] for c in group] for group in batch.completions]
    loss = distiller(batch).loss
    loss.backward()

    plain = copy.deepcopy(student)
    plain.zero_grad()
    s = logits_of(plain, flat.student_prompts, flat.completions) / 0.7
    t = logits_of(teacher, flat.teacher_prompts, flat.completions) / 0.7
    per_token = loss_utils.compute_full_logit_self_distillation_loss(s, t, distillation_alpha=alpha)
    mask = padded(torch.ones(sum(flat.lengths)), flat.lengths)
    mask[:, 0] = 0
    if importance_clip is not None:
        ids = padded([t for c in flat.completions for t in c], flat.lengths)
        logprob = s.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        old_logprob = padded(old, flat.lengths)
        per_token = loss_utils.apply_importance_sampling_clipping(per_token, logprob, old_logprob, importance_clip)
    expected = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(student, plain, 1e-4)


def test_weights_and_loss_mask_and_custom_token_losses():
    batch = tiny.batch()
    mask = [[[i % 2 == 0 for i, _ in enumerate(c)] for c in group] for group in batch.completions]
    weights = [[0.5 + r for r, _ in enumerate(group)] for group in batch.completions]
    batch = DistillBatch(batch.student_prompts, batch.teacher_prompts, batch.completions, mask, weights)
    flat = batch.flatten()
    student, _, distiller = make()
    out = distiller(batch)
    kl, position = out.tokens.kl_teacher_student, torch.tensor([i for n in flat.lengths for i in range(n)])
    kept = torch.tensor(flat.loss_mask) & (position >= 1)
    assert torch.equal(kl != 0, kept)
    expected = (
        sum(
            w * k[m].mean() if m.any() else 0.0
            for w, k, m in zip([0.5, 1.5, 0.5, 0.5, 1.5], kl.split(flat.lengths), kept.split(flat.lengths), strict=True)
        )
        / 5
    )
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics["tokens"] == kept.sum()
    assert out.metrics["kl_teacher_student"].item() == pytest.approx(kl[kept].mean().item(), rel=1e-5)
    for token_loss in (AffineTokenLoss(kl_teacher_student=2.0), lambda tokens, index: 2 * tokens.kl_teacher_student):
        other, _, custom = make(token_loss=token_loss)
        doubled = custom(batch).loss
        assert doubled.item() == pytest.approx(2 * out.loss.item(), rel=1e-5)
    student.zero_grad()
    out.loss.backward()
    doubled.backward()
    for a, b in zip(gradients(other), gradients(student), strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-4, atol=1e-7)


def test_a_callable_token_loss_takes_the_importance_ratio_too():
    """As an affine one does: `importance_clip` with old log-probabilities was dropped without a word."""
    batch = tiny.batch()
    batch.old_logprobs = [[[-3.0 - 0.1 * i for i, _ in enumerate(c)] for c in group] for group in batch.completions]
    results = []
    for token_loss in (AffineTokenLoss(kl_teacher_student=2.0), lambda tokens, index: 2 * tokens.kl_teacher_student):
        student, _, distiller = make(token_loss=token_loss, importance_clip=0.9)
        out = distiller(batch)
        out.loss.backward()
        results.append((out.loss.detach(), gradients(student)))
    (affine, expected), (custom, found) = results
    plain = make(token_loss=AffineTokenLoss(kl_teacher_student=2.0))[2](batch).loss
    torch.testing.assert_close(custom, affine, rtol=1e-6, atol=0)
    assert abs(plain - affine) > 0.01 * affine
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_truncated_importance_sampling_as_in_the_paper():
    """One factor per completion: the mean over its tokens of min(exp(old - sampling), 2)."""
    batch = tiny.batch(((4, 3), (2,)))
    _, _, distiller = make(skip_first_tokens=0)
    plain = distiller(batch)
    old = [[[-2.0] * len(c) for c in group] for group in batch.completions]
    sampling = [[[-2.0 - 0.4 * i for i, _ in enumerate(c)] for c in group] for group in batch.completions]
    fields = (batch.student_prompts, batch.teacher_prompts, batch.completions)
    out = distiller(DistillBatch(*fields, old_logprobs=old, sampling_logprobs=sampling))
    factors = [sum(min(2.718281828 ** (0.4 * i), 2.0) for i in range(n)) / n for n in (4, 3, 2)]
    kl = plain.tokens.kl_teacher_student.split([4, 3, 2])
    expected = sum(f * k.mean() for f, k in zip(factors, kl, strict=True)) / 3
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    per_token = torch.repeat_interleave(torch.tensor(factors), torch.tensor([4, 3, 2]))
    ess = per_token.sum() ** 2 / (9 * (per_token**2).sum())
    assert out.metrics["effective_sample_size"].item() == pytest.approx(ess.item(), rel=1e-5)

    # On policy the current student is the old policy: a sampler that agrees with it changes nothing.
    pieces = [piece.tolist() for piece in plain.tokens.student_logprob.split([4, 3, 2])]
    agreeing = DistillBatch(*fields, sampling_logprobs=[[pieces[0], pieces[1]], [pieces[2]]])
    assert distiller(agreeing).loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)


def test_all_masked_sequences_count_and_an_all_masked_batch_is_zero():
    student, _, distiller = make(skip_first_tokens=3)
    two = DistillBatch([[1, 2], [3]], [[5, 1, 2], [6, 3]], [[[4, 5, 6, 7, 8]], [[7, 8]]])
    one = DistillBatch([[1, 2]], [[5, 1, 2]], [[[4, 5, 6, 7, 8]]])
    assert distiller(two).loss.item() == pytest.approx(distiller(one).loss.item() / 2, rel=1e-5)
    for completions in ([[[7, 8]]], [[[]]], [[]]):
        student.zero_grad()
        out = distiller(DistillBatch([[1]], [[2, 1]], completions))
        out.loss.backward()
        assert out.loss.item() == 0 and out.metrics["tokens"] == 0
        assert all((p.grad == 0).all() for p in student.parameters())


def test_accumulated_micro_batches_equal_one_batch():
    whole, _, distiller = make()
    batch = tiny.batch()
    distiller(batch).loss.backward()
    parts, _, accumulating = make()
    for i in range(3):
        micro = DistillBatch([batch.student_prompts[i]], [batch.teacher_prompts[i]], [batch.completions[i]])
        accumulating(micro, num_completions=len(batch)).loss.backward()
    assert_same_gradients(parts, whole, 1e-5)


def test_a_prompt_per_rollout():
    _, _, distiller = make()
    shared = tiny.batch(((5, 4),))
    prompt = shared.teacher_prompts[0]
    same = DistillBatch(shared.student_prompts, [[prompt, prompt]], shared.completions)
    other = DistillBatch(shared.student_prompts, [[prompt, [9, *prompt]]], shared.completions)
    base = distiller(shared).tokens.kl_teacher_student
    assert torch.equal(distiller(same).tokens.kl_teacher_student, base)
    changed = distiller(other).tokens.kl_teacher_student
    torch.testing.assert_close(changed[:5], base[:5])
    assert not torch.allclose(changed[5:], base[5:])


def test_no_logits_tensor_is_made(monkeypatch):
    """Neither model's head runs; the negative control runs it."""
    student, teacher, distiller = make()
    calls = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    distiller(tiny.batch()).loss.backward()
    assert not calls
    student(input_ids=torch.tensor([[1, 2]]))
    assert calls


def test_cross_entropy_runs_no_teacher():
    student, teacher, distiller = make(loss="ce")
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    batch = tiny.batch()
    out = distiller(DistillBatch(batch.student_prompts, None, batch.completions))
    assert not calls and "kl_teacher_student" not in out.metrics
    with pytest.raises(ValueError, match="loss='ce'"):
        make()[2](DistillBatch(batch.student_prompts, None, batch.completions))


def test_bad_options_and_lengths():
    student, teacher = tiny.model(), tiny.model()
    for options, match in (
        (dict(alpha=1.5), "alpha"),
        (dict(temperature=0), "temperature"),
        (dict(skip_first_tokens=-1), "skip_first_tokens"),
        (dict(importance_clip=-1.0), "importance_clip"),
        (dict(loss="mse"), "loss"),
        (dict(token_loss=AffineTokenLoss(jsd=1.0, alpha=0.5), loss="ce"), "exclude"),
        (dict(token_loss=AffineTokenLoss(kl_teacher_student=torch.ones(3))), "DistillBatch.weights"),
        (dict(teacher=tiny.model(vocab_size=31)), "share a vocabulary"),
    ):
        with pytest.raises(ValueError, match=match):
            SelfDistiller(student, **{"teacher": teacher, **options})
    with pytest.raises(TypeError, match="token_loss"):
        SelfDistiller(student, teacher, token_loss=3)
    distiller = SelfDistiller(student, tiny.model(max_position_embeddings=20))
    with pytest.raises(ValueError, match=r"example 1, completion 0: the student prompt has 95 tokens.*context of 96"):
        distiller(DistillBatch([[1], [2] * 95], [[1], [3]], [[[1]], [[1, 2]]]))
    with pytest.raises(ValueError, match=r"example 0, completion 0: the teacher prompt has 19 tokens.*context of 20"):
        distiller(DistillBatch([[1]], [[1] * 19], [[[1, 2]]]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    """In a process of its own: blocks freed between live ones, which glibc keeps."""
    program = """
import os, torch
from sdft_kernels.distill import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

warm = torch.ones(2**23 - 2**12)  # nearly 32 MiB: freed, it makes glibc keep blocks of that size
del warm
blocks = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
live = blocks[::2]
del blocks
before = resident()
memory.give_back_freed_memory(torch.device("cuda"))
unchanged = resident()
memory.give_back_freed_memory(torch.device("cpu"))
print(memory._malloc_trim() is not None, before - unchanged, before - resident())
assert all(bool((block == 1).all()) for block in live)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    available, kept, returned = done.stdout.split()
    if available == "False":
        pytest.skip("no glibc")
    assert int(kept) < 8 * 2**20 and int(returned) > 80 * 2**20


def test_every_training_forward_gives_freed_memory_back(monkeypatch):
    from sdft_kernels.distill import distiller as module

    devices = []
    monkeypatch.setattr(module, "give_back_freed_memory", devices.append)
    distill = SelfDistiller(tiny.model(), "frozen")
    distill(tiny.batch())
    with torch.no_grad():
        distill(tiny.batch())
    assert devices == [torch.device("cpu")]
