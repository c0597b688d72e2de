"""`bench attention` and `bench step`: variants compute the same, predictions are counts, files are right."""

import csv
import dataclasses
import json
import math

import pytest
import torch

from sdft_kernels.cli import __main__ as cli
from sdft_kernels.cli._bench import attention, prefix_case, prefix_report, prefix_worker, protocol
from sdft_kernels.cli._bench.prefix_case import AttentionCase, PrefixRequest, StepCase, parse_counts

COMMON = dict(
    prompt=30, completions=3, tokens=7, dtype="fp32", device="cpu", variants=("shared",), repeats=2, threads=1, seed=0
)


def attention_case(**changes):
    return AttentionCase(**(COMMON | dict(heads=4, key_heads=2, head_size=16) | changes))


def step_case(**changes):
    pytest.importorskip("transformers")
    fields = COMMON | dict(variants=("packed", "packed_cached"), model="tiny", teacher_prompt=35)
    return StepCase(**(fields | changes))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["repeated", "shared"])
def test_attention_variants_agree_with_fp64(variant, dtype):
    errors = prefix_worker.check(PrefixRequest(attention_case(dtype=dtype), variant))
    assert set(errors) == {"output_error", "query_gradient_error", "key_gradient_error", "value_gradient_error"}
    assert max(errors.values()) < (1e-5 if dtype == "fp32" else 0.02)


@pytest.mark.parametrize("variant", ["repeated", "packed", "packed_cached"])
def test_step_variants_agree_with_fp64(variant):
    errors = prefix_worker.check(PrefixRequest(step_case(prompts=2), variant))
    assert set(errors) == {"loss_error", "gradient_error"} and max(errors.values()) < 1e-4


def test_a_wrong_variant_is_not_timed(monkeypatch):
    real = attention.AttentionWorkload.output
    monkeypatch.setattr(attention.AttentionWorkload, "output", lambda self: real(self) * (1.01 if self.packed else 1.0))
    with pytest.raises(ValueError, match="not timed: its output is off fp64 by 0.01 relative"):
        prefix_worker.check(PrefixRequest(attention_case(), "shared"))
    nan = lambda self: real(self) * (math.nan if self.packed else 1.0)  # noqa: E731
    monkeypatch.setattr(attention.AttentionWorkload, "output", nan)
    with pytest.raises(ValueError, match="not timed"):
        prefix_worker.check(PrefixRequest(attention_case(), "shared"))


def test_attention_prediction_is_the_ratio_of_the_masks():
    case = attention_case()
    causal = lambda n: int(torch.ones(n, n).tril().sum())  # noqa: E731
    repeated = 3 * causal(37)
    shared = causal(30) + 3 * (causal(37) - causal(30))
    mine, floor = (attention.build(case, name).predictions() for name in ("shared", "repeated"))
    assert mine["predicted_speedup"] == repeated / shared and floor["predicted_speedup"] == 1.0
    assert floor["predicted_attention_gflop"] == pytest.approx(3.5e-9 * 4 * 4 * 16 * repeated)


def test_step_predictions_and_the_cache():
    from sdft_kernels.cli._bench.step import build
    from sdft_kernels.models import step_flops

    case = step_case(prompts=2)
    plain, packed, cached = (build(case, name) for name in ("repeated", "packed", "packed_cached"))
    groups, teacher = [(30, [7] * 3)] * 2, [(35, [7] * 3)] * 2
    flops = step_flops(packed.model.config, groups, teacher_groups=teacher)
    assert packed.predictions()["predicted_speedup"] == flops.ratio > 1.0
    assert plain.predictions()["predicted_speedup"] == 1.0
    assert plain.predictions()["predicted_tokens"] == flops.repeated.tokens
    assert cached.predictions()["predicted_speedup"] > flops.ratio
    for hits in (0, 2):
        cached.run()
        assert cached.cache.statistics.hits == hits and cached.cache.statistics.misses == 2


def test_tokens_that_run_are_those_predicted():
    from sdft_kernels.cli._bench.step import build

    case = step_case(prompts=2)
    for name, warm_up in (("repeated", 0), ("packed", 0), ("packed_cached", 1)):
        workload, seen = build(case, name), []
        for _ in range(warm_up):
            workload.run()
        handle = workload.model.model.layers[0].register_forward_pre_hook(lambda m, args, s=seen: s.append(args[0]))
        workload.run()
        handle.remove()
        assert sum(x.shape[0] * x.shape[1] for x in seen) == workload.predictions()["predicted_tokens"], name


def test_micro_batches_keep_to_the_budget_and_change_nothing():
    from sdft_kernels.cli._bench.step import build

    for name, count in (("repeated", 6), ("packed", 2)):
        one, many = build(step_case(prompts=2), name), build(step_case(prompts=2, token_budget=50), name)
        assert (len(list(one._micro_batches())), len(list(many._micro_batches()))) == (1, count)
        whole, parts = one.results(), many.results()
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-7)


