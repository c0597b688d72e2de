"""``python -m benchmarks.numerics``: error of dX, dW and the KL values against fp64, beside the libraries installed.

bf16 inputs, logits up to 40, the teacher as far from the student as a mean KL says: from SDFT's normal state (1e-3 to
0.03) to models apart. The committed table is `benchmarks/data/numerics.csv`; `--markdown` prints it for the README.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from sdft_kernels import linear_divergence, linear_divergence_loss
from sdft_kernels._dispatch import resolve
from sdft_kernels._gemm import Gemm
from sdft_kernels.cli._bench.report import commit
from sdft_kernels.cli._progress import Progress
from sdft_kernels.cli._table import print_table
from sdft_kernels.cli.env import package_version
from sdft_kernels.divergence.driver import rows_of
from sdft_kernels.testing import DivergenceInputs, make_divergence_inputs, relative_error

TABLE = Path(__file__).resolve().parent / "data" / "numerics.csv"
SHAPE = (2048, 128, 4096)  # N, H, V
MEAN_KLS = (1e-4, 1e-3, 0.03, 0.2)
LARGEST_LOGIT = 40.0
CHUNKS = 8
GRADIENT_BAR = 0.004
KL_BARS = {1e-4: 0.01, 0.03: 0.0002}

# Per-token KLs, or None where a library returns only their mean; and the mean.
Values = tuple[Tensor | None, Tensor]


@dataclass(frozen=True)
class Row:
    """One loss at one distance; errors are relative to fp64, in the 2-norm. A field that a loss does not have is ''."""

    variant: str
    mean_kl: float  # asked for
    measured_mean_kl: float
    largest_logit: float
    grad_input_error: float
    grad_weight_error: float
    kl_error: float | str  # of the vector of per-token KLs
    mean_kl_error: float
    tokens: int
    hidden: int
    vocabulary: int
    chunks: int | str  # of tokens; '' where the loss chooses
    device: str
    torch_version: str
    variant_version: str
    commit: str


def make_inputs(shape: tuple[int, int, int], mean_kl: float, seed: int = 0) -> DivergenceInputs:
    """bf16 inputs whose mean KL(p_t || p_s) is within a few percent of `mean_kl`; two heads, as an EMA teacher has."""
    tokens, hidden, vocabulary = shape
    x = make_divergence_inputs("nearer", tokens, vocabulary, hidden, dtype=torch.float64, seed=seed)
    state = x.student_input * (LARGEST_LOGIT / (x.student_input @ x.student_weight.t()).abs().max())
    g = torch.Generator().manual_seed(seed + 1)
    noise, head_noise = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (state, x.student_weight))

    def at(gap: float) -> DivergenceInputs:
        teacher = dict(
            teacher_input=state + gap * noise, teacher_weight=x.student_weight + 0.02 * gap / hidden**0.5 * head_noise
        )
        return x.replace(student_input=state, target=None, **teacher).to(torch.bfloat16)

    gap = (mean_kl * 2) ** 0.5 / 4
    for _ in range(6):  # a KL grows with the square of the gap
        gap *= (mean_kl / _exact_kl(at(gap), slice(0, 512)).mean().item()) ** 0.5
    return at(gap)


def _wide(x: DivergenceInputs, rows: slice) -> DivergenceInputs:
    part = x.replace(student_input=x.student_input[rows], teacher_input=x.teacher_input[rows])
    return part.to(torch.float64)


@torch.no_grad()
def _exact_kl(x: DivergenceInputs, rows: slice) -> Tensor:
    return linear_divergence(**_wide(x, rows).tensors(), impl="reference").kl_teacher_student


def truth(x: DivergenceInputs) -> dict[str, Tensor]:
    """fp64 by the reference implementation, 256 tokens at a time."""
    count = x.student_input.shape[0]
    kl, grad_input, grad_weight = [], [], torch.zeros_like(x.student_weight, dtype=torch.float64)
    for start in range(0, count, 256):
        part = _wide(x, slice(start, start + 256)).tensors()
        leaves = [part[name].requires_grad_() for name in ("student_input", "student_weight")]
        value = linear_divergence(**part, impl="reference").kl_teacher_student
        (value.sum() / count).backward()
        kl.append(value.detach())
        grad_input.append(leaves[0].grad)
        grad_weight += leaves[1].grad
    return {"kl": torch.cat(kl), "grad_input": torch.cat(grad_input), "grad_weight": grad_weight}


def chunk_budget(x: DivergenceInputs, chunks: int = CHUNKS) -> int:
    """A memory budget that cuts the call into this many chunks."""
    count, hidden = x.student_input.shape
    vocabulary, device = x.student_weight.shape[0], x.student_input.device
    impl = resolve("auto", device=device)
    rows, gemm = rows_of(impl), Gemm(torch.bfloat16, torch.float32, native=impl == "native")
    copied = 0 if rows.ROUNDS else gemm.bytes_per_logit(device)
    per_token = rows.row_stride(vocabulary) * (8 + copied) + 24 * hidden
    fixed = gemm.scratch_bytes(device, x.student_weight) + rows.scratch_bytes(count, vocabulary, 4)
    return fixed + -(-count // chunks) * per_token


def sdft(x: DivergenceInputs) -> Values:
    """This package: `linear_divergence_loss`."""
    loss, tokens = linear_divergence_loss(**x.tensors(), memory_budget=chunk_budget(x))
    loss.backward()
    return tokens.kl_teacher_student, loss


def plain(x: DivergenceInputs) -> Values:
    """PyTorch: logits by bf16 products, softmax and divergence in fp32."""
    with torch.no_grad():
        teacher = (x.teacher_input @ x.teacher_weight.t()).float().log_softmax(-1)
    student = (x.student_input @ x.student_weight.t()).float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    kl.mean().backward()
    return kl, kl.mean()


def trl_kernel(x: DivergenceInputs) -> Values:
    """TRL's `ChunkedDivergenceFunction`."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(
        x.student_input, x.student_weight, None, x.teacher_input, x.teacher_weight, None, 0.0
    )
    kl.mean().backward()
    return kl, kl.mean()


