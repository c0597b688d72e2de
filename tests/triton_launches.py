"""Launch every Triton kernel without a GPU: all that Triton does but the launch itself, compiled for sm_90.

Run as a process of its own (elsewhere in the suite kernels are interpreted); prints how often each was compiled.
"""

import json
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sdft_kernels._head import IDENTITY, Transform
from sdft_kernels.divergence import rows_triton
from sdft_kernels.divergence.fields import DIFFERENTIABLE

CAPPED = (Transform(1.2, 20.0, 1.5), Transform(1.0, 30.0, 1.5))


class NoDevice:
    """What Triton asks its driver for before a launch."""

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(launched):
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append([self.__name__, kernel.metadata.num_warps, kernel.metadata.maxnreg])
        return kernel

    return warm_up


def tile(count, vocabulary):
    return torch.zeros(count, rows_triton.row_stride(vocabulary))[:, :vocabulary]


def forward_kl(count, vocabulary):
    """The default loss in bf16, its weights one element off 16-byte alignment."""
    weights = {"kl_teacher_student": torch.ones(count + 1)[1:]}
    rows_triton.affine_(
        tile(count, vocabulary), tile(count, vocabulary), None, weights, None, None, (IDENTITY, IDENTITY), None, None,
        torch.zeros(8, count), torch.zeros(count), torch.bfloat16,
    )  # fmt: skip


def everything(count, vocabulary):
    a, b = tile(count, vocabulary), tile(count, vocabulary)
    tokens, target, keep = torch.zeros(8, count), torch.zeros(count, dtype=torch.int64), torch.ones(count).bool()
    weights = {name: torch.ones(count) for name in DIFFERENTIABLE}
    rows_triton.affine_(
        a, b, target, weights, torch.zeros(count), 2.0, CAPPED, 0.3, keep, tokens, torch.zeros(count), torch.float32
    )
    state = rows_triton.divergence_stats(a, b, target, CAPPED, 0.3, keep, tokens)
    rows_triton.divergence_grad_(a, b, state, target, weights, CAPPED, 0.3, keep, torch.bfloat16)
    rows_triton.partial_statistics(a, b, target, CAPPED, keep)
    rows_triton.mixture_sums(a, b, state, CAPPED, 0.3, keep)


if __name__ == "__main__":
    launched = []
    driver.set_active(NoDevice())
    JITFunction.run = compile_only(launched)
    for vocabulary in (1001, 32003, 151936):
        for count in (1, 3, 16, 17):
            forward_kl(count, vocabulary)
    lengths = {str(call[1:]) for call in launched}
    compiled = len(rows_triton.affine_kernel.device_caches[0][0])
    everything(5, 1001)
    print(json.dumps({"launched": Counter(c[0] for c in launched), "lengths": len(lengths), "compiled": compiled}))
