"""The CUDA kernel as it was compiled: every architecture, registers, spills, access widths and cluster barriers.

Read from the built library with the tools that come inside the triton package; no GPU is needed.
"""

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from processes import HANG_SECONDS

from sdft_kernels import _native

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")  # CMakeLists.txt's default
MOST_REGISTERS = 64  # of which two blocks of 512 threads fill a multiprocessor
CLUSTERS = ("1re-read", "1", "2", "4", "8", "16")

pytestmark = pytest.mark.skipif(not _native.has_cuda_kernels(), reason="built without CUDA kernels")


def cuobjdump(*options):
    spec = importlib.util.find_spec("triton")
    tool = None if spec is None else Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool is None or not tool.exists():
        pytest.skip("cuobjdump comes inside the triton package")
    library = importlib.util.find_spec("sdft_kernels._ops").origin
    done = subprocess.run([tool, *options, library], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cluster_of(symbol):
    """Template arguments of affine_kernel<BLOCKS, RESIDENT> from its mangled name."""
    blocks, resident = re.search(r"affine_kernelILi(\d+)ELb([01])E", symbol).groups()
    return blocks if resident == "1" else f"{blocks}re-read"


def resources():
    """(architecture, cluster) -> registers, stack and local bytes of each compiled kernel."""
    found, architecture, kernel = {}, None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S*affine_kernel\S*):", line):
            kernel = cluster_of(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[architecture, kernel] = tuple(map(int, match.groups()))
    return found


def built_by_default():
    summary = _native.build_info()["cuda"]
    if not all(architecture.removeprefix("sm_") in summary for architecture in ARCHITECTURES):
        pytest.skip(f"built for other architectures: {summary}")


def test_no_kernel_spills_on_any_architecture():
    built_by_default()
    found = resources()
    assert set(found) == {(architecture, cluster) for architecture in ARCHITECTURES for cluster in CLUSTERS}
    for key, (registers, stack, local) in found.items():
        assert registers <= MOST_REGISTERS and stack == local == 0, key


def accesses(architecture):
    """cluster -> how often each memory and barrier instruction stands in the kernel's machine code."""
    counts, kernel = {}, None
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if match := re.search(r"Function : (\S*affine_kernel\S*)", line):
            kernel = counts.setdefault(cluster_of(match[1]), Counter())
        elif kernel is not None and (match := re.search(r"\b((?:LDG|STG|LDL|STL|UCGABAR)[\w.]*)", line)):
            kernel[match[1]] += 1
    return counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_move_16_bytes_at_a_time_and_are_read_once(architecture):
    built_by_default()
    counts = accesses(architecture)
    for cluster in CLUSTERS:
        seen = counts[cluster]
        if architecture == "sm_80" and int(cluster.removesuffix("re-read")) > 1:
            assert not seen, "clusters came with compute capability 9.0"
            continue
        looks = 3 if cluster == "1re-read" else 1  # numbers, JSD, gradient; else all from shared memory
        wide = sum(n for name, n in seen.items() if name.startswith("LDG") and ".128" in name)
        assert wide == 2 * looks, (cluster, seen)  # both models
        assert sum(n for name, n in seen.items() if name.startswith("STG") and ".128" in name) == 1, (cluster, seen)
        assert sum(n for name, n in seen.items() if name.startswith("STG") and ".64" in name) == 1, (cluster, seen)
        assert not any(name.startswith(("LDL", "STL")) for name in seen), (cluster, seen)
        # Before the first write into another block's memory, after its statistics, after its share of the mixture.
        expected = 0 if cluster.startswith("1re") or cluster == "1" else 3
        assert seen["UCGABAR_ARV"] == expected, (cluster, seen)
