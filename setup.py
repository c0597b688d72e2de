"""Decides before `setup()` whether there is native code, so that a build without it is a plain py3-none-any wheel.

Environment: SDFT_BUILD_EXT=auto|0|1 (auto: build if possible), MAX_JOBS, SDFT_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, CXX.
"""

import os
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
TARGETS = ("_ops", "_host")
STUB = ROOT / "python" / "stubs" / "_host.pyi"
OLDEST_TORCH = (2, 10)
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
    if find_spec("pybind11") is None:
        return "pybind11 is not importable in the build environment"
    if find_tool("cmake") is None:
        return "cmake is not on PATH"
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX"), "c++", "g++", "clang++") if cxx):
        return "there is no C++ compiler on PATH"
    return None


def cuda_architectures() -> str:
    """CMake's list from ours ("80;90a") or from torch's ("8.0 9.0a+PTX"); empty leaves CMakeLists.txt's default."""
    archs = os.environ.get("SDFT_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    return ";".join(arch.replace(".", "").removesuffix("+PTX") for arch in archs.replace(" ", ";").split(";") if arch)


def cmake_commands() -> list[list[str]]:
    import pybind11

    torch_dir = Path(find_spec("torch").origin).parent
    cmake = find_tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DSDFT_TORCH_DIR={torch_dir}", f"-DSDFT_TORCH_VERSION={version('torch')}"]
    if archs := cuda_architectures():
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
    if ninja := find_tool("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    return [configure, [cmake, "--build", str(BUILD), "--parallel", jobs]]


def build_failure() -> str | None:
    """Build both targets into BUILD. The reason in one line when that fails; the compiler's words are in build.log."""
    # A cache made by another Python, torch or folder would win over the arguments; the objects are worth keeping.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "build.log"
    with log.open("w") as out:
        for command in cmake_commands():
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
                break
        else:
            return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
    first = lines[0] if lines else "no error line"
    return f"the native build failed: {first} (all of it: {log.relative_to(ROOT)})"


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
        if REASON is None:
            shutil.copy2(STUB, package / STUB.name)
        else:
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
        if reason is None and BUILD_COMMANDS & set(sys.argv):
            reason = build_failure()
    if reason and mode == "1":
        raise SystemExit(f"SDFT_BUILD_EXT=1 but {reason}")
    if reason and BUILD_COMMANDS & set(sys.argv):
        print(f"sdft_kernels: building without native code ({reason})", file=sys.stderr)
    return reason


REASON = decide()
setup(
    ext_modules=[]
    if REASON
    else [
        Extension("sdft_kernels._ops", sources=[], py_limited_api=True),
        Extension("sdft_kernels._host", sources=[]),
    ],
    cmdclass={"build_ext": CopyNative, "build_py": BuildPy},
)
