"""`bench loss`: all variants compute the same, a wrong one is not timed, memory is measured, files are right."""

import csv
import importlib.util
import json
import math
import textwrap

import pytest
import torch

from sdft_kernels.cli import __main__ as cli
from sdft_kernels.cli._bench import protocol, report, worker
from sdft_kernels.cli._bench.case import (
    MIB,
    VARIANT_NEEDS,
    Case,
    Request,
    design_suite,
    parse_bytes,
    parse_shape,
    parse_variant,
)
from sdft_kernels.cli._bench.inputs import forward_kl_truth, make_loss_inputs
from sdft_kernels.cli._bench.protocol import Result, measure_peak
from sdft_kernels.cli._bench.variants import VARIANTS, Variant, make_plain

SHAPE = (48, 24, 512)

# Someone's own losses: one that needs 63 MiB more at the size of the memory test, one that raises, one whose process
# dies.
OWN_LOSSES = textwrap.dedent(
    """
    import os
    import torch
    from sdft_kernels.cli._bench.variants import make_plain

    def hungry(inputs):
        plain = make_plain(inputs)
        def run():
            extra = torch.ones(21 * inputs.student_input.shape[0] * inputs.student_weight.shape[0])
            return plain() + 0 * extra[0]
        return run

    def raises(inputs):
        raise RuntimeError("no such kernel")

    def dies(inputs):
        os._exit(7)
    """
)


@pytest.fixture(scope="module")
def own_losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_losses.py").write_text(OWN_LOSSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


def case(**changes):
    fields = dict(
        shape=SHAPE, dtype="fp32", device="cpu", variants=("sdft",), memory_budgets=(None,), repeats=2, threads=1,
        seed=0, impl="auto", gate_tolerance=1e-3,
    )  # fmt: skip
    return Case(**(fields | changes))


def test_names_and_needs_agree():
    assert list(VARIANTS) == list(VARIANT_NEEDS)


@pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental")
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.is_loss])
def test_every_variant_is_the_forward_kl_and_its_gradient(name):
    module, needs_cuda = VARIANT_NEEDS[name]
    if module is not None:
        pytest.importorskip(module)
    if needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device = "cuda" if needs_cuda else "cpu"
    errors = worker.check(VARIANTS[name], make_loss_inputs(SHAPE, "fp32", device, seed=0), tolerance=1e-5)
    assert errors["input_gradient_error"] < 1e-4 and errors["weight_gradient_error"] < 1e-4


def test_truth_is_autograd_in_fp64():
    inputs = make_loss_inputs((5, 8, 9000), "fp32", "cpu", seed=0)
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.student_input, inputs.student_weight))
    student = (hidden @ weight.T).log_softmax(-1)
    teacher = (inputs.teacher_input.double() @ inputs.teacher_weight.double().T).log_softmax(-1)
    loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
    loss.backward()
    truth = forward_kl_truth(inputs)
    assert truth.loss == pytest.approx(loss.item(), rel=1e-12)
    inputs.student_input.grad, inputs.student_weight.grad = hidden.grad.float(), weight.grad.float()
    assert max(truth.relative_errors(inputs)) < 1e-7
    inputs.student_weight.grad[8500:] *= 1.1
    assert truth.relative_errors(inputs)[1] > 1e-3


def test_inputs_are_where_sdft_lives():
    inputs = make_loss_inputs((64, 64, 8192), "fp32", "cpu", seed=0)
    assert 0.03 < forward_kl_truth(inputs).loss < 0.08
    again = make_loss_inputs((64, 64, 8192), "fp32", "cpu", seed=0)
    assert torch.equal(inputs.teacher_weight, again.teacher_weight)


def test_floor_is_four_products():
    inputs = make_loss_inputs((300, 16, 64), "fp32", "cpu", seed=0)
    counted = []
    real = {name: getattr(torch, name) for name in ("mm", "addmm")}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in real.items():
            patch.setattr(torch, name, lambda *a, f=function, **k: (counted.append(f.__name__), f(*a, **k))[1])
        VARIANTS["gemm4"].make(inputs)()
    chunks = 2
    assert sorted(counted) == sorted(chunks * ["mm", "mm", "mm", "addmm"])


