"""The command line as a whole: instant help, one clear line per error, exit statuses."""

import argparse
import subprocess
import sys

import pytest

from sdft_kernels.cli import __main__ as cli
from sdft_kernels.cli import env
from sdft_kernels.cli._table import format_plain


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_help_imports_neither_torch_nor_anything_heavy():
    """Help is instant by what it does not import; nothing is timed, so a busy machine changes nothing."""
    code = (
        "import sys; from sdft_kernels.cli.__main__ import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'numpy', 'transformers', 'tqdm', 'rich', 'matplotlib') if m in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"
    shown = python("-X", "importtime", "-m", "sdft_kernels", "--help")
    assert shown.returncode == 0 and "usage:" in shown.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "transformers", "tqdm", "rich", "matplotlib"}


@pytest.mark.parametrize(
    "command", [(name,) for name in cli.COMMANDS] + [("bench", what) for what in ("loss", "attention", "step")]
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out and f"sdft-kernels {' '.join(command)}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["benchmark"], "invalid choice: 'benchmark'"),
        (["bench"], "WHAT"),
        (["bench", "loss"], "--shape --suite"),
        (["bench", "loss", "--shape", "1,2"], "expected N,H,V"),
        (["bench", "loss", "--shape", "0,2,3"], "must be positive"),
        (["bench", "loss", "--shape", "1,2,3", "--suite", "design"], "not allowed with"),
        (["bench", "loss", "--suite", "design", "--dtype", "bf16"], "--suite has its own dtype"),
        (["bench", "loss", "--shape", "1,2,3", "--repeats", "0"], "expected a positive integer, got '0'"),
        (["bench", "loss", "--shape", "1,2,3", "--variants", "nonsense"], "unknown variant 'nonsense'"),
        (["bench", "loss", "--shape", "1,2,3", "--memory-budget", "many"], "expected a size such as 250MiB"),
        (["bench", "loss", "--shape", "1,2,3", "--output", "no/such/folder/x.csv"], "its folder must exist"),
        (["bench", "attention", "--shape", "1,2"], "expected P,R,L, positive integers, got '1,2'"),
        (["bench", "attention", "--shape", "1,2,3", "--heads", "4"], "expected Hq,Hkv"),
        (["bench", "step"], "--shape"),
        (["bench", "step", "--shape", "1,2,3", "--variants", "shared"], "invalid choice: 'shared'"),
        (["check", "--dtype", "fp16"], "invalid choice: 'fp16'"),
    ],
)
def test_wrong_usage_is_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\n  lines"), 1, "sdft-kernels env: error: two lines"),
        (FileNotFoundError(2, "No such file", "data.jsonl"), 1, "data.jsonl"),
        (ImportError("needs the extra [train]"), 1, "needs the extra [train]"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_one_line_on_stderr(error, status, message, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(env, "run", fail)
    monkeypatch.delenv("SDFT_KERNELS_DEBUG", raising=False)
    assert cli.main(["env"]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_debug_shows_the_traceback_and_bugs_keep_theirs(monkeypatch, capsys):
    def fail(args):
        raise ValueError("bad")

    monkeypatch.setattr(env, "run", fail)
    monkeypatch.setenv("SDFT_KERNELS_DEBUG", "1")
    assert cli.main(["env"]) == 1
    assert "Traceback" in capsys.readouterr().err

    def bug(args):
        raise KeyError("bug")

    monkeypatch.setattr(env, "run", bug)
    with pytest.raises(KeyError):
        cli.main(["env"])


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m sdft_kernels env | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("Copy and paste")


def test_plain_table_is_aligned():
    text = format_plain("title", ("a", "long"), [("xyz", "1"), ("y", "")])
    assert text.splitlines() == ["title", "a    long", "---  ----", "xyz  1", "y"]


def test_commands_have_the_three_parts():
    import importlib

    for name in cli.COMMANDS:
        module = importlib.import_module(f"sdft_kernels.cli.{name}")
        module.add_arguments(argparse.ArgumentParser())
        assert module.HELP.endswith(".") and callable(module.run)
