"""The bug report: complete, parsable, and honest about what is absent."""

import importlib.metadata
import json
import subprocess
import sys

import torch

from sdft_kernels import __version__, _dispatch, _native
from sdft_kernels.cli import __main__ as cli
from sdft_kernels.cli import env


def test_json_parses_and_is_complete(monkeypatch, capsys):
    monkeypatch.setenv("SDFT_KERNELS_DEBUG", "0")
    monkeypatch.setenv("SECRET_TOKEN", "must not be printed")
    assert cli.main(["env", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert report["sdft_kernels"] == __version__
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["flash-attn"] is None or isinstance(report["packages"]["flash-attn"], str)
    assert report["cpu"]["torch_capability"] == torch.backends.cpu.get_cpu_capability()
    assert report["native"]["built"] == _native.has_native()
    assert report["implementations"]["linear_divergence"]["auto"] == _dispatch.resolve("auto")
    assert set(report["implementations"]) == {*env.OPS, env.EMA}
    attention = report["implementations"].pop("shared_prefix_attention")
    assert attention["composition"] == "available" and "torch" not in attention.values()
    assert all(answers["torch"] == "available" for answers in report["implementations"].values())
    assert report["cpu"]["kernels_isa"] == (_native.cpu_isa() or None)
    if torch.backends.mkldnn.is_available():
        assert report["cpu"]["onednn_isa"].strip() and "\n" not in report["cpu"]["onednn_isa"]
    assert report["environment"]["SDFT_KERNELS_DEBUG"] == "0"
    assert "must not be printed" not in out


def test_text_says_what_is_absent(monkeypatch, capsys):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-distribution"))
    monkeypatch.setattr(_native, "has_native", lambda: False)
    monkeypatch.setattr(_native, "why_not", lambda: "no compiler on this machine")
    assert cli.main(["env"]) == 0
    lines = dict(line.split(" : ", 1) for line in capsys.readouterr().out.splitlines() if " : " in line)
    facts = {name.strip(): value for name, value in lines.items()}
    assert facts["no-such-distribution"] == "not installed"
    assert facts["native extension"] == "not built (no compiler on this machine)"
    assert facts["torch"] == importlib.metadata.version("torch")  # torch 2.11 leaves out +cu130 here


def test_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from sdft_kernels.cli.__main__ import main;"
        "sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "torch cannot be imported" in report["gpu"]["reason"] and not report["native"]["built"]
    assert all(answers["auto"].startswith("none: ") for answers in report["implementations"].values())