def test_the_gate_refuses_a_missing_gradient_a_nan_and_a_wrong_loss():
    inputs = make_loss_inputs(SHAPE, "fp32", "cpu", seed=0)
    no_gradient = Variant(lambda x: lambda: torch.tensor(forward_kl_truth(x).loss))
    with pytest.raises(ValueError, match="no gradient"):
        worker.check(no_gradient, inputs, 1e-3)
    nan = Variant(lambda x: lambda: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="not timed"):
        worker.check(nan, inputs, 1e-3)
    off = Variant(lambda x: lambda: make_plain(x)() * 1.01)
    with pytest.raises(ValueError, match="not timed: its loss .* is off the fp64 loss .* by 0.01 relative"):
        worker.check(off, inputs, 1e-3)
    worker.check(off, inputs, 0.02)


def test_a_run_from_command_to_files(own_losses, tmp_path, capsys):
    """Variants that are wrong, raise or die are reported and the others timed; one of ours that fails: status 1."""
    out, png = tmp_path / "loss.csv", tmp_path / "loss.png"
    peers = ["own_losses:raises", "own_losses:dies"]
    plot = ["--plot", str(png)] if importlib.util.find_spec("matplotlib") else []
    status = cli.main(
        ["bench", "loss", "--shape", "48,24,512", "--variants", "sdft", *peers, "--repeats", "2"]
        + ["--threads", "1", "--memory-budget", "32MiB", "1KiB", "--output", str(out), *plot]
    )
    table = capsys.readouterr().out
    assert status == 1
    assert "FAILED: ValueError: memory_budget=1024 bytes" in table
    assert "FAILED: RuntimeError: no such kernel" in table
    assert "FAILED: its process ended with status 7" in table
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    assert {row["kernel_provider"] for row in rows} == {"gemm4", "sdft@32MiB"}
    ours = {row["metric_name"]: row for row in rows if row["kernel_provider"] == "sdft@32MiB"}
    assert {"speed", "ratio_to_gemm4", "memory", "loss_error", "weight_gradient_error"} <= set(ours)
    for row in ours.values():
        assert all(math.isfinite(float(row[f"y_value_{q}"])) for q in (20, 50, 80))
        assert 0 < float(row["ratio_to_gemm4"]) < math.inf and row["x_value"] == "48"
        assert json.loads(row["extra_benchmark_config_str"])["memory_budget"] == 32 * MIB
    assert not plot or png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name] + [png.name] * bool(plot))


def test_several_budgets_are_drawn_as_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    case = Case((48, 24, 512), "fp32", "cpu", ("sdft", "plain"), (32 * MIB, 64 * MIB, 128 * MIB), 1, 1, 0, "auto")
    results = [
        protocol.Result(request, seconds=[1.0], floor_seconds=[1.0], peak_bytes=MIB, device_name="a CPU")
        for request in case.requests()
    ]
    drawn = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "savefig", lambda self, path, **_: drawn.append(self))
        report.plot(tmp_path / "curve.png", [(case, results)])
    time_axis, memory_axis = drawn[0].axes
    (curve,) = (line for line in time_axis.get_lines() if line.get_label() == "sdft")
    assert list(curve.get_xdata()) == [32, 64, 128] and time_axis.get_xscale() == "log"
    assert sorted(line.get_label() for line in time_axis.get_lines()) == ["gemm4", "plain", "sdft"]


@pytest.mark.parametrize(("failing", "status"), [("own_losses:raises", 0), ("trl_kernel", 0), ("sdft_tokens", 1)])
def test_only_failures_of_ours_are_status_1(failing, status, monkeypatch, capsys):
    def measure(case, progress):
        floor = Result(Request(case, "gemm4"), seconds=[1.0], floor_seconds=[1.0])
        return [floor, Result(Request(case, failing), failed=True, note="it broke")]

    monkeypatch.setattr(protocol, "measure_case", measure)
    assert cli.main(["bench", "loss", "--shape", "8,8,64", "--variants", failing]) == status
    assert "FAILED: it broke" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_floor_there_is_no_result(tmp_path, capsys):
    out = tmp_path / "loss.csv"
    assert cli.main(["bench", "loss", "--shape", "8,8,64", "--device", "cuda", "--output", str(out)]) == 1
    assert "the floor gemm4 failed: RuntimeError: PyTorch sees no GPU" in capsys.readouterr().err
    assert not out.exists()


