"""Metrics over batches and processes are those of all their tokens together, from one reduction."""

import math

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import DistillBatch, SDFTConfig, SDFTTrainer, SelfDistiller  # noqa: E402
from sdft_kernels.distill.histogram import BINS, OCTAVES, RESOLUTION, histogram, quantiles  # noqa: E402
from sdft_kernels.distill.running import NAMES, RunningMetrics, merged  # noqa: E402

SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


class Accelerator:
    """Gathers what `others` handed over, and counts the reductions."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others, self.calls = others, 0

    def gather(self, tensor):
        self.calls += 1
        return torch.cat([tensor, *(other._vector(self.device)[None] for other in self.others)])


def ranked(values):
    ordered = sorted(values.tolist())
    return [ordered[round(share * (len(ordered) - 1))] for share in SHARES]


@pytest.mark.parametrize("parts", [1, 2, 7, 1000])
def test_quantiles_do_not_depend_on_the_parts(parts):
    values = torch.distributions.LogNormal(-3.0, 3.0).sample((1000,))
    mask = torch.rand(1000) < 0.7
    counts = sum(map(histogram, values.chunk(parts), mask.chunk(parts)))
    assert counts.sum() == mask.sum() and torch.equal(counts, histogram(values, mask))
    assert 0.005 < RESOLUTION < 0.006
    for got, exact in zip(quantiles(counts, SHARES), ranked(values[mask]), strict=True):
        assert got == pytest.approx(exact, rel=RESOLUTION * 1.001)


def test_quantiles_at_the_ends_of_the_bins():
    lowest, highest = 2.0**OCTAVES.start, 2.0**OCTAVES.stop
    values = torch.tensor([-1e-9, 0.0, 0.5 * lowest, lowest, 0.9999 * highest, highest, math.inf, math.nan])
    counts = histogram(values, torch.ones(8, dtype=torch.bool))
    assert counts.nonzero().flatten().tolist() == [0, 1, BINS - 3, BINS - 2, BINS - 1]
    assert counts[[0, 1, BINS - 3, BINS - 2, BINS - 1]].tolist() == [3, 1, 1, 2, 1]
    zero, first, last, above, nan = quantiles(counts, [i / 7 for i in (0, 3, 4, 5, 7)])
    assert zero == 0 and above == math.inf and math.isnan(nan)
    assert first == pytest.approx(lowest, rel=0.006) and last == pytest.approx(highest, rel=0.006)
    masked = histogram(values, torch.zeros(8, dtype=torch.bool))
    assert not masked.any()


def outputs(*batches, **options):
    distiller = SelfDistiller(tiny.model(), "live", skip_first_tokens=3, **options)
    return [(distiller(batch), batch) for batch in batches]


def running(*pairs):
    metrics = RunningMetrics()
    for output, batch in pairs:
        metrics.add(output, batch, 6)
    return metrics


def weighted(batch, *without):
    """The batch with sampling log-probabilities, but for the examples in `without`."""
    logprobs = [[[-2.0 - 0.3 * i] * len(c) for i, c in enumerate(group)] for group in batch.completions]
    for i in without:
        logprobs[i] = None
    return DistillBatch(batch.student_prompts, batch.teacher_prompts, batch.completions, sampling_logprobs=logprobs)


def joined(a, b):
    parts = {name: [*getattr(a, name), *getattr(b, name)] for name in ("student_prompts", "completions")}
    teacher = [*a.teacher_prompts, *b.teacher_prompts]
    logprobs = None
    if a.sampling_logprobs or b.sampling_logprobs:
        logprobs = [*(a.sampling_logprobs or [None] * len(a.completions)),
                    *(b.sampling_logprobs or [None] * len(b.completions))]  # fmt: skip
    return DistillBatch(teacher_prompts=teacher, sampling_logprobs=logprobs, **parts)


FULL, NOTHING = tiny.batch(((5, 2), (7,), (0, 9))), tiny.batch(((3, 2), (1,), (0,)))
PARTS = {
    "a process without a token": (FULL, NOTHING),
    "a process without a completion": (FULL, tiny.batch(((), ()))),
    "weights in both": (weighted(FULL), weighted(tiny.batch(((6,), (12, 4))))),
    "weights in one": (weighted(FULL), tiny.batch(((6,), (12, 4)))),
    "weights in one, which has no token": (weighted(NOTHING), FULL),
    "weights of some examples": (weighted(FULL, 1), NOTHING),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_batches_and_processes_give_the_numbers_of_one_batch(name, loss):
    first, second = PARTS[name]
    a, b = outputs(first, second, loss=loss, share_prefix=False)
    [whole] = outputs(joined(first, second), loss=loss, share_prefix=False)
    accelerator = Accelerator()
    together = running(whole).pop(accelerator)
    in_turn = running(a, b).pop(accelerator)
    processes = running(b).pop(joint := Accelerator(running(a)))
    assert accelerator.calls == 2 and joint.calls == 1
    assert together.keys() == in_turn.keys() == processes.keys()
    for key, value in together.items():
        expected = pytest.approx(value, rel=1e-5)
        assert in_turn[key] == expected and processes[key] == expected, key
    exact = whole[0].metrics
    for key, value in exact.items():
        if "_q" in key:
            assert together[key] == pytest.approx(value.item(), rel=RESOLUTION * 1.001)
        elif key != "tokens":
            assert together[key] == pytest.approx(value.item(), rel=1e-5), key
    assert ("effective_sample_size" in together) == ("weights" in name)


def test_what_only_one_process_has_is_kept():
    """A prefix cache, a prediction of the speed-up and a longest completion on one process."""
    [(output, batch), other] = outputs(FULL, NOTHING)
    extra = dict(prefix_cache_mib=torch.tensor(3.0), prefix_cache_hits=torch.tensor(2.0))
    cached = output._replace(metrics=output.metrics | extra)
    del other[0].metrics["predicted_speedup"]
    result = running(other).pop(Accelerator(running((cached, batch), (cached, batch))))
    assert result["prefix_cache_hits"] == 4 and result["prefix_cache_mib"] == 3
    assert result["predicted_speedup"] == pytest.approx(output.metrics["predicted_speedup"].item())
    assert result["completions/max_length"] == 9 and result["completions/mean_length"] == pytest.approx(52 / 14)


def test_nothing_to_report():
    assert RunningMetrics().pop(Accelerator()) == {}
    [pair] = outputs(NOTHING)
    metrics = running(pair)
    result = metrics.pop(Accelerator())
    assert result["num_loss_tokens"] == 0 and result["completions/skipped_ratio"] == 1
    assert not any("kl" in name or "logprob" in name for name in result)  # no mean over nothing
    assert metrics.pop(Accelerator()) == {}  # starts anew
    with pytest.raises(KeyError, match="'loss/odd' has no place in running.NAMES"):
        metrics.accumulate("loss/odd", torch.tensor(1.0), 1)


def test_every_metric_of_a_batch_has_a_place():
    model = tiny.model()
    distiller = SelfDistiller(model, tiny.model(seed=1).requires_grad_(False), skip_first_tokens=0, importance_clip=2.0)
    reduced = merged(running((distiller(weighted(FULL)), FULL))._vector(torch.device("cpu"))[None])
    assert distiller(weighted(FULL)).metrics.keys() - {"tokens"} <= reduced.keys()
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("skip", "short"), [(0, None), (1, None), (2, 1), (3, 3), (9, 5)])
def test_completions_too_short_for_the_loss_are_named_once(skip, short, caplog):
    distiller = SelfDistiller(tiny.model(), "live", skip_first_tokens=skip)
    batch = tiny.batch(((3, 2), (5,), (0, 9), (3,)))  # the empty one has no token to leave out
    with caplog.at_level("WARNING", logger="sdft_kernels"):
        distiller(batch)
        distiller(batch)
    said = [record.getMessage() for record in caplog.records if "no token in the loss" in record.getMessage()]
    expected = f"{short} of the 6 completions of a batch have no token in the loss: skip_first_tokens={skip} "
    assert (len(said) == 1 and said[0].startswith(expected)) if short else not said


def test_a_dataset_of_short_answers_is_not_trained_in_silence(tmp_path, caplog):
    """Demonstrations of three tokens, and the default that skips three."""
    rows = [{"prompt": "who sat", "privileged_context": "the cat"}] * 2
    options = dict(output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", max_steps=1)
    config = SDFTConfig(rollouts="dataset", disable_tqdm=True, per_device_train_batch_size=2, **options)
    trainer = SDFTTrainer(tiny.model(), config, rows, processing_class=tiny.tokenizer())
    with caplog.at_level("WARNING", logger="sdft_kernels"):
        trainer.train()
    assert "2 of the 2 completions of a batch have no token in the loss" in caplog.text
    assert "num_loss_tokens_to_skip" in caplog.text
    assert trainer.state.log_history[0]["completions/skipped_ratio"] == 1
