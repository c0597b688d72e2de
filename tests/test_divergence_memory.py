"""Peak memory of the public call in a child process, with a negative control that must be over."""

import json
import subprocess
import sys

import pytest

N, V, H = 2048, 32_768, 64
FULL = N * V * 4  # 256 MiB: one fp32 tensor of all logits

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from sdft_kernels import linear_divergence, linear_divergence_loss
what, n, v, h, budget, dtype = sys.argv[1], *map(int, sys.argv[2:6]), getattr(torch, sys.argv[6])
# Not ru_maxrss, which starts at the peak of the process that ran this one.
from sdft_kernels.cli._bench.worker import peak_resident_bytes as peak
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
hs, ht, ws, wt = draw(n, h), draw(n, h), draw(v, h), draw(v, h)
def step(hs, ws, ht, wt):
    hs, ws = hs.detach().requires_grad_(), ws.detach().requires_grad_()
    if what == "tokens":
        out = linear_divergence(hs, ws, ht, wt, memory_budget=budget)
        (out.kl_teacher_student + out.student_entropy).sum().backward()
    elif what == "callable":
        loss = lambda t, i: t.kl_teacher_student
        linear_divergence_loss(hs, ws, ht, wt, memory_budget=budget, token_loss=loss)[0].backward()
    else:
        impl = "reference" if what == "reference" else "torch"
        linear_divergence_loss(hs, ws, ht, wt, memory_budget=budget, impl=impl)[0].backward()
    return hs.grad, ws.grad
step(hs[:4], ws[:512], ht[:4], wt[:512])          # libraries, thread pools
held = [torch.zeros_like(hs), torch.zeros(ws.shape)]   # gradients and the fp32 accumulator are outside the budget
if dtype != torch.float32: held.append(torch.zeros_like(ws))
del held
before = peak()
step(hs, ws, ht, wt)
print(json.dumps(peak() - before))
"""


def extra(what, budget, dtype="float32"):
    """Bytes of the peak beyond inputs, gradients and one fp32 accumulator."""
    command = [sys.executable, "-c", CHILD, what, *map(str, (N, V, H, budget)), dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("what", ("loss", "tokens", "callable"))
@pytest.mark.parametrize("budget", (32, 96))
def test_peak_memory_obeys_the_budget(what, budget):
    used = extra(what, budget << 20)
    assert used < (budget + 8) << 20  # the allocator's own slack
    assert used < FULL


def test_bf16_never_casts_the_head_whole():
    assert extra("loss", 64 << 20, "bfloat16") < (64 + 8) << 20


def test_negative_control_full_logits_are_over():
    assert extra("reference", 32 << 20) > 2 * FULL
