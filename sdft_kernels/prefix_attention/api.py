"""The contract of op 4: arguments, checks, and which implementation runs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import FLOAT_DTYPES, check_positive, check_tensors, operand_dtype
from . import composition, fused_native
from .call import Options
from .operators import SharedPrefixAttentionFunction
from .parts import Scoring
from .planner import TILES
from .reference import shared_prefix_attention_reference
from .tree import PrefixTree

IMPLEMENTATIONS = ("auto", "reference", "composition", "native", "triton")
MAX_HEAD_SIZE = TILES[-1][0]


def shared_prefix_attention(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hkv, D)
    value: Tensor,  # (T, Hkv, D)
    tree: PrefixTree,
    *,
    prefix_kv: tuple[Tensor, Tensor] | None = None,  # (P, Hkv, D) each
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,  # (Hq,)
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a prefix tree: a token sees its segment's ancestors and, causally, its own segment.

    Logits are softcap(scale * q.k), then masked. No key or value is repeated or copied per sequence. Given the same
    bits of query, key and value along a segment's path, its output has the same bits whatever the other segments are.
    Memory beyond inputs, outputs and gradients: on CPU buffers for the gradients of key and value, as few as keep the
    threads busy and at most four times the query, and for bf16 all operands in fp32; of the composition one segment's
    output, for bf16 the gradients, in fp32, and copies of operands that are views with gaps.

    Args:
        query: (T, Hq, D), fp32, bf16 or fp64; T packed tokens in the tree's order, D up to 256. Differentiable. Under
            autocast all three are rounded to its dtype.
        key, value: (T, Hkv, D), Hkv a divisor of Hq; query heads ``i * Hq // Hkv`` on share key head i. Differentiable.
        tree: the segments, ``tree.tokens == T``. It may hold its tensors on any device.
        prefix_kv: key and value of P tokens that stand before every root, of one layer, as a cache keeps them: every
            token sees them, within its window. They get no gradient. Positions count from the first of them, which
            only `window` notices; a cache that holds but the last ``window - 1`` of them gives the same result.
        scale: of the products; None is ``D ** -0.5``.
        softcap: cap * tanh(logit / cap) before masking (Gemma 2).
        window: number of keys a token sees, its own included, as in transformers; None is all.
        sinks: (Hq,) a logit per head that joins the denominator only (gpt-oss). Differentiable.
        return_lse: also return the log-sum-exp.
        impl: ``"triton"`` (fused kernels: bf16 on CUDA), ``"native"`` (fused, compiled: fp32 and bf16 on CPU, D a
            multiple of 16), ``"composition"`` (a call for each segment and ancestor), ``"reference"`` (materialises
            (Hq, T, P + T)), or ``"auto"``: the first that can run, and while `torch.compile` traces the composition.

    Returns:
        (T, Hq, D) in the query's dtype; with `return_lse` also the (T, Hq) natural logarithm of the denominator, sink
        included, in fp32 (fp64 for fp64), differentiable too (the composition's gradient takes plain blocks: slower).

    Raises:
        ValueError: an argument that does not fit; the message names it, its value and what was expected.
        RuntimeError: an `impl` that cannot run; the message says why.

    Derived in the op's README.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    cached = _check_cached(prefix_kv)
    _check(query, key, value, tree, cached, sinks)
    check_positive({"scale": scale, "softcap": softcap})
    if window is not None:
        if not isinstance(window, int):
            raise ValueError(f"window must be an integer, got {window!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
        window = min(window, tree.tokens + (cached[0].shape[0] if cached else 0) + 1)  # kernels take 32 bits
    operand = operand_dtype(query)
    query, key, value, *cached = (_rows(x, operand) for x in (query, key, value, *cached))
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else float(scale), softcap)
    if impl == "reference":
        out, lse = shared_prefix_attention_reference(
            query, key, value, tree, prefix_kv=(cached[0], cached[1]) if cached else None, scale=scoring.scale,
            softcap=softcap, window=window, sinks=sinks,
        )  # fmt: skip
    else:
        out, lse = SharedPrefixAttentionFunction.apply(
            query, key, value, sinks, *(cached or (None, None)), Options(tree, scoring, window), _kernels(impl, query)
        )
    return (out, lse) if return_lse else out


def _kernels(impl: str, query: Tensor) -> ModuleType:
    """Who computes: by name, or for "auto" the fused kernels of the device, where they can; else the composition.

    `torch.compile` traces the composition whole but not the launches, so while it traces "auto" is the former.
    """
    fused = {"cpu": "native", "cuda": "triton"}.get(query.device.type)
    name = fused if impl == "auto" else impl
    if name in (None, "composition") or (impl == "auto" and torch.compiler.is_compiling()):
        return composition
    why = _dispatch.why_not(name, "shared_prefix_attention", query.device, query.dtype)
    if why is None and name == "native":
        why = fused_native.why_not(query.shape[-1])
    if why is None:
        return _module(name)
    if impl == "auto":
        return composition
    raise RuntimeError(f"shared_prefix_attention(impl={impl!r}) cannot run: {why}; use impl='auto'")


def _module(name: str) -> ModuleType:
    if name == "native":
        return fused_native
    from . import fused_triton

    return fused_triton


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels read any strides but the last."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_cached(prefix_kv: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Cached key and value, or nothing."""
    if prefix_kv is None:
        return []
    if not isinstance(prefix_kv, tuple | list) or len(prefix_kv) != 2:
        raise ValueError(f"prefix_kv must be a pair (key, value), got {type(prefix_kv).__name__}")
    for name, tensor in zip(("key", "value"), prefix_kv, strict=True):
        check_tensors({f"prefix_kv's {name}": tensor})
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"prefix_kv's {name} requires grad, but a cached prefix gets none: detach it, or pack it")
    return list(prefix_kv)


