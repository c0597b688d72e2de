"""Peak memory of op 3 through the public call in a child process, with a negative control that must be over."""

import json
import subprocess
import sys

import pytest

N, V, H = 2048, 32_768, 64
FULL = N * V * 4  # 256 MiB: one fp32 tensor of all logits

pytestmark = pytest.mark.slow  # a process each

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from sdft_kernels.token_logprob import linear_token_logprob
n, v, h, budget, dtype, impl = *map(int, sys.argv[1:5]), getattr(torch, sys.argv[5]), sys.argv[6]
# Not ru_maxrss, which starts at the peak of the process that ran this one.
from sdft_kernels.cli._bench.worker import peak_resident_bytes as peak
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
x, w, y = draw(n, h), draw(v, h), torch.randint(512, (n,), generator=g)
def step(x, w, y):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    tokens = linear_token_logprob(x, w, y, memory_budget=budget, impl=impl)
    (tokens.logprob + tokens.entropy).sum().backward()
step(x[:4], w[:512], y[:4])  # libraries, thread pools
held = [torch.zeros_like(x), torch.zeros(w.shape)]  # gradients and the fp32 accumulator are outside the budget
if dtype != torch.float32: held.append(torch.zeros_like(w))
del held
before = peak()
step(x, w, y)
print(json.dumps(peak() - before))
"""


def extra(budget, dtype="float32", impl="torch"):
    """Bytes of the peak beyond inputs, gradients and one fp32 accumulator."""
    command = [sys.executable, "-c", CHILD, *map(str, (N, V, H, budget)), dtype, impl]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("budget", "dtype"), [(16, "float32"), (64, "float32"), (64, "bfloat16")])
def test_peak_memory_obeys_the_budget(budget, dtype):
    used = extra(budget << 20, dtype)
    assert used < (budget + 8) << 20  # the allocator's own slack
    assert used < FULL


def test_negative_control_full_logits_are_over():
    assert extra(16 << 20, impl="reference") > 2 * FULL
