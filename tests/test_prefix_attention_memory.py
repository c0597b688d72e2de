"""Op 4 holds no (T, T) tensor and repeats no key: counted by operator, and as the peak of a process. Controls fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from counting import LargestTensor

from sdft_kernels.prefix_attention import PrefixTree, shared_prefix_attention

P, R, L, HEADS, SIZE = 1500, 16, 20, 2, 16
T = P + R * L
LARGEST_INPUT = T * HEADS * SIZE
REPEATED = R * P * HEADS * SIZE

procfs = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's procfs")


@pytest.fixture(autouse=True)
def one_thread():
    """With more, the compiled backward has gradients of keys and values for parts of its work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def largest(attend, **options):
    """Elements of the largest tensor of forward and backward."""
    tree = PrefixTree([P, *[L] * R], [-1, *[0] * R])
    leaves = [torch.randn(T, HEADS, SIZE).requires_grad_() for _ in range(3)]
    with LargestTensor() as mode:
        attend(*leaves, tree, **options).sum().backward()
    return mode.numel


def with_repeated_keys(query, key, value, tree):
    """Attention of the completions as a batch, each with its own copy of the prompt."""
    batch = [torch.cat([x[:P].expand(R, P, HEADS, SIZE), x[P:].view(R, L, HEADS, SIZE)], 1) for x in (key, value)]
    rows = query[P:].view(R, L, HEADS, SIZE).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(rows, *(x.transpose(1, 2) for x in batch))


@pytest.mark.parametrize("options", [{}, {"window": 700}, {"softcap": 3.0}, {"window": 50}], ids=str)
@pytest.mark.parametrize("impl", ["auto", "composition"])
def test_largest_tensor(impl, options):
    block = HEADS * 128 * 512  # `part_dense`'s, or a mask of BAND_ROWS rows
    both = 2 * LARGEST_INPUT  # the compiled backward's, of keys and values
    assert largest(shared_prefix_attention, impl=impl, **options) <= max(both, block, 128 * (700 + 128))


def test_controls_are_over():
    assert largest(shared_prefix_attention, impl="reference") >= T * T
    assert largest(with_repeated_keys) >= REPEATED > 4 * LARGEST_INPUT


CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from sdft_kernels.prefix_attention import PrefixTree, shared_prefix_attention
p, r, l, impl, dtype = *map(int, sys.argv[1:4]), sys.argv[4], getattr(torch, sys.argv[5])
def peak():  # not ru_maxrss, which starts at what the parent holds
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
def repeated(q, k, v, tree):
    rows = q[p:].view(r, l, *q.shape[1:]).transpose(1, 2)
    both = [torch.cat([x[:p].expand(r, *x[:p].shape), x[p:].view(r, l, *x.shape[1:])], 1) for x in (k, v)]
    return torch.nn.functional.scaled_dot_product_attention(rows, *(x.transpose(1, 2) for x in both))
def attend(q, k, v, tree):
    return repeated(q, k, v, tree) if impl == "repeated" else shared_prefix_attention(q, k, v, tree, impl=impl)
def step(p, r, l):
    tree = PrefixTree([p] + [l] * r, [-1] + [0] * r)
    q, k, v = (torch.randn(tree.tokens, 4, 64, dtype=dtype).requires_grad_() for _ in range(3))
    return lambda: attend(q, k, v, tree).sum().backward()
if impl != "repeated": step(8, 2, 4)()
run = step(p, r, l)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at what is held now
before = peak()
run()
print(json.dumps(peak() - before))
"""


def extra(impl, dtype="float32"):
    """Bytes of the peak of forward and backward beyond the inputs, for P = 3000 and 32 completions of 16."""
    command = [sys.executable, "-c", CHILD, "3000", "32", "16", impl, dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@procfs
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "composition"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype, impl):
    tensor = 3512 * 4 * 64 * 4  # one of query, key, value, output or a gradient, in fp32: 3.4 MiB
    # Output, three gradients, delta's products, a part's three gradients, for bf16 a part's five fp32 copies; slack.
    assert extra(impl, dtype) < 13 * tensor + (8 << 20)


@procfs
@pytest.mark.slow
def test_peak_memory_controls_are_over():
    assert extra("repeated") > 32 * 3000 * 4 * 64 * 4 * 2
    assert extra("reference") > 4 * 3512 * 3512 * 4
