"""``sdft-kernels env``: everything a bug report needs, in one paste. Works without torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdft_kernels._version import __version__

HELP = "Print versions, hardware and the implementation of every op: paste it when reporting a bug."

# Op -> its name in the table of implementations: what `env` reports and `check` checks, beside `EMA`.
OPS = {
    "linear_divergence": "linear_divergence",
    "linear_divergence_loss": "linear_divergence",
    "linear_topk_divergence": "linear_topk_divergence",
    "linear_token_logprob": "linear_token_logprob",
    "shared_prefix_attention": "shared_prefix_attention",
}
EMA = "ema_update_"  # takes no `impl`: compiled for contiguous tensors on CPU, PyTorch for all others

# Distribution names, in the order of how often a bug report hinges on them.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "liger-kernel",
    "flash-attn",
    "safetensors",
    "numpy",
    "tqdm",
    "rich",
    "matplotlib",
)

# What decides which CPU kernels can run: wide vectors, and bf16 matrix products in hardware.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "bf16", "sve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``env`` to `parser`."""
    parser.epilog = "example:\n  sdft-kernels env --json > env.json"
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 unless it cannot be printed."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else format_text(report))
    return 0


def collect() -> dict[str, Any]:
    """Return the report as plain JSON types; what is absent is None or says why."""
    return {
        "sdft_kernels": __version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": cpu_report(),
        "gpu": gpu_report(),
        "native": native_report(),
        "implementations": implementation_report(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("SDFT_")},
    }


def package_version(distribution: str) -> str | None:
    """Return the installed version of `distribution`, or None; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> tuple[str, list[str]]:
    """Return the CPU's name and those of `CPU_FLAGS` it has (both from Linux's cpuinfo; elsewhere name only)."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or platform.processor() or "unknown", [f for f in CPU_FLAGS if f in flags]


def cpu_report() -> dict[str, Any]:
    """Return the CPU's name, the cores this process may use, its vector units and torch's view of both."""
    name, flags = cpu_model()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report: dict[str, Any] = {"name": name, "cores": cores, "flags": flags}
    try:
        import torch
    except ImportError:
        return report
    return report | {
        "kernels_isa": kernels_isa(),
        "onednn_isa": onednn_isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def kernels_isa() -> str | None:
    """Return the instruction set that this package's CPU kernels run, None where none are built."""
    from sdft_kernels import _native

    return _native.cpu_isa() or None


def onednn_isa() -> str | None:
    """Return the instruction set that oneDNN names in a process of its own, None if it names none.

    It writes that line, which no function returns, when it first computes: here an element-wise operation.
    """
    command = [sys.executable, "-c", "import torch; torch.relu(torch.ones(2, 2).to_mkldnn())"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ONEDNN_VERBOSE": "1"}).stdout
    except OSError:
        return None
    return next((line.partition("isa:")[2] for line in said.splitlines() if ",cpu,isa:" in line), None)


def gpu_report() -> dict[str, Any]:
    """Return torch's CUDA build, the driver and every visible GPU."""
    try:
        import torch
    except ImportError as error:
        return {"devices": [], "reason": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no GPU visible" if built else "torch is a CPU build"
        return {"devices": [], "reason": reason, "torch_cuda": built}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "torch_cuda": torch.version.cuda or torch.version.hip, "driver": driver_version()}


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, None if ``nvidia-smi`` is absent or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def native_report() -> dict[str, Any]:
    """Return whether the native extension is loaded, else why not, and how it was built."""
    try:
        from sdft_kernels import _native

        if not _native.has_native():
            return {"built": False, "reason": _native.why_not()}
        return {"built": True, "host": _native.host() is not None, "build_info": _native.build_info()}
    except ImportError as error:
        return {"built": False, "reason": str(error)}


def implementation_report() -> dict[str, dict[str, str]]:
    """Return, per op, what ``impl="auto"`` runs here and what every named implementation answers."""
    try:
        from sdft_kernels import _dispatch
    except ImportError as error:
        return {op: {"auto": f"none: {error}"} for op in (*OPS, EMA)}
    from sdft_kernels import _native

    report = {}
    for op, name in OPS.items():
        answers = {"auto": _dispatch.resolve("auto", name), **_dispatch.available(name)}
        if name == "shared_prefix_attention":  # whose PyTorch kernels go by another name
            answers = {key.replace("torch", "composition"): value for key, value in answers.items()}
            answers["auto"] = answers["auto"].replace("torch", "composition")
        report[op] = answers
    built = _native.has_native()
    answer = "available" if built else str(_native.why_not())
    report[EMA] = {"auto": "native" if built else "torch", "torch": "available", "native": answer}
    return report


def format_text(report: dict[str, Any]) -> str:
    """Return `report` as aligned ``name: value`` lines, one fact a line."""
    lines = ["Copy and paste this when reporting a bug.", ""]
    facts: list[tuple[str, str]] = [(name, report[name]) for name in ("sdft_kernels", "python", "os")]
    facts += [(name, version or "not installed") for name, version in report["packages"].items()]
    cpu = report["cpu"]
    facts.append(("CPU", f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['flags']) or 'flags unknown'}"))
    if "torch_capability" in cpu:
        facts.append(("CPU in kernels", cpu["kernels_isa"] or "none are built"))
        facts.append(("CPU in oneDNN", cpu["onednn_isa"] or "unknown"))
        facts.append(("CPU in torch", f"{cpu['torch_capability']}, {cpu['torch_threads']} threads"))
    gpu = report["gpu"]
    for index, device in enumerate(gpu["devices"]):
        text = f"{device['name']}, sm {device['capability']}, {device['memory_gib']} GiB"
        facts.append((f"GPU {index}", f"{text}, CUDA {gpu['torch_cuda']}, driver {gpu['driver'] or 'unknown'}"))
    if not gpu["devices"]:
        facts.append(("GPU", f"none ({gpu['reason']})"))
    native = report["native"]
    built = ", ".join(f"{key}={value}" for key, value in native.get("build_info", {}).items())
    if native["built"] and not native["host"]:
        built = "without _host: pip install 'pybind11>=3.0', then install again"
    facts.append(("native extension", f"built ({built})" if native["built"] else f"not built ({native['reason']})"))
    for op, answers in report["implementations"].items():
        facts.append((op, f"auto → {answers['auto']}"))
        facts += [(f"  impl {name}", answer) for name, answer in answers.items() if name != "auto"]
    facts += list(report["environment"].items()) or [("SDFT_* variables", "none set")]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*lines, *(f"{name.ljust(width)} : {value}" for name, value in facts)])
