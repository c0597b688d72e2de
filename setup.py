"""Decides before `setup()` whether there is native code, so that a build without it is a plain py3-none-any wheel.

Environment: SDFT_BUILD_EXT=auto|0|1 (auto: build if possible), MAX_JOBS, SDFT_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, CXX.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
HOST = find_spec("pybind11") is not None  # _host alone needs it
TARGETS = ("_ops", "_host") if HOST else ("_ops",)
NO_HOST = (
    "the host module _host (the prefix planner's compiled code; it runs in Python instead, slower): pybind11 is not "
    "importable in the build environment; pip install 'pybind11>=3.0', then install again"
)
STUB = ROOT / "python" / "stubs" / "_host.pyi"
OLDEST_TORCH = (2, 10)
# What torch takes these names for in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# pip also runs this file to ask for metadata; only these commands need the libraries.
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def find_tool(name: str) -> str | None:
    """A program on PATH, or in the scripts folder of this Python (pip's cmake and ninja, venv not activated)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def missing_requirement() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"native code is built on Linux only, this is {sys.platform}"
    if find_spec("torch") is None:
        return "torch is not importable in the build environment (use --no-build-isolation)"
    torch = version("torch")
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if find_tool("cmake") is None:
        return "cmake is not on PATH (pip install cmake ninja)"
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX"), "c++", "g++", "clang++") if cxx):
        return "there is no C++ compiler on PATH"
    return None


def cuda_architectures() -> str:
    """CMake's list from ours ("80;90a") or from torch's ("8.0 9.0a+PTX", "Hopper"); "" leaves CMakeLists.txt's default.

    To CMake "80" is machine code and PTX, "80-real" machine code alone.
    """
    for variable in ("SDFT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        wished = [item for item in re.split(r"[;,\s]+", os.environ.get(variable, "")) if item]
        if len(wished) == 1 and wished[0] in ("native", "all", "all-major"):
            return wished[0]
        found = []
        for item in (part for name in wished for part in NAMED_ARCHITECTURES.get(name.lower(), name).split(";")):
            torchs = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
            if not torchs and not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", item):
                names = ", ".join(name.capitalize() for name in NAMED_ARCHITECTURES)
                raise SystemExit(
                    f"{variable}={os.environ[variable]}: {item!r} is no CUDA architecture; expected a list such as "
                    f"80;90a or 8.0 9.0a+PTX, or names: {names}"
                )
            arch = f"{torchs[1]}{torchs[2]}{'' if torchs[3] else '-real'}" if torchs else item
            if arch not in found:
                found.append(arch)
        if found:
            return ";".join(found)
    return ""


def jobs() -> str:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS={text}: expected a positive integer")
    return text


def cmake_commands(*options: str) -> list[list[str]]:
    torch_dir = Path(find_spec("torch").origin).parent
    cmake = find_tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    if HOST:
        import pybind11

        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    else:
        configure.append("-DSDFT_HOST=OFF")
    configure += [f"-DSDFT_TORCH_DIR={torch_dir}", f"-DSDFT_TORCH_VERSION={version('torch')}", *options]
    if archs := cuda_architectures():
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
    if ninja := find_tool("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [configure, [cmake, "--build", str(BUILD), "--parallel", jobs()]]


def first_error(text: str) -> str:
    """The first line of a build's output that says what went wrong. CMake's own headlines only say where."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if re.search("error|fatal", line, re.IGNORECASE) and not line.startswith(("CMake Error", "-- ")):
            return line[:300]
    headline = next((i for i, line in enumerate(lines) if line.startswith("CMake Error")), len(lines))
    return " ".join(lines[headline : headline + 2])[:300] or "no error line"


def run_cmake(log: Path, *options: str) -> str | None:
    """Configure and build into BUILD, every word into `log`. What went wrong, in one line, or None."""
    with log.open("w") as out:
        for command in cmake_commands(*options):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
                break
        else:
            return None
    return f"{first_error(log.read_text(errors='replace'))} (all of it: {log.relative_to(ROOT)})"


def build_failure() -> str | None:
    """Build both targets into BUILD; without CUDA where it fails with. Why neither can be done, or None."""
    # A cache made by another Python, torch or folder would win over the arguments; the objects are worth keeping.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "build.log"
    failure = run_cmake(log)
    if failure and any((ROOT / "csrc" / "cuda").glob("*.cu")):
        with_cuda = log.replace(BUILD / "build-with-cuda.log")
        why = failure.replace(log.name, with_cuda.name)
        failure = run_cmake(log, "-DSDFT_CUDA=OFF", f"-DSDFT_CUDA_WHY_NOT=the build with CUDA failed: {why}")
    if failure:
        return f"the native build failed: {failure}"
    missing = re.search(r"CUDA operators: none: (.*)", log.read_text(errors="replace"))
    if missing:
        print(f"sdft_kernels: building without CUDA operators ({missing[1]})", file=sys.stderr)
    return None


class CopyNative(build_ext):
    """Hand setuptools the libraries CMake has built: one Extension each, so that every kind of install knows it."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BUILD / f"{ext.name.rpartition('.')[2]}.so", out)


class BuildPy(build_py):
    """Ship the stub of `_host`, or the reason why there is nothing to stub (`sdft-kernels env` repeats it)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "sdft_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in ("_host.pyi", "_build_reason.txt"):
            (package / stale).unlink(missing_ok=True)
        if REASON is None and HOST:
            shutil.copy2(STUB, package / STUB.name)
        elif REASON is not None:
            (package / "_build_reason.txt").write_text(REASON + "\n")


def decide() -> str | None:
    """Why this build is pure Python, or None. Runs the native build when the command needs its result."""
    mode = os.environ.get("SDFT_BUILD_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"SDFT_BUILD_EXT={mode}: expected auto, 0 or 1")
    if mode == "0":
        reason = "SDFT_BUILD_EXT=0"
    else:
        reason = missing_requirement()
        if reason is None and mode == "1" and not HOST:
            reason = f"this would leave out {NO_HOST}"
        if reason is None and BUILD_COMMANDS & set(sys.argv):
            reason = build_failure()
    if reason and mode == "1":
        raise SystemExit(f"SDFT_BUILD_EXT=1 but {reason}")
    if BUILD_COMMANDS & set(sys.argv):
        if reason:
            warn(f"sdft_kernels: building without native code ({reason})")
        elif not HOST:
            warn(f"sdft_kernels: building without {NO_HOST}")
    return reason


def warn(text: str) -> None:
    """Between rules, where a build's output is long; pip shows it with -v."""
    rule = "*" * 100
    print(f"{rule}\n{text}\n{rule}", file=sys.stderr)


REASON = decide()
setup(
    ext_modules=[]
    if REASON
    else [Extension(f"sdft_kernels.{target}", sources=[], py_limited_api=target == "_ops") for target in TARGETS],
    cmdclass={"build_ext": CopyNative, "build_py": BuildPy},
)
