"""What is measured: a shape with its dtype, device and repetitions, and the request that one worker process gets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from typing import ClassVar

MIB = 2**20
_SUFFIXES = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """Return the bytes of ``"250MiB"``, ``"1.5GiB"``, ``"64MB"`` or a plain number.

    Raises:
        ValueError: `text` is not a positive size.
    """
    stripped = text.strip()
    number = stripped.rstrip("BbGgIiKkMm ")
    suffix = stripped[len(number) :].strip().upper()
    try:
        size = int(float(number) * _SUFFIXES[suffix])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"expected a size such as 250MiB or 1.5GiB, got {text!r}") from None
    if size <= 0:
        raise ValueError(f"a size must be positive, got {text!r}")
    return size


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return (N, H, V) of ``"1024,576,49152"``.

    Raises:
        ValueError: `text` is not three positive integers.
    """
    try:
        tokens, hidden, vocabulary = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected N,H,V (tokens, hidden size, vocabulary), got {text!r}") from None
    if min(tokens, hidden, vocabulary) <= 0:
        raise ValueError(f"N,H,V must be positive, got {text!r}")
    return tokens, hidden, vocabulary


# Module that a variant imports, and whether it needs CUDA. Not beside the functions: the parent must not import torch.
VARIANT_NEEDS: dict[str, tuple[str | None, bool]] = {
    "gemm4": (None, False),
    "plain": (None, False),
    "trl_full": ("trl", False),
    "trl_kernel": ("trl", False),
    "liger_chunked": ("liger_kernel", False),
    "liger_triton": ("liger_kernel", True),
    "sdft": (None, False),
    "sdft_tokens": (None, False),
    "sdft_torch": (None, False),
}
OURS = ("sdft", "sdft_tokens", "sdft_torch")


def why_absent(needs: tuple[str | None, bool], device: str) -> str | None:
    """Return why a variant with these needs (as in `VARIANT_NEEDS`) cannot run, or None; imports nothing."""
    module, needs_cuda = needs
    if needs_cuda and device == "cpu":
        return "needs CUDA"
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None


def parse_variant(text: str) -> str:
    """Return `text` if it names a variant of this package or has the form ``module:function``.

    Raises:
        ValueError: it is neither.
    """
    if text in VARIANT_NEEDS or re.fullmatch(r"[\w.]+:\w+", text):
        return text
    raise ValueError(
        f"unknown variant {text!r}: choose from {', '.join(VARIANT_NEEDS)}, or module:function of your own"
    )


# Relative error of the loss up to which a variant is timed. Losses computed from bf16-rounded logits are off by 0.2 %
# (log-softmax in fp32) to 3 % (in bf16) here; that is most libraries' choice, so it is timed, and its error shown.
GATE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs (`shape` is (N, H, V)) and the variants timed on it, each against ``gemm4``."""

    shape: tuple[int, int, int]
    dtype: str
    device: str
    variants: tuple[str, ...]
    memory_budgets: tuple[int | None, ...]
    repeats: int
    threads: int
    seed: int
    impl: str
    gate_tolerance: float | None = None

    @property
    def steps(self) -> int:
        """Steps of a progress bar: ready, memory, and one per repetition of each variant."""
        return 2 + (len(self.requests()) - 1) * (self.repeats + 2)

    def requests(self) -> list[Request]:
        """One request per variant; ours once per memory budget. ``gemm4`` comes first, asked for or not."""
        names = dict.fromkeys(("gemm4", *self.variants))
        return [
            Request(self, name, budget)
            for name in names
            for budget in (self.memory_budgets if name in OURS else (None,))
        ]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a worker is told: the case, the variant's name, and the memory budget in bytes (None: the op's default)."""

    case: Case
    variant: str
    memory_budget: int | None = None

    worker: ClassVar[str] = "sdft_kernels.cli._bench.worker"

    @property
    def repeats(self) -> int:
        """Pairs to measure."""
        return self.case.repeats

    @property
    def label(self) -> str:
        """The provider's name in tables and files: ``sdft@250MiB``, ``trl_kernel``."""
        return self.variant if self.memory_budget is None else f"{self.variant}@{self.memory_budget / MIB:g}MiB"

    @property
    def gate_tolerance(self) -> float:
        """The case's tolerance; by default `GATE_TOLERANCE`, and for this package's variants that of fp32 always."""
        if self.case.gate_tolerance is not None:
            return self.case.gate_tolerance
        return GATE_TOLERANCE["fp32" if self.variant in OURS else self.case.dtype]

    @property
    def is_ours(self) -> bool:
        """True for this package's variants and the floor: their failure fails the benchmark."""
        return self.variant == "gemm4" or self.variant in OURS

    def why_absent(self) -> str | None:
        """Return why this variant cannot run here, or None; imports nothing."""
        return why_absent(VARIANT_NEEDS.get(self.variant, (None, False)), self.case.device)

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Return the request that `to_json` wrote."""
        fields = json.loads(text)
        case = fields.pop("case")
        for name in ("shape", "variants", "memory_budgets"):
            case[name] = tuple(case[name])
        return cls(Case(**case), **fields)


def design_suite(device: str, threads: int, seed: int, impl: str, gate_tolerance: float | None) -> list[Case]:
    """The rows of the project's performance bars: a small and a large vocabulary in fp32, the small one in bf16.

    The large vocabulary leaves out the peers whose row kernels are the same at any vocabulary, to end within half an
    hour on two cores.
    """
    peers = ("plain", "trl_full", "trl_kernel", "liger_chunked", "liger_triton")
    small, large = (1024, 576, 49152), (512, 640, 262144)
    rows = [
        (small, "fp32", (*peers, "sdft_torch"), (250,), 5),
        (small, "fp32", ("sdft", "sdft_tokens"), (128, 64), 5),
        (large, "fp32", ("plain", "trl_kernel", "sdft_torch"), (512,), 3),
        (large, "fp32", ("sdft",), (256, 128), 5),
        (small, "bf16", ("plain", "trl_kernel", "liger_chunked", "liger_triton"), (None,), 3),
        (small, "bf16", ("sdft",), (128,), 9),
    ]
    return [
        Case(
            shape,
            dtype,
            device,
            variants,
            tuple(mib and mib * MIB for mib in budgets),
            repeats,
            threads,
            seed,
            impl,
            gate_tolerance,
        )
        for shape, dtype, variants, budgets, repeats in rows
    ]