def test_peak_memory_beyond_inputs_and_gradients(own_losses):
    """63 MiB more are seen as 63 MiB more, whatever libraries, inputs and gradients take."""
    shape = (48, 24, 16384)
    plain = measure_peak(Request(case(shape=shape), "plain"))
    hungry = measure_peak(Request(case(shape=shape), "own_losses:hungry"))
    assert abs(hungry - plain - 63 * MIB) < 8 * MIB
    # Two logit tensors, their log-softmaxes and a few temporaries of 3 MiB each.
    assert 6 * MIB < plain < 40 * MIB


def test_absent_peers_are_said_and_skipped(monkeypatch):
    request = Request(case(), "trl_kernel")
    assert request.why_absent() is None or "not installed" in request.why_absent()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert request.why_absent() == "trl is not installed"
    assert Request(case(), "liger_triton").why_absent() == "needs CUDA"
    assert Request(case(), "sdft").why_absent() is None


def test_ratios_are_medians_of_pairs():
    result = Result(Request(case(), "sdft", 250 * MIB), seconds=[2.0, 3.0, 8.0], floor_seconds=[1.0, 3.0, 2.0])
    assert result.ratios == [2.0, 1.0, 4.0] and result.median_ratio == 2.0
    rows = {row["metric_name"]: row for row in report.csv_rows([result])}
    assert rows["speed"]["y_value_50"] == "3000" and rows["ratio_to_gemm4"]["y_value_50"] == "2"
    assert report.quantile([1.0, 2.0, 3.0], 0.2) == pytest.approx(1.4)
    assert "memory" not in rows


def test_case_expands_budgets_for_ours_only_and_survives_json():
    two = case(variants=("plain", "sdft"), memory_budgets=(64 * MIB, 250 * MIB))
    assert [request.label for request in two.requests()] == ["gemm4", "plain", "sdft@64MiB", "sdft@250MiB"]
    assert two.steps == 2 + 3 * (two.repeats + 2)
    request = two.requests()[-1]
    assert Request.from_json(request.to_json()) == request


def test_gate_is_wider_for_bf16_peers_only():
    tolerances = {(name, dtype): Request(case(dtype=dtype, gate_tolerance=None), name).gate_tolerance
                  for name in ("plain", "sdft") for dtype in ("fp32", "bf16")}  # fmt: skip
    assert tolerances == {
        ("plain", "fp32"): 1e-3,
        ("plain", "bf16"): 0.05,
        ("sdft", "fp32"): 1e-3,
        ("sdft", "bf16"): 1e-3,
    }
    assert Request(case(gate_tolerance=0.2), "sdft").gate_tolerance == 0.2


def test_design_suite_has_the_rows_of_the_bars():
    suite = design_suite("cpu", 2, 0, "auto", None)
    small, large = (1024, 576, 49152), (512, 640, 262144)
    bars = {
        (small, "fp32", "sdft_torch", 250), (small, "fp32", "sdft", 128), (small, "fp32", "sdft", 64),
        (large, "fp32", "sdft_torch", 512), (large, "fp32", "sdft", 256), (large, "fp32", "sdft", 128),
        (small, "bf16", "sdft", 128),
    }  # fmt: skip
    requests = [r for c in suite for r in c.requests()]
    assert bars <= {(r.case.shape, r.case.dtype, r.variant, (r.memory_budget or 0) // MIB) for r in requests}
    assert all(set(c.variants) <= set(VARIANT_NEEDS) for c in suite)


@pytest.mark.parametrize(
    ("text", "size"), [("250MiB", 250 * MIB), ("1.5 GiB", 1536 * MIB), ("64MB", 64_000_000), ("4096", 4096)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bytes, "-1MiB"),
        (parse_bytes, "0"),
        (parse_bytes, "1TiB"),
        (parse_bytes, "infMiB"),
        (parse_bytes, ""),
        (parse_shape, "1,2,3,4"),
        (parse_shape, "1,a,3"),
        (parse_variant, "sdf"),
        (parse_variant, "module:"),
    ],
)
def test_malformed_values_are_named(parse, text):
    with pytest.raises(ValueError, match=r"got|unknown variant"):
        parse(text)
