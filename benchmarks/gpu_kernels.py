"""``python -m benchmarks.gpu_kernels``: every row kernel in every mode once, on a few tokens, for compute-sanitizer.

Each call is compared with the fp64 reference. Exit status: 0 all agree · 1 one does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from sdft_kernels import AffineTokenLoss, TokenDivergence
from sdft_kernels.testing import make_divergence_inputs, relative_error, run_divergence_loss

TOKENS = 5
HIDDEN = 16
# One for each line of the table of launch parameters; none a multiple of 16, so that rows are padded.
VOCABULARIES = (203, 2049, 17_003)
LIMIT = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.01,
}  # a race or a stray write is off by more; accuracy is tested elsewhere


def _callable(tokens: TokenDivergence, index: torch.Tensor) -> torch.Tensor:
    return tokens.kl_teacher_student + 0.5 * tokens.jsd + 0.1 * tokens.student_entropy


def modes() -> dict[str, dict[str, Any]]:
    """Options of `linear_divergence_loss` that between them run every branch of the kernels."""
    everything = AffineTokenLoss(
        kl_teacher_student=1.0,
        kl_student_teacher=0.5,
        jsd=0.7,
        student_logprob=-0.1,
        student_entropy=0.1,
        alpha=0.3,
    )
    capped = {"student_softcap": 20.0, "teacher_softcap": 30.0, "temperature": 0.8}
    return {
        "forward KL": {},
        "everything": {"token_loss": everything, "pack": False, **capped},
        "callable": {"token_loss": _callable, "jsd_alpha": 0.5, "pack": False},
    }


def run(impl: str, device: str) -> list[str]:
    """Print a line for each call, and return those of the calls that are off."""
    wrong = []
    for vocabulary in VOCABULARIES:
        for dtype, limit in LIMIT.items():
            x = make_divergence_inputs("flat", TOKENS, vocabulary, HIDDEN, dtype=dtype, device=device, mask=True)
            for name, options in modes().items():
                if name == "callable" and (impl, device) == ("native", "cuda"):
                    continue  # has no kernel for it, and says so
                actual = run_divergence_loss(x, impl, **options)
                truth = run_divergence_loss(x.to(torch.float64), "reference", **options)
                errors = {key: relative_error(value, truth[key]) for key, value in actual.items()}
                worst = max(errors, key=lambda key: errors[key])
                ok = errors[worst] <= limit  # False for NaN
                where = f"{impl} V={vocabulary} {str(dtype).removeprefix('torch.')} {name}"
                line = f"{where}: {worst} off by {errors[worst]:.1e}"
                print(line + ("" if ok else f", more than {limit:g}"))
                wrong += [] if ok else [line]
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument(
        "--impl", nargs="+", choices=("torch", "triton", "native"), default=["triton"], help="default triton"
    )
    args = parser.parse_args(argv)
    wrong = [line for impl in args.impl for line in run(impl, args.device)]
    print(f"{len(wrong)} calls are wrong" if wrong else "all calls agree with fp64")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