def liger_chunked(x: DivergenceInputs) -> Values:
    """Liger's `LigerFusedLinearJSDLoss`, not compiled, its hard loss weighted 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    count = x.student_input.shape[0]
    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=-(-count // CHUNKS))
    labels = torch.zeros(count, dtype=torch.long, device=x.student_input.device)
    loss = module(x.student_input, x.student_weight, x.teacher_input, x.teacher_weight, labels)
    loss.backward()
    return None, loss


def liger_triton(x: DivergenceInputs) -> Values:
    """Liger's `LigerFusedLinearJSD`."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)(x.student_input, x.student_weight, x.teacher_input, x.teacher_weight)
    loss.backward()
    return None, loss


def fla(x: DivergenceInputs) -> Values:
    """flash-linear-attention's `fused_kl_div_loss`."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    loss = fused_kl_div_loss(x.student_input, x.teacher_input, x.student_weight, x.teacher_weight)
    loss.backward()
    return None, loss


@dataclass(frozen=True)
class Variant:
    run: Callable[[DivergenceInputs], Values]
    title: str
    module: str | None = None  # what it imports
    distribution: str = "torch"
    cuda: bool = False
    chunks: int | None = None  # None: its own choice, or whole

    def why_absent(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda and device == "cpu":
            return "needs CUDA"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


VARIANTS = {
    "sdft": Variant(sdft, "**`linear_divergence_loss`**", distribution="sdft-kernels", chunks=CHUNKS),
    "plain": Variant(plain, "PyTorch, bf16 logits"),
    "trl_kernel": Variant(trl_kernel, "TRL `ChunkedDivergenceFunction`", "trl", "trl"),
    "liger_chunked": Variant(
        liger_chunked, "Liger `LigerFusedLinearJSDLoss`", "liger_kernel", "liger-kernel", chunks=CHUNKS
    ),
    "liger_triton": Variant(liger_triton, "Liger `LigerFusedLinearJSD`", "liger_kernel", "liger-kernel", cuda=True),
    "fla": Variant(fla, "FLA `fused_kl_div_loss`", "fla", "flash-linear-attention", cuda=True),
}


def measure_one(name: str, x: DivergenceInputs, exact: dict[str, Tensor], mean_kl: float, source: str) -> Row:
    """Run one variant on fresh leaves and compare; `source` is the commit."""
    variant = VARIANTS[name]
    leaves = x.to(torch.bfloat16)
    for tensor in (leaves.student_input, leaves.student_weight):
        tensor.requires_grad_()
    kl, mean = variant.run(leaves)
    grads = [t.grad.cpu() for t in (leaves.student_input, leaves.student_weight)]
    count, hidden = x.student_input.shape
    device = x.student_input.device
    return Row(
        variant=name,
        mean_kl=mean_kl,
        measured_mean_kl=_short(exact["kl"].mean().item()),
        largest_logit=_short((x.student_input.float() @ x.student_weight.float().t()).abs().max().item()),
        grad_input_error=_short(relative_error(grads[0], exact["grad_input"])),
        grad_weight_error=_short(relative_error(grads[1], exact["grad_weight"])),
        kl_error="" if kl is None else _short(relative_error(kl.cpu(), exact["kl"])),
        mean_kl_error=_short(relative_error(mean.cpu(), exact["kl"].mean())),
        tokens=count,
        hidden=hidden,
        vocabulary=x.student_weight.shape[0],
        chunks="" if variant.chunks is None else variant.chunks,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch_version=torch.__version__,
        variant_version=package_version(variant.distribution) or "",
        commit=source,
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def measure(
    shape: tuple[int, int, int] = SHAPE,
    mean_kls: Sequence[float] = MEAN_KLS,
    variants: Sequence[str] = tuple(VARIANTS),
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Every variant that can run here, at every distance."""
    here = [name for name in variants if VARIANTS[name].why_absent(device) is None]
    rows, source = [], commit()
    for mean_kl in mean_kls:
        x = make_inputs(shape, mean_kl)
        exact = truth(x)
        moved = x.to(torch.bfloat16, device)
        for name in here:
            rows.append(measure_one(name, moved, exact, mean_kl, source))
            if progress is not None:
                progress.step(f"{name} at {mean_kl:g}")
    return rows


