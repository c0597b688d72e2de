"""Random calls and runs beside an independent dense computation in fp64. A failure names its seed, which reproduces it.

`SDFT_KERNELS_FUZZ=START:STOP` runs other seeds than these few: see CONTRIBUTING.md.
"""

import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import fuzz_cases  # noqa: E402
import fuzz_ops  # noqa: E402
import fuzz_run  # noqa: E402

from sdft_kernels.distill import SelfDistiller  # noqa: E402
from sdft_kernels.distill.teacher import EMATeacher  # noqa: E402

CALLS, RUNS, PER_TEST = 400, 60, 20


def seeds(count):
    """Groups of seeds, each a test."""
    start, stop = (int(n) for n in os.environ.get("SDFT_KERNELS_FUZZ", f"0:{count}").split(":"))
    return [range(first, min(first + PER_TEST, stop)) for first in range(start, stop, PER_TEST)]


def name_of(group):
    return f"seeds {group.start} to {group.stop - 1}"


def check_each(group, of):
    for seed in group:
        case = of.draw(seed)
        try:
            of.check(case)
        except Exception as error:  # whatever it is, with the seed
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}; {case}") from error


@pytest.mark.parametrize("group", seeds(CALLS), ids=name_of)
def test_calls(group):
    check_each(group, fuzz_ops)


@pytest.mark.parametrize("group", seeds(RUNS), ids=name_of)
def test_runs(group):
    check_each(group, fuzz_run)


def scaled_weights(monkeypatch):
    real = SelfDistiller._token_weights

    def weights(self, *args):
        weight, ratio = real(self, *args)
        return weight * 1.01, ratio

    monkeypatch.setattr(SelfDistiller, "_token_weights", weights)


def one_token_more(monkeypatch):
    real = SelfDistiller._mask

    def mask(self, *args):
        self.skip_first_tokens += 1
        try:
            return real(self, *args)
        finally:
            self.skip_first_tokens -= 1

    monkeypatch.setattr(SelfDistiller, "_mask", mask)


def another_temperature(monkeypatch):
    real = SelfDistiller.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        self.op_options["temperature"] *= 1.01

    monkeypatch.setattr(SelfDistiller, "__init__", init)


def a_still_average(monkeypatch):
    monkeypatch.setattr(EMATeacher, "update", lambda self: None)


# Seeds whose cases any checkout can run; which of them shows a fault depends on what the fault touches.
PLANTED = {
    "scaled weights": (scaled_weights, lambda case: case.options["loss"] == "kl" and case.dtype == "fp32"),
    "one token more": (one_token_more, lambda case: case.completions == "given" and case.teacher == "live"),
    "another temperature": (another_temperature, lambda case: case.dtype == "fp32"),
    "a still average": (a_still_average, lambda case: case.teacher == "ema" and case.options["loss"] == "kl"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, monkeypatch):
    """Control: of the first ten cases that it may touch, one says so."""
    plant, touches = PLANTED[fault]
    cases = [case for case in map(fuzz_cases.draw, range(200)) if touches(case)][:10]
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"is \S+ times its budget; Case\(seed="):
        for case in cases:
            fuzz_run.check(case)


@pytest.mark.parametrize(
    "op", ["linear_divergence", "linear_divergence_loss", "linear_topk_divergence", "linear_token_logprob"]
)
def test_a_planted_fault_in_an_op_is_found(op, monkeypatch):
    real = getattr(fuzz_ops, op)
    monkeypatch.setattr(fuzz_ops, op, lambda *a, temperature, **k: real(*a, temperature=temperature * 1.01, **k))
    with pytest.raises(AssertionError, match=r"is \S+ times its budget; OpCase\(seed="):
        for seed in range(60):
            fuzz_ops.check(fuzz_ops.draw(seed))
