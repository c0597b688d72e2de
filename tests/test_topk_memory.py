"""Peak memory of op 2 through the public call in a child process, with a negative control that must be over."""

import json
import subprocess
import sys

import pytest

N, V, H, K = 2048, 32_768, 64, 50
FULL = N * V * 4  # 256 MiB: one fp32 tensor of all logits

pytestmark = pytest.mark.slow  # a process each

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from sdft_kernels.topk_divergence import linear_topk_divergence
n, v, h, k, budget = map(int, sys.argv[1:6])
dtype, support, tail, impl = getattr(torch, sys.argv[6]), *sys.argv[7:10]
# Not ru_maxrss, which starts at the peak of the process that ran this one.
from sdft_kernels.cli._bench.worker import peak_resident_bytes as peak
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
hs, ht, ws, wt = draw(n, h), draw(n, h), draw(v, h), draw(v, h)
def step(hs, ws, ht, wt):
    hs, ws = hs.detach().requires_grad_(), ws.detach().requires_grad_()
    mode = dict(support=support, k=k)
    if support == "given":
        mode = dict(support=(torch.arange(len(hs))[:, None] * 7 + torch.arange(k)) % len(ws))
    d = linear_topk_divergence(hs, ws, ht, wt, **mode, tail=tail, memory_budget=budget, impl=impl).divergence
    d.sum().backward()
step(hs[:4], ws[:512], ht[:4], wt[:512])  # libraries, thread pools
# Gradients, the fp32 accumulator, ids and the entries' gradient (and its product with the upstream one) are outside the
# budget.
held = [torch.zeros_like(hs), torch.zeros(ws.shape)] + [torch.zeros(n, 2 * k) for _ in range(6)]
if dtype != torch.float32: held.append(torch.zeros_like(ws))
del held
before = peak()
step(hs, ws, ht, wt)
print(json.dumps(peak() - before))
"""


def extra(support, tail, budget, dtype="float32", impl="torch"):
    """Bytes of the peak beyond inputs, outputs, gradients and one fp32 accumulator."""
    command = [sys.executable, "-c", CHILD, *map(str, (N, V, H, K, budget)), dtype, support, tail, impl]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("support", "tail", "dtype"),
    [
        ("student", "renormalize", "float32"),
        ("given", "renormalize", "float32"),
        ("union", "bucket", "float32"),
        ("student", "bucket", "bfloat16"),
    ],
)
def test_peak_memory_obeys_the_budget(support, tail, dtype):
    budget = 64 << 20
    used = extra(support, tail, budget, dtype)
    assert used < budget + (8 << 20) < FULL  # the allocator's own slack


def test_negative_control_full_logits_are_over():
    assert extra("student", "renormalize", 64 << 20, impl="reference") > 2 * FULL