def failures(rows: Sequence[Row]) -> list[str]:
    """What of this package's rows does not meet the project's bars."""
    said = []
    for row in rows:
        if row.variant != "sdft":
            continue
        limits = dict(grad_input_error=GRADIENT_BAR, grad_weight_error=GRADIENT_BAR)
        limits["kl_error"] = KL_BARS.get(row.mean_kl, max(KL_BARS.values()))
        for name, limit in limits.items():
            if not float(getattr(row, name)) <= limit:  # NaN is a failure
                said.append(f"mean KL {row.mean_kl:g}: {name} is {getattr(row, name)}, at most {limit} allowed")
    return said


def write_table(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_table(path: Path = TABLE) -> list[Row]:
    """The rows of a table, numbers as numbers."""
    numbers = {f.name: int if f.type == "int" else float for f in fields(Row) if f.type in ("int", "float")}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [Row(**{k: numbers.get(k, str)(v) for k, v in line.items()}) for line in csv.DictReader(file)]
    kept = [(row, float(row.kl_error) if row.kl_error else "", int(row.chunks) if row.chunks else "") for row in rows]
    return [replace(row, kl_error=kl_error, chunks=chunks) for row, kl_error, chunks in kept]


def percent(value: float | str) -> str:
    """Two significant digits, whole percents at the least."""
    if not isinstance(value, float):
        return "–"
    digits = max(0, 1 - math.floor(math.log10(100 * value))) if 0 < value < math.inf else 0
    return f"{100 * value:.{digits}f} %"


def markdown(rows: Sequence[Row]) -> str:
    """The README's table: a line for each loss; dX, dW, per-token KL at each distance."""
    kls = sorted({row.mean_kl for row in rows})
    lines = [f"| error of dX · dW · KLs at a mean KL of | {' | '.join(f'{kl:g}' for kl in kls)} |"]
    lines.append("|---" * (len(kls) + 1) + "|")
    for name in dict.fromkeys(row.variant for row in rows):
        by_kl = {row.mean_kl: row for row in rows if row.variant == name}
        cells = []
        for kl in kls:
            row = by_kl[kl]
            cells.append(" · ".join(map(percent, (row.grad_input_error, row.grad_weight_error, row.kl_error))))
        version = next(iter(by_kl.values())).variant_version
        title = VARIANTS[name].title + ("" if name == "sdft" else f" ({VARIANTS[name].distribution} {version})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(rows: Sequence[Row], device: str) -> None:
    """The same on a terminal, with what was skipped and why."""
    columns = ("variant", "mean KL", "dX error", "dW error", "KL error", "mean KL error")
    body = [
        (row.variant, f"{row.measured_mean_kl:g}")
        + tuple(map(percent, (row.grad_input_error, row.grad_weight_error, row.kl_error, row.mean_kl_error)))
        for row in rows
    ]
    first = rows[0]
    title = f"N={first.tokens} H={first.hidden} V={first.vocabulary} bf16, {CHUNKS} chunks, {first.device}"
    print_table(title, columns, body)
    for name, variant in VARIANTS.items():
        why = variant.why_absent(device)
        if why is not None:
            print(f"{name} skipped: {why}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="CSV", help=f"write the rows here (committed: {TABLE.name})")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print a table as Markdown")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    if args.markdown:
        print(markdown(read_table(args.output or TABLE)))
        return 0
    here = [name for name, variant in VARIANTS.items() if variant.why_absent(args.device) is None]
    with Progress(len(here) * len(MEAN_KLS), "numerics") as progress:
        rows = measure(device=args.device, progress=progress)
    show(rows, args.device)
    if args.output is not None:
        write_table(args.output, rows)
    for line in failures(rows):
        print(f"numerics: {line}", file=sys.stderr)
    return int(bool(failures(rows)))


if __name__ == "__main__":
    sys.exit(main())
