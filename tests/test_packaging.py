"""What an installer gets: wheels with and without native code, and what the native code links to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import warnings
import zipfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import HANG_SECONDS

import sdft_kernels
from sdft_kernels import _native

# Here, before any test runs: setuptools refuses to be imported after anything in the process has looked for pip.
pytest.importorskip("setuptools")

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
        timeout=HANG_SECONDS,
    )


LOADED = (
    "from sdft_kernels import _native as n; assert n.has_native(), n.why_not(); assert n.host() is not None;"
    "print(n.build_info()['torch_target'], n.__file__)"
)


def clean_venv(folder: Path) -> Path:
    """The Python of a new environment that sees this one's libraries (torch) after its own."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return folder / "bin" / "python"


def _outside_env(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


def pip_install(python: Path, *arguments: str, **env: str) -> None:
    """`pip install` into the environment of `python`; what is installed elsewhere does not count, no index is asked."""
    command = [str(python), "-m", "pip", "install", "--ignore-installed", "--no-index", "--no-deps", *arguments]
    done = subprocess.run(
        command, env=_outside_env(MAX_JOBS="2", **env), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_in(python: Path, folder: Path, code: str) -> str:
    """What `code` prints, run in `folder`."""
    done = subprocess.run([python, "-c", code], cwd=folder, env=_outside_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


WITHOUT_PYBIND11 = (
    "import importlib.util as u, sys; f = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name == 'pybind11' else f(name, *a)\n"
    "sys.argv = ['setup.py', *sys.argv[1:]]; __file__ = 'setup.py'; exec(open('setup.py').read())"
)


def without_pybind11(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PYBIND11, *command], cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "MAX_JOBS": "2", **env}, timeout=HANG_SECONDS,
    )  # fmt: skip


@needs_toolchain
def test_all_native_parts_without_pybind11_stop_with_the_fix(checkout: Path) -> None:
    result = without_pybind11(checkout, "bdist_wheel", SDFT_BUILD_EXT="1")
    assert result.returncode != 0
    assert "SDFT_BUILD_EXT=1 but this would leave out the host module _host" in result.stderr
    assert "pip install 'pybind11>=3.0'" in result.stderr


@pytest.mark.slow
@needs_toolchain
def test_without_pybind11_the_operators_are_built_and_the_rest_is_named(checkout: Path, tmp_path: Path) -> None:
    result = without_pybind11(checkout, "bdist_wheel", "-d", str(tmp_path / "out"), SDFT_BUILD_EXT="auto")
    assert result.returncode == 0, result.stderr
    assert "***\nsdft_kernels: building without the host module _host" in result.stderr
    assert "pip install 'pybind11>=3.0'" in result.stderr
    with zipfile.ZipFile(only_wheel(tmp_path / "out")) as archive:
        names = archive.namelist()
    assert [name for name in names if "/_ops." in name and name.endswith(".so")]
    assert not [name for name in names if "_host" in name or name.endswith("_build_reason.txt")]


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
    python = clean_venv(tmp_path / "venv")
    pip_install(python, str(wheel))
    installed = Path(run_in(python, tmp_path, "import sdft_kernels; print(sdft_kernels.__path__[0])").strip())
    assert installed.is_relative_to(tmp_path / "venv")
    assert (installed / "_host.pyi").read_text() == (ROOT / "python" / "stubs" / "_host.pyi").read_text()
    assert not (installed / "_build_reason.txt").exists()
    assert run_in(python, tmp_path, LOADED).split() == ["2.10", str(installed / "_native.py")]
    for library in installed.glob("*.so"):
        content = library.read_bytes()
        assert str(source).encode() not in content, f"{library.name} carries the build folder"
        assert os.fsencode(os.path.dirname(torch.__file__)) not in content, f"{library.name} carries torch's folder"


@pytest.mark.slow
@needs_toolchain
def test_editable_install_is_native_and_follows_the_checkout(checkout: Path, tmp_path: Path) -> None:
    python = clean_venv(tmp_path / "venv")
    pip_install(python, "--no-build-isolation", "-e", str(checkout), SDFT_BUILD_EXT="1")
    package = checkout / "sdft_kernels"
    assert run_in(python, tmp_path, LOADED).split() == ["2.10", str(package / "_native.py")]
    (package / "_version.py").write_text('__version__ = "9.9.9"\n')
    assert run_in(python, tmp_path, "import sdft_kernels; print(sdft_kernels.__version__)") == "9.9.9\n"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, its `setup()` not called, building into `tmp_path`, where csrc/cuda has one source."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    for name in ("SDFT_BUILD_EXT", "SDFT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = spec_from_file_location("sdft_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "probe.cu").write_text("__global__ void probe_kernel() {}\n")
    return module


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("SDFT_CUDA_ARCHS", "80;90a", "80;90a"),
        ("SDFT_CUDA_ARCHS", " 80, 90a-real ,120-virtual;", "80;90a-real;120-virtual"),
        ("SDFT_CUDA_ARCHS", "native", "native"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX", "80-real;90a"),
        ("TORCH_CUDA_ARCH_LIST", "8.6;12.0", "86-real;120-real"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "90"),
        ("TORCH_CUDA_ARCH_LIST", "ampere;Ada 8.0", "80-real;86;89"),
        ("TORCH_CUDA_ARCH_LIST", "", ""),
    ],
)
def test_cuda_architectures_reach_cmake(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setenv(variable, value)
    assert build.cuda_architectures() == expected
    given = [word for word in build.cmake_commands()[0] if word.startswith("-DCMAKE_CUDA_ARCHITECTURES=")]
    assert given == ([f"-DCMAKE_CUDA_ARCHITECTURES={expected}"] if expected else [])


def test_our_variable_of_architectures_goes_before_torchs(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setenv("SDFT_CUDA_ARCHS", "90a")
    assert build.cuda_architectures() == "90a"


@pytest.mark.parametrize("value", ["Hoper", "sm_90", "9", "8.0 Kepler", "9.0+ptx", "native;80"])
def test_what_is_no_cuda_architecture_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    bad = re.escape(next(word for word in re.split("[; ]", value) if word not in ("8.0", "80")))
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST={re.escape(value)}: '{bad}' is no CUDA architecture"):
        build.cuda_architectures()


def test_max_jobs_is_the_number_of_compilers(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    assert build.cmake_commands()[1][-2:] == ["--parallel", str(os.cpu_count())]
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.cmake_commands()[1][-2:] == ["--parallel", "3"]
    for bad in ("0", "many", "-1"):
        monkeypatch.setenv("MAX_JOBS", bad)
        with pytest.raises(SystemExit, match=f"MAX_JOBS={bad}: expected a positive integer"):
            build.cmake_commands()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@needs_toolchain
def test_broken_nvcc_is_said_by_cmake_and_by_env(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Configured for real, with the checkout's CMakeLists.txt; the compiler's words contain what C must escape."""
    shutil.copy2(ROOT / "CMakeLists.txt", tmp_path)
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho >&2\necho 'nvcc fatal : \"licence\" \\gone' >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    done = subprocess.run(build.cmake_commands()[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = f"none: {nvcc} does not work: nvcc fatal : 'licence' 'gone"
    assert f"sdft_kernels: CUDA operators: {reason}" in done.stdout
    header = (tmp_path / "build" / "generated" / "build_config.h").read_text()
    assert f'#define SDFT_CUDA "{reason}"\n' in header


def test_build_that_fails_with_cuda_is_done_without(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []

    def commands(*options: str) -> list[list[str]]:
        runs.append(options)
        why = next((option.partition("=")[2] for option in options if "WHY_NOT" in option), "")
        said = f"-- sdft_kernels: CUDA operators: none: {why}" if why else "CMake Error at x:\nnvcc fatal : no sm_35"
        return [[sys.executable, "-c", f"print({said!r}); raise SystemExit({0 if why else 1})"]]

    monkeypatch.setattr(build, "cmake_commands", commands)
    assert build.build_failure() is None
    why = "the build with CUDA failed: nvcc fatal : no sm_35 (all of it: build/build-with-cuda.log)"
    assert runs == [(), ("-DSDFT_CUDA=OFF", f"-DSDFT_CUDA_WHY_NOT={why}")]
    assert capsys.readouterr().err == f"sdft_kernels: building without CUDA operators ({why})\n"
    assert "nvcc fatal" in (build.BUILD / "build-with-cuda.log").read_text()

    runs.clear()
    shutil.rmtree(build.ROOT / "csrc")  # nothing of CUDA's to leave out
    assert build.build_failure() == "the native build failed: nvcc fatal : no sm_35 (all of it: build/build.log)"
    assert runs == [()]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "-- Found x\nCMake Error at a.cmake:3 (message):\n\n  no compiler\n",
            "CMake Error at a.cmake:3 (message): no compiler",
        ),
        ("CMake Error at a.cmake:3:\n nvcc fatal : sm_35\n-- errors occurred!", "nvcc fatal : sm_35"),
        ("a.cpp:1:2: error: not today\nb.cpp: error: later", "a.cpp:1:2: error: not today"),
        ("Killed", "no error line"),
    ],
)
def test_first_line_that_says_what_went_wrong(build: ModuleType, output: str, line: str) -> None:
    assert build.first_error(output) == line


@native
def test_env_repeats_what_was_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sdft_kernels.cli import __main__ as cli

    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "none: /usr/bin/nvcc does not work: nvcc fatal"})
    assert cli.main(["env"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("native extension"))
    assert "built (cuda=none: /usr/bin/nvcc does not work: nvcc fatal)" in line


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