def _check(
    query: Tensor, key: Tensor, value: Tensor, tree: PrefixTree, cached: list[Tensor], sinks: Tensor | None
) -> None:
    """Shapes, dtypes and devices."""
    check_tensors({"query": query, "key": key, "value": value} | ({} if sinks is None else {"sinks": sinks}))
    if not isinstance(tree, PrefixTree):
        raise ValueError(f"tree must be a PrefixTree, got {type(tree).__name__}")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be (tokens, heads, head size), got {tuple(tensor.shape)}")
    tokens, heads, size = query.shape
    if tokens != tree.tokens:
        raise ValueError(f"query holds {tokens} tokens but the tree {tree.tokens}")
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"query must have a head size of 1 to {MAX_HEAD_SIZE}, got {size}")
    if heads == 0:
        raise ValueError("query must have at least one head, got 0")
    key_heads = key.shape[1]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key must have a number of heads that divides the query's {heads}, got {key_heads}")
    named: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "key": (key, (tokens, key_heads, size)),
        "value": (value, (tokens, key_heads, size)),
    }
    if cached:
        cached_shape = (cached[0].shape[0] if cached[0].dim() else 0, key_heads, size)
        named |= {"prefix_kv's key": (cached[0], cached_shape), "prefix_kv's value": (cached[1], cached_shape)}
    if sinks is not None:
        named["sinks"] = (sinks, (heads,))
    for name, (tensor, shape) in named.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")
    _check_dtypes(query, {name: tensor for name, (tensor, _) in named.items()})


def _check_dtypes(query: Tensor, others: dict[str, Tensor]) -> None:
    """fp32, bf16 or fp64; outside autocast all the same, but for the sinks."""
    autocast = torch.is_autocast_enabled(query.device.type)
    for name, tensor in {"query": query, **others}.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be fp32, bf16 or fp64, got {tensor.dtype}")
        if not autocast and tensor.dtype != query.dtype and name != "sinks":
            raise ValueError(f"{name} is {tensor.dtype} but query is {query.dtype}: cast one, or use autocast")
