"""``sdft-kernels train``: a whole run, a kill and --resume, and what bad input gets."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402
from processes import HANG_SECONDS  # noqa: E402

from sdft_kernels.cli.__main__ import main  # noqa: E402
from sdft_kernels.distill.trainer import last_complete_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(12)))
    return folder


def arguments(files, output, *extra):
    return [
        "train", "--model", str(files / "model"), "--data", str(files / "data.jsonl"), "--output", str(output),
        "--cpu", "--batch-size", "2", "--max-completion-length", "6", "--skip-first-tokens", "0",
        "--learning-rate", "1e-2", "--save-steps", "2", *extra,
    ]  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


# Run in the child in place of `python -m sdft_kernels`: SIGKILL from within, behind the first checkpoint, whatever the
# machine does beside it.
KILLED_IN_STEP_4 = """
import os, signal, sys
from sdft_kernels.cli.__main__ import main
from sdft_kernels.distill.trainer import SDFTTrainer

step = SDFTTrainer.training_step
def killed(trainer, *arguments, **options):
    result = step(trainer, *arguments, **options)
    if trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
SDFTTrainer.training_step = killed
main(sys.argv[1:])
"""


def test_kill_and_resume_give_the_same_numbers(files, tmp_path):
    """A child is killed behind a whole checkpoint; --resume in a new process equals an uninterrupted run."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = arguments(files, killed, "--epochs", "3")
    # One thread here and in the children: same sums, and no waiting for each other on a busy machine.
    torch.set_num_threads(1)
    options = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert main(arguments(files, straight, "--epochs", "3")) == 0
    assert [entry["step"] for entry in metrics(straight)] == list(range(1, 19))

    child = subprocess.run([sys.executable, "-c", KILLED_IN_STEP_4, *run], **options)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert last_complete_checkpoint(str(killed)) is not None and not (killed / "model.safetensors").exists()

    finished = subprocess.run([sys.executable, "-m", "sdft_kernels", *run, "--resume"], **options)
    assert finished.returncode == 0, finished.stderr
    assert "from checkpoint-" in finished.stderr
    assert metrics(killed) == metrics(straight)
    for a, b in zip(weights(straight), weights(killed), strict=True):
        assert torch.equal(a, b)


def test_output_loads_and_a_second_run_is_refused(files, tmp_path, capsys):
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    assert main(arguments(files, out, "--max-steps", "2", "--eval-data", str(files / "data.jsonl"))) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.TEMPLATE
    initial = list(tiny.model().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights(out), initial, strict=True))
    entries = metrics(out)
    assert {"loss", "kl_teacher_student", "student_entropy", "grad_norm", "learning_rate"} <= set(entries[0])
    assert "eval_expert_logprob" in entries[-1]
    capsys.readouterr()
    assert main(arguments(files, out)) == 1
    assert "--resume" in capsys.readouterr().err


def test_lora_trains_an_adapter_that_loads(files, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    assert main(arguments(files, out, "--max-steps", "2", "--lora-r", "2", "--teacher", "ema")) == 0
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()
    assert any("lora_" in name for name, _ in _loaded(out).named_parameters())


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_preview_prints_both_prompts_and_trains_nothing(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(files, out, "--preview")) == 0
    text = capsys.readouterr().out
    assert "student prompt" in text and "teacher prompt" in text and "in the loss" in text
    assert not out.exists()


@pytest.mark.parametrize(("lines", "expected"), [
    (['{"prompt": "a", "privileged_context": "b"}', '{"prompt": '], "line 2: not JSON"),
    (['{"prompt": "a"}'], "line 1 has no column 'privileged_context'"),
    (["[1]"], "line 1: expected a JSON object"),
    (['{"prompt": [{"role": "assistant", "content": "a"}], "privileged_context": "b"}'], "line 1: prompt ends in"),
    (['{"prompt": "a", "privileged_context": 7}'], "line 1: privileged_context must be"),
    ([json.dumps({"prompt": " ".join(["cat"] * 80), "privileged_context": "b"})], "line 1: the teacher prompt has"),
    ([json.dumps({"prompt": " ".join(["cat"] * 99), "privileged_context": "b"})], "line 1: the student prompt has"),
    ([], "no rows"),
])  # fmt: skip
def test_bad_data_names_file_and_line_and_writes_nothing(files, tmp_path, capsys, lines, expected):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    out = tmp_path / "out"
    command = arguments(files, out)
    command[command.index("--data") + 1] = str(bad)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert str(bad) in error and expected in error
    assert not out.exists()


def test_bad_options(files, tmp_path, capsys):
    out = tmp_path / "out"
    for extra, expected in (
        (["--teacher", "cached"], "'cached' is not supported yet"),
        (["--template", "nothing"], "template must be one of"),
        (["--alpha", "2"], "alpha"),
    ):
        assert main(arguments(files, out, *extra)) == 1
        assert expected in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        main(arguments(files, out, "--rollouts", "oracle"))
    assert stop.value.code == 2
    command = arguments(files, out)
    command[command.index("--data") + 1] = os.fspath(tmp_path / "missing.jsonl")
    assert main(command) == 1
    assert "missing.jsonl: no such file" in capsys.readouterr().err
