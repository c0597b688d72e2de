"""The scripts in `findings/` keep the form that its README.md describes. They install packages: no test runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).resolve().parent.parent / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))
FIELDS = ("Finding", "Versions", "Expected", "Behaviour", "Output", "Exit")
PIN = re.compile(r"[\w.-]+==\d+(?:\.\d+)+")


def violations(text: str) -> list[str]:
    """Returns what in the text of a script departs from the form, as names; empty if nothing does."""
    found = []
    head, _, body = text.partition("\nset -euo pipefail\n")
    if not head.startswith("#!/usr/bin/env bash\n") or not body:
        found.append("start")
    if any(line and not line.startswith("#") for line in head.splitlines()):
        found.append("code before `set`")
    found += [field for field in FIELDS if not re.search(rf"^# {field}:(?: |\n# +)\S", head, re.MULTILINE)]
    installs = re.findall(r'pip" install --quiet (.*)$', body, re.MULTILINE)
    packages = installs[0].split() if len(installs) == body.count("install") == 1 else []
    versions = re.findall(r"^# Versions: .*$", head, re.MULTILINE)
    if not packages or not all(PIN.fullmatch(package) for package in packages):
        found.append("pins")
    if len(versions) != 1 or PIN.findall(versions[0]) != packages:
        found.append("versions")
    if "mktemp -d" not in body or "trap 'rm -rf \"$folder\"' EXIT" not in body:
        found.append("clean-up")
    if "sdft_kernels" in text or '/bin/python" -I ' not in body:
        found.append("our code")
    if not re.search(r"sys\.exit\(0 if .* else 1\)", body):
        found.append("exit status")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_follows_the_form(script: Path) -> None:
    text = script.read_text()
    assert violations(text) == []
    assert os.access(script, os.X_OK)
    for code in re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", text, re.DOTALL | re.MULTILINE):
        compile(code, script.name, "exec")
    assert f"]({script.name})" in (FINDINGS / "README.md").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("old", "new", "violation"),
    [
        ("#!/usr/bin/env bash\n", "", "start"),
        ("set -euo pipefail", "set -e", "start"),
        ("# Expected: ", "# Hoped: ", "Expected"),
        ("# Output: ", "# Seen: ", "Output"),
        ("--quiet torch==2.13.0 numpy", "--quiet torch numpy", "pins"),
        ("# Versions: torch==2.13.0", "# Versions: torch==2.12.0", "versions"),
        ("trap ", ": ", "clean-up"),
        ("EXIT\n", "INT\n", "clean-up"),
        ("import torch\n", "import torch, sdft_kernels\n", "our code"),
        ('/bin/python" -I ', '/bin/python" ', "our code"),
        ("sys.exit(0 if", "print(0 if", "exit status"),
    ],
)
def test_departure_from_the_form_is_seen(old: str, new: str, violation: str) -> None:
    text = (FINDINGS / "torch_amx_strided_rows.sh").read_text()
    assert old in text
    assert violation in violations(text.replace(old, new))