def test_a_run_from_command_to_file(tmp_path, capsys):
    out = tmp_path / "attention.csv"
    sizes = ["--shape", "24,3,5", "--heads", "4,2", "--head-size", "16"]
    assert cli.main(["bench", "attention", *sizes, "--repeats", "1", "--threads", "1", "--output", str(out)]) == 0
    table = capsys.readouterr().out
    assert "P=24 R=3 L=5 fp32, 4/2 heads of 16" in table and "flash_attn" in table and "skipped: needs CUDA" in table
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == prefix_report.PREFIX_COLUMNS
    assert {row["kernel_provider"] for row in rows} == {"repeated", "shared"}
    ours = {row["metric_name"]: row for row in rows if row["kernel_provider"] == "shared"}
    assert {"speed", "speedup", "predicted_speedup", "memory", "output_error"} <= set(ours)
    speedup, predicted = (float(ours[name]["y_value_50"]) for name in ("speedup", "predicted_speedup"))
    assert speedup * float(ours["speed"]["ratio_to_repeated"]) == pytest.approx(1, rel=1e-3)
    assert predicted == pytest.approx(3 * (29 * 30 / 2) / (24 * 25 / 2 + 3 * (29 * 30 - 24 * 25) / 2), rel=1e-4)
    config = json.loads(ours["speed"]["extra_benchmark_config_str"])
    assert (config["completions"], config["tokens"], config["key_heads"]) == (3, 5, 2)


def test_a_model_that_is_none_is_said(capsys):
    pytest.importorskip("transformers")
    assert cli.main(["bench", "step", "--model", "nowhere", "--shape", "8,2,2", "--threads", "1"]) == 1
    error = capsys.readouterr().err
    assert "the floor repeated failed: ValueError: --model must be a folder or one of tiny, smollm2-135m" in error


def test_step_table_has_the_parts(monkeypatch, capsys):
    pytest.importorskip("transformers")
    parts = dict(predicted_body_gflop=2.0, predicted_attention_gflop=1.0, predicted_head_gflop=0.5)

    def measure(case, progress):
        floor, packed = case.requests()
        return [
            protocol.Result(floor, [2.0], [2.0], predictions=parts | {"predicted_speedup": 1.0}, device_name="a CPU"),
            protocol.Result(packed, [1.0], [2.0], predictions=parts | {"predicted_speedup": 2.5}),
        ]

    monkeypatch.setattr(protocol, "measure_case", measure)
    assert cli.main(["bench", "step", "--model", "tiny", "--shape", "541,8,64", "--variants", "packed"]) == 0
    out = capsys.readouterr().out
    assert "tiny, 1 x (P=541 R=8 L=64 fp32), teacher prompt 598, a CPU, 5 pairs" in out
    assert "body GFLOP  attention GFLOP  head GFLOP" in out
    packed = next(line.split() for line in out.splitlines() if line.startswith("packed"))
    assert packed[:6] == ["packed", "1000", "2.00", "2.00-2.00", "2.50", "2"]


@pytest.mark.parametrize(("failing", "status"), [("flash_attn", 0), ("shared", 1)])
def test_only_failures_of_ours_are_status_1(failing, status, monkeypatch, capsys):
    def measure(case, progress):
        floor, other = case.requests()
        return [protocol.Result(floor, [1.0], [1.0]), protocol.Result(other, failed=True, note="it broke")]

    monkeypatch.setattr(protocol, "measure_case", measure)
    assert cli.main(["bench", "attention", "--shape", "8,2,2", "--variants", failing]) == status
    assert "FAILED: it broke" in capsys.readouterr().out


def test_requests_survive_json_and_steps_add_up():
    for case in (attention_case(), step_case()):
        for request in case.requests():
            assert PrefixRequest.from_json(request.to_json()) == request
        assert case.requests()[0].variant == prefix_case.FLOOR
        assert case.steps == 2 + len(case.variants) * (case.repeats + 2)
        small = dataclasses.replace(case, prompt=500, tokens=100, completions=8).small()
        assert (small.prompt, small.tokens, small.completions) == (40, 9, 3)
    absent = PrefixRequest(attention_case(), "flash_attn")
    assert absent.why_absent() == "needs CUDA" and PrefixRequest(attention_case(), "shared").why_absent() is None


@pytest.mark.parametrize("text", ["1,2", "1,2,3,4", "1,0,3", "1,a,3", "", "1,-2,3"])
def test_malformed_counts_are_named(text):
    with pytest.raises(ValueError, match=r"expected P,R,L, positive integers, got"):
        parse_counts("P,R,L")(text)
