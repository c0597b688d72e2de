"""Op 4 on CUDA: the fused Triton kernels, flash-attn's where installed, PyTorch's, and plain blocks.

Written without one.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import make_case, run

from sdft_kernels.prefix_attention import PrefixTree, part_flash
from sdft_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
OPTIONS = {
    "plain": {},
    "sinks and cached prefix": {"sinks": True, "prefix": 77},
    "window": {"window": 100},
    "softcap": {"softcap": 3.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 64), ((8, 2), 128), ((4, 1), 256), ((2, 1), 80)])
@pytest.mark.parametrize("kernels", ["flash-attn", "torch", "triton"])
def test_error_budget(kernels, heads, size, options, dtype, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(part_flash, "_flash_attn", lambda: None)
    elif kernels == "triton" and dtype == torch.float32:
        pytest.skip("on CUDA the fused kernels are bf16 only")
    elif kernels == "flash-attn" and part_flash._flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    tree = PrefixTree([300, 40, 0, 1, 70, 150], [-1, 0, 0, 0, 1, -1])
    narrow = make_case(tree, heads, size, **options).to(dtype).to(DEVICE)
    grad = torch.randn_like(narrow.query)
    truth, eager = run(narrow.to(torch.float64), "alone", grad), run(narrow, "alone", grad)
    for name, value in run(narrow, "triton" if kernels == "triton" else "composition", grad).items():
        if name != "grad_sinks":  # cancels: luck
            assert_within_budget(value, eager[name], truth[name], name=name)


@pytest.mark.parametrize(
    ("impl", "names"),
    [("composition", ("out", "lse")), ("triton", ("out", "lse", "grad_query", "grad_key", "grad_value"))],
)
def test_same_bits_twice(impl, names):
    case = make_case(PrefixTree([300, 40, 70], [-1, 0, 0]), (8, 2), 64).to(torch.bfloat16).to(DEVICE)
    grad = torch.randn_like(case.query)
    first, second = run(case, impl, grad), run(case, impl, grad)
    assert all(torch.equal(first[name], second[name]) for name in names)
