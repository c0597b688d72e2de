"""Op 4: every bad argument is refused with its name, its value and what was expected."""

from __future__ import annotations

import pytest
import torch

from sdft_kernels.prefix_attention import PrefixTree, shared_prefix_attention

TREE = PrefixTree([3, 2], [-1, 0])


def arguments(**changes):
    base = {
        "query": torch.zeros(5, 4, 8),
        "key": torch.zeros(5, 2, 8),
        "value": torch.zeros(5, 2, 8),
        "tree": TREE,
    }
    return base | changes


def cached(*shape, dtype=torch.float32, **options):
    return torch.zeros(shape, dtype=dtype, **options)


BAD = {
    "query not a tensor": ({"query": [1.0]}, "query must be a tensor, got list"),
    "sinks not a tensor": ({"sinks": 0.5}, "sinks must be a tensor, got float"),
    "tree": ({"tree": [3, 2]}, "tree must be a PrefixTree, got list"),
    "query dimensions": ({"query": torch.zeros(5, 32)}, r"query must be \(tokens, heads, head size\), got \(5, 32\)"),
    "key dimensions": ({"key": torch.zeros(1, 5, 2, 8)}, r"key must be \(tokens, heads, head size\)"),
    "tokens": ({"tree": PrefixTree([3, 3], [-1, 0])}, "query holds 5 tokens but the tree 6"),
    "key tokens": ({"key": torch.zeros(4, 2, 8)}, r"key must be \(5, 2, 8\), got \(4, 2, 8\)"),
    "key size": ({"key": torch.zeros(5, 2, 9)}, r"key must be \(5, 2, 8\), got \(5, 2, 9\)"),
    "value": ({"value": torch.zeros(5, 4, 8)}, r"value must be \(5, 2, 8\), got \(5, 4, 8\)"),
    "head size": (
        {name: torch.zeros(5, 2, 257) for name in ("query", "key", "value")},
        "query must have a head size of 1 to 256, got 257",
    ),
    "heads": ({"key": torch.zeros(5, 3, 8)}, "key must have a number of heads that divides the query's 4, got 3"),
    "no heads": ({"query": torch.zeros(5, 0, 8)}, "query must have at least one head, got 0"),
    "no key heads": ({"key": torch.zeros(5, 0, 8)}, "divides the query's 4, got 0"),
    "fp16": ({"query": torch.zeros(5, 4, 8).half()}, "must be fp32, bf16 or fp64, got torch.float16"),
    "integers": ({"query": torch.zeros(5, 4, 8).long()}, "query must be fp32, bf16 or fp64, got torch.int64"),
    "dtypes": ({"value": torch.zeros(5, 2, 8).double()}, "value is torch.float64 but query is torch.float32: cast one"),
    "device": ({"key": torch.zeros(5, 2, 8, device="meta")}, "key is on meta but query is on cpu"),
    "sinks": ({"sinks": torch.zeros(2)}, r"sinks must be \(4,\), got \(2,\)"),
    "sinks dtype": ({"sinks": torch.zeros(4).half()}, "sinks must be fp32, bf16 or fp64, got torch.float16"),
    "window 0": ({"window": 0}, r"window must be at least 1 \(a token sees itself\), got 0"),
    "window -1": ({"window": -1}, "window must be at least 1"),
    "window float": ({"window": 2.5}, "window must be an integer, got 2.5"),
    "scale": ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    "softcap": ({"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
    "impl": (
        {"impl": "torch"},
        r"impl must be one of \('auto', 'reference', 'composition', 'native', 'triton'\), got 'torch'",
    ),
    "prefix_kv": ({"prefix_kv": torch.zeros(2, 7, 2, 8)}, r"prefix_kv must be a pair \(key, value\), got Tensor"),
    "prefix_kv's length": ({"prefix_kv": (cached(7, 2, 8),)}, "prefix_kv must be a pair"),
    "prefix_kv not tensors": ({"prefix_kv": (1, 2)}, "prefix_kv's key must be a tensor, got int"),
    "prefix_kv heads": ({"prefix_kv": (cached(7, 4, 8),) * 2}, r"prefix_kv's key must be \(7, 2, 8\), got \(7, 4, 8\)"),
    "prefix_kv tokens": (
        {"prefix_kv": (cached(7, 2, 8), cached(6, 2, 8))},
        r"prefix_kv's value must be \(7, 2, 8\), got \(6, 2, 8\)",
    ),
    "prefix_kv scalar": ({"prefix_kv": (cached(), cached())}, r"prefix_kv's key must be \(0, 2, 8\), got \(\)"),
    "prefix_kv dtype": (
        {"prefix_kv": (cached(7, 2, 8, dtype=torch.bfloat16),) * 2},
        "prefix_kv's key is torch.bfloat16 but query is torch.float32",
    ),
    "prefix_kv grad": (
        {"prefix_kv": (cached(7, 2, 8), cached(7, 2, 8, requires_grad=True))},
        "prefix_kv's value requires grad, but a cached prefix gets none: detach it, or pack it",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**arguments(**changes))


def test_the_arguments_are_good_without_the_changes():
    assert shared_prefix_attention(**arguments()).shape == (5, 4, 8)


def test_a_cached_prefix_may_require_grad_where_none_is_taken():
    prefix = (cached(7, 2, 8, requires_grad=True),) * 2
    with torch.no_grad():
        out = shared_prefix_attention(**arguments(prefix_kv=prefix))
    assert out.equal(shared_prefix_attention(**arguments(prefix_kv=tuple(t.detach() for t in prefix))))


def test_sinks_may_be_fp32_beside_bf16():
    narrow = {name: torch.zeros(5, 2, 8, dtype=torch.bfloat16) for name in ("query", "key", "value")}
    sinks = torch.zeros(2, requires_grad=True)
    out = shared_prefix_attention(**arguments(**narrow), sinks=sinks)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert sinks.grad.dtype == torch.float32
