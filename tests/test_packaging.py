"""What an installer gets: wheels with and without native code, and what the native code links to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sdft_kernels
from sdft_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "csrc", "python")

native = pytest.mark.skipif(not _native.has_native(), reason=_native.why_not() or "built")
needs_toolchain = pytest.mark.skipif(
    not all((shutil.which("c++"), find_spec("pybind11"), find_spec("cmake") or shutil.which("cmake"))),
    reason="needs a C++ compiler, cmake and pybind11",
)


UNSTABLE_SYMBOL = re.compile(r"\b(?:c10|at|torch)::\S+")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that builds leave nothing in this checkout."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_host.pyi")
    shutil.copytree(ROOT / "sdft_kernels", copy / "sdft_kernels", ignore=ignore)
    return copy


def setup(
    checkout: Path, *command: str, python_args: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a setuptools command in `checkout`, as pip's build backend would."""
    return subprocess.run(
        [sys.executable, *python_args, "setup.py", *command],
        cwd=checkout,
        env={**os.environ, "MAX_JOBS": "2", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_version_is_the_distributions() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", sdft_kernels.__version__)
    declared = (ROOT / "pyproject.toml").read_text()
    assert 'attr = "sdft_kernels._version.__version__"' in declared


def test_torch_is_no_build_requirement() -> None:
    build_system = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
    (requires,) = re.findall(r"^requires = (.*)$", build_system, re.MULTILINE)
    assert "setuptools" in requires
    assert "torch" not in requires


def test_torch_is_the_only_hard_dependency() -> None:
    (dependencies,) = re.findall(r"^dependencies = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert dependencies == '["torch>=2.10"]'


def test_requirements_are_pinned_and_name_no_index() -> None:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert {path.stem for path in files} >= {"base", "dev", "demo", "bench"}
    for path in files:
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"-r \w+\.txt|[\w.-]+==[\w.]+(; .*)?", line), f"{path.name}: {line}"


@pytest.mark.slow
def test_pure_wheel_is_any_and_says_why(checkout: Path, tmp_path: Path) -> None:
    result = setup(checkout, "bdist_wheel", "-d", str(tmp_path / "out"), SDFT_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    assert "sdft_kernels: building without native code (SDFT_BUILD_EXT=0)" in result.stderr
    wheel = only_wheel(tmp_path / "out")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("sdft_kernels/_build_reason.txt") == b"SDFT_BUILD_EXT=0\n"
    assert "sdft_kernels/divergence/api.py" in names
    assert "sdft_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".so", "_host.pyi")) or name.startswith(("tests", "csrc"))]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(checkout: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = setup(checkout, "bdist_wheel", "-d", str(tmp_path / "out"), SDFT_BUILD_EXT="auto", PATH=str(empty), CXX="")
    assert result.returncode == 0, result.stderr
    assert "sdft_kernels: building without native code (" in result.stderr
    assert only_wheel(tmp_path / "out").name.endswith("-py3-none-any.whl")


@pytest.mark.slow
@needs_toolchain
def test_source_that_does_not_compile_gives_a_pure_wheel_and_the_error(checkout: Path, tmp_path: Path) -> None:
    (checkout / "csrc" / "ops.cpp").write_text("#error not today\n")
    result = setup(checkout, "bdist_wheel", "-d", str(tmp_path / "out"), SDFT_BUILD_EXT="auto")
    assert result.returncode == 0, result.stderr
    assert "building without native code (the native build failed: " in result.stderr
    assert "not today" in result.stderr
    assert only_wheel(tmp_path / "out").name.endswith("-py3-none-any.whl")


def test_native_build_without_torch_stops_with_the_fix(checkout: Path) -> None:
    program = "import importlib.util as u, sys; f = u.find_spec\n"
    program += "u.find_spec = lambda name, *a: None if name == 'torch' else f(name, *a)\n"
    program += "sys.argv = ['setup.py', 'bdist_wheel']; __file__ = 'setup.py'; exec(open('setup.py').read())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env={**os.environ, "SDFT_BUILD_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "SDFT_BUILD_EXT=1 but torch is not importable in the build environment" in result.stderr
    assert "--no-build-isolation" in result.stderr


def test_unknown_build_mode_is_refused(checkout: Path) -> None:
    result = setup(checkout, "--version", SDFT_BUILD_EXT="yes")
    assert result.returncode != 0
    assert "SDFT_BUILD_EXT=yes: expected auto, 0 or 1" in result.stderr


@pytest.mark.slow
@needs_toolchain
def test_sdist_builds_a_native_wheel(checkout: Path, tmp_path: Path) -> None:
    assert setup(checkout, "sdist", "-d", str(tmp_path / "out")).returncode == 0
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    result = setup(source, "bdist_wheel", "-d", str(tmp_path / "wheel"), SDFT_BUILD_EXT="1")
    assert result.returncode == 0, result.stderr
    wheel = only_wheel(tmp_path / "wheel")
    assert "-none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as built:
        built.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "sdft_kernels"
    assert (installed / "_host.pyi").read_text() == (ROOT / "python" / "stubs" / "_host.pyi").read_text()
    assert not (installed / "_build_reason.txt").exists()
    code = (
        "from sdft_kernels import _native as n; assert n.has_native(), n.why_not(); print(n.build_info(), n.__file__)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=installed.parent, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert str(installed) in loaded.stdout
    for library in installed.glob("*.so"):
        content = library.read_bytes()
        assert str(source).encode() not in content, f"{library.name} carries the build folder"
        assert os.fsencode(os.path.dirname(torch.__file__)) not in content, f"{library.name} carries torch's folder"


def _library(name: str) -> str:
    spec = find_spec(f"sdft_kernels.{name}")
    assert spec is not None and spec.origin is not None
    return spec.origin


@native
@pytest.mark.skipif(not (shutil.which("readelf") and shutil.which("nm")), reason="needs binutils")
def test_operators_use_only_the_stable_abi() -> None:
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", _library("_ops")], capture_output=True, text=True).stdout
    assert "aoti_torch_library_def" in symbols
    assert not UNSTABLE_SYMBOL.findall(symbols)
    torch_python = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    unstable = subprocess.run(["nm", "-DC", "--undefined-only", torch_python], capture_output=True, text=True).stdout
    assert UNSTABLE_SYMBOL.findall(unstable), "the pattern must find the C++ symbols of torch's own extension"
    needed = subprocess.run(["readelf", "-d", _library("_ops")], capture_output=True, text=True).stdout
    assert "RPATH" not in needed and "RUNPATH" not in needed
    libraries = set(re.findall(r"NEEDED.*\[(lib\w+)", needed))
    assert libraries <= {"libtorch_cpu", "libstdc", "libm", "libgcc_s", "libc"}


@native
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_host_module_is_free_of_torch() -> None:
    needed = subprocess.run(["readelf", "-d", _library("_host")], capture_output=True, text=True).stdout
    assert "libtorch" not in needed and "libc10" not in needed


@native
def test_build_info_describes_the_build() -> None:
    info = _native.build_info()
    assert set(info) == {"compiler", "flags", "cuda", "torch_target", "torch_headers"}
    assert info["torch_target"] == "2.10"
    assert re.search(r"\d", info["compiler"])
    assert str(ROOT) not in " ".join(info.values())


def test_library_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_ops.abi3.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})()
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: spec)
    why_not = _native.why_not.__wrapped__
    with pytest.warns(RuntimeWarning, match="runs without its compiled operators: _ops.abi3.so is built but does not"):
        reason = why_not()
    assert "rebuild it with: pip install --no-build-isolation" in reason


def test_absent_library_is_explained_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.why_not.__wrapped__().startswith("not built")
