"""`Rows.affine_` by the CUDA kernel's own source, run on the host by `tests/emulator/divergence.cpp`."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sdft_kernels._rows import row_stride, whole_rows
from sdft_kernels.divergence import rows_native
from sdft_kernels.divergence.rows_native import _factors, _sealed, _table

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "emulator" / "divergence.cpp"
INCLUDE = ROOT / "csrc" / "include"
KINDS = {None: 0, torch.float32: 1, torch.float64: 1, torch.bfloat16: 2}  # `GradientKind`


@functools.cache
def library():
    """Compiled once for all processes of a test run; None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return None
    sources = b"".join(path.read_bytes() for path in (SOURCE, *sorted(INCLUDE.rglob("*.h"))))
    target = ROOT / "build" / f"emulated-{hashlib.sha256(sources).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", f"-I{INCLUDE}"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(draft)], check=True)
        draft.replace(target)
    return ctypes.CDLL(str(target))


@dataclass(frozen=True)
class EmulatedRows:
    """A cluster of `blocks` thread blocks of `threads` threads; the row in shared memory, or read twice."""

    blocks: int = 2
    threads: int = 32
    resident: bool = True

    row_stride = staticmethod(row_stride)
    scratch_bytes = staticmethod(rows_native.scratch_bytes)
    ROUNDS = True

    def affine_(
        self, student, teacher, target, weights, old_logprob, importance_clip, transforms, alpha, keep, tokens, loss,
        gradient_dtype,
    ):  # fmt: skip
        assert student.stride() == teacher.stride() and student.stride(0) % 16 == 0
        gradient = None if gradient_dtype is None else whole_rows(student, gradient_dtype)
        keep = None if keep is None else keep.view(torch.uint8)
        tensors = (student, teacher, target, keep, _table(weights, student), old_logprob, tokens, loss, gradient)
        pointers = (ctypes.c_void_p * 9)(*(None if x is None else x.data_ptr() for x in tensors))
        factors = [factor for transform in transforms for factor in _factors(transform)]
        numbers = (*factors, transforms[0].slope, -1.0 if alpha is None else alpha, importance_clip or 0.0)
        stride = 0 if gradient is None else gradient.stride(0)
        sizes = (
            *student.shape, student.stride(0), stride, KINDS[gradient_dtype], self.blocks, self.threads, self.resident
        )  # fmt: skip
        name = "emulated_affine_float" if student.dtype == torch.float32 else "emulated_affine_double"
        getattr(library(), name)((ctypes.c_double * 7)(*numbers), (ctypes.c_int64 * 8)(*map(int, sizes)), pointers)
        return None if gradient is None else _sealed(gradient, student.shape[1])
