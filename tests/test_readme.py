"""The README against the code: families, arithmetic, names, links, and numbers from committed data."""

import ast
import csv
import json
import re
from pathlib import Path
from statistics import median

import pytest

import sdft_kernels

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_after(heading):
    """Cells of the first table after a heading, without its head."""
    lines = TEXT.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[0], table[2:]


def test_family_table_is_what_the_code_knows():
    pytest.importorskip("transformers")
    from sdft_kernels.models.head import HEAD_FAMILIES, REFUSED_FAMILIES

    _, rows = rows_after("### Model families")
    shown = {row[0]: (row[1], row[2], row[3]) for row in rows}
    expected = {
        name: (facts.get("scale", "–"), facts.get("softcap", "–"), facts.get("bias", "–"))
        for name, facts in HEAD_FAMILIES.items()
    }
    assert {k: v for k, v in shown.items() if "refused" not in v} == expected
    refused = " ".join(row[0] for row in rows if "refused" in row[1:])
    for name in REFUSED_FAMILIES:
        assert f"`{name}`" in refused


def test_saved_memory_table_is_arithmetic():
    head, rows = rows_after("### What it saves")
    tokens = [int(cell.removeprefix("N = ").replace(",", "")) for cell in head[1:]]
    assert len(rows) == 4
    for row in rows:
        vocabulary = int(row[0].split()[0].replace(",", ""))
        for n, cell in zip(tokens, row[1:], strict=True):
            exact = 5 * 4 * n * vocabulary / 2**30
            assert abs(float(cell.removesuffix(" GiB")) - exact) <= max(0.05, 0.01 * exact), (vocabulary, n)


def test_python_examples_parse_and_import_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "sdft_kernels":
                for name in node.names:
                    assert name.name in sdft_kernels.__all__, name.name


def test_relative_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_speed_table_is_the_committed_data():
    data = {}
    with (ROOT / "benchmarks" / "data" / "loss_cpu.csv").open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            config = json.loads(row["extra_benchmark_config_str"])
            key = (config["dtype"], int(row["x_value"]), config["V"], row["kernel_provider"])
            if row["metric_name"] == "ratio_to_gemm4":
                data[key] = (float(row["y_value_50"]), float(row["device_memory_peak"]))
    _, rows = rows_after("## Speed and memory")
    assert len(rows) >= 3
    for shape, variant, ratio, memory in rows:
        dtype, n, v = re.match(r"(\w+), N=([\d,]+) H=\d+ V=([\d,]+)", shape).groups()
        key = (dtype, int(n.replace(",", "")), int(v.replace(",", "")), variant.strip("`*"))
        measured_ratio, measured_memory = data[key]
        assert float(ratio.strip("*× ")) == pytest.approx(measured_ratio, abs=0.006), key
        assert float(memory.strip("* ").removesuffix(" MiB").removesuffix("MiB").replace(",", "")) == pytest.approx(
            measured_memory, abs=1
        )


def test_demo_table_is_the_median_of_the_committed_runs():
    folder = ROOT / "benchmarks" / "data"
    runs = [json.loads((folder / f"demo_seed{seed}.json").read_text(encoding="utf-8")) for seed in range(3)]
    assert [run["settings"].pop("seed") for run in runs] == [0, 1, 2]
    assert all(run["settings"] == runs[0]["settings"] for run in runs)
    head, rows = rows_after("## See it run")
    assert head[0] == f"held-out tasks, {runs[0]['heldout']['before']['tasks']}"
    for column, name in zip((1, 2, 3), ("before", "after", "teacher"), strict=True):
        sides = [run["heldout"][name] for run in runs]
        assert int(rows[0][column].split()[0]) == median(side["exact"] for side in sides)
        logprob = median(side["expert_logprob"] for side in sides)
        assert float(rows[1][column]) == pytest.approx(logprob, abs=0.0051)
    assert f"({', '.join(str(run['heldout']['after']['exact']) for run in runs)})" in rows[0][2]
    assert f"{runs[0]['seconds']['total']:.0f} s and {runs[0]['peak_memory_gib']:.1f} GiB peak" in TEXT
    assert runs[0]["seconds"]["total"] < 480  # the bar


def test_table_of_shared_prompts_is_the_committed_data():
    from benchmarks.step_table import DATA, markdown, read_table

    table = read_table(DATA)
    assert {prompt: sorted(row) for prompt, row in table.items()} == {p: [1, 2, 4, 8, 16] for p in (128, 512, 2048)}
    assert "\n".join(markdown(table)) in TEXT
    least = min(cell.measured / cell.predicted for p in (512, 2048) for n, cell in table[p].items() if n >= 4)
    assert f"at least {least:.0%} of the prediction".replace("%", " %") in TEXT
    assert least >= 0.85  # the bar


def test_attention_table_is_the_committed_data():
    found: dict[tuple[str, ...], float] = {}
    with (ROOT / "benchmarks" / "data" / "attention_cpu.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case = json.loads(row["extra_benchmark_config_str"])
            shape = f"{case['prompt']:,} tokens, {case['completions']} of {case['tokens']}"
            found[shape, case["impl"], row["kernel_provider"], row["metric_name"]] = float(row["y_value_50"])
    text = (ROOT / "sdft_kernels" / "prefix_attention" / "README.md").read_text(encoding="utf-8")
    for shape in {key[0] for key in found}:
        shown = [
            f"{found[shape, impl, 'shared', 'speed']:.0f} ms, {found[shape, impl, 'shared', 'speedup']:.1f}×"
            for impl in ("composition", "auto")
        ]
        whole, pairs = found[shape, "auto", "repeated", "speed"], found[shape, "auto", "shared", "predicted_speedup"]
        assert f"| {shape} | {whole:,.0f} ms | {shown[0]} | {shown[1]} | {pairs:.1f}× |" in text


def test_step_beside_trl_is_the_committed_data():
    with (ROOT / "benchmarks" / "data" / "step_trl.csv").open(newline="", encoding="utf-8") as file:
        data = {(row["trainer"], row["activation_checkpointing"]): row for row in csv.DictReader(file)}
    _, rows = rows_after("### A whole step")
    shown = {}
    for name, checkpointing, seconds, memory in rows:
        trainer = {"TRL": "trl", "this": "sdft"}[name.split()[0].strip("*")]
        row = data[trainer, checkpointing]
        shown[trainer, checkpointing] = row
        ratio = 1 / float(row["step_over_trl"])
        assert seconds == f"{float(row['step_s']):.1f} s" + (f", {ratio:.1f}×" if row["step_over_trl"] != "1.0" else "")
        share = f" ({float(row['peak_over_trl']):.2f})" if row["peak_over_trl"] != "1.0" else ""
        assert memory == f"{int(row['peak_mib']):,} MiB{share}"
        assert float(row["loss_difference"]) <= 1e-4  # the bar
    assert shown == data
