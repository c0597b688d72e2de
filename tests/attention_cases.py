"""Trees, inputs and an oracle of shared-prefix attention that knows nothing of packing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdft_kernels.prefix_attention import PrefixTree, shared_prefix_attention

# (lengths, parents). Depth 1 to 3; 1, 2 and 8 completions; suffixes of 0 and 1 tokens; several groups; any order.
TREES = {
    "one": ([37], [-1]),
    "prompt and completion": ([30, 9], [-1, 0]),
    "two completions": ([33, 1, 17], [-1, 0, 0]),
    "eight completions": ([40, 5, 0, 9, 1, 12, 5, 0, 3], [-1, *[0] * 8]),
    "two groups": ([21, 40, 7, 3, 1, 8], [-1, -1, 0, 0, 1, 1]),
    "depth 3": ([20, 11, 5, 6, 0, 9, 1, 4], [-1, 0, 0, 1, 1, 2, 4, 2]),
    "depth first": ([12, 6, 3, 5, 4, 10, 2], [-1, 0, 1, 1, 0, -1, 5]),
    "empty root": ([0, 7, 5], [-1, 0, 0]),
}


@dataclass
class Case:
    """Inputs of one call, in fp64, and what is asked of it."""

    tree: PrefixTree
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None = None
    prefix_kv: tuple[Tensor, Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # scale, softcap, window

    def to(self, to: torch.dtype | torch.device) -> Case:
        """Rounded to a dtype (then widen with another `to` for the truth), or on a device."""
        prefix_kv = self.prefix_kv and (self.prefix_kv[0].to(to), self.prefix_kv[1].to(to))
        sinks = None if self.sinks is None else self.sinks.to(to)
        return Case(self.tree, self.query.to(to), self.key.to(to), self.value.to(to), sinks, prefix_kv, self.options)


def make_case(
    tree: PrefixTree,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    prefix: int = 0,
    sinks: bool = False,
    sharpness: float = 1.0,
    **options: Any,
) -> Case:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    query_heads, key_heads = heads
    tokens = tree.tokens
    return Case(
        tree,
        sharpness * draw(tokens, query_heads, size),
        draw(tokens, key_heads, size),
        draw(tokens, key_heads, size),
        draw(query_heads) if sinks else None,
        (draw(prefix, key_heads, size), draw(prefix, key_heads, size)) if prefix else None,
        options,
    )


def attend_alone(case: Case) -> tuple[Tensor, Tensor]:
    """Output and LSE with each segment's sequence unpacked and attended on its own, in the case's dtype throughout."""
    tree, group, device = case.tree, case.query.shape[1] // case.key.shape[1], case.query.device
    out, lse = 0 * case.query, 0 * case.query[..., 0]
    for segment, path in enumerate(tree.paths):
        if not tree.lengths[segment]:
            continue
        spans = [torch.arange(tree.offsets[i], tree.offsets[i + 1], device=device) for i in path]
        key, value = case.key[torch.cat(spans)], case.value[torch.cat(spans)]
        if case.prefix_kv is not None:
            key, value = torch.cat([case.prefix_kv[0], key]), torch.cat([case.prefix_kv[1], value])
        results = _last_rows(case.query[spans[-1]], *(x.repeat_interleave(group, 1) for x in (key, value)), case)
        out, lse = out.index_copy(0, spans[-1], results[0]), lse.index_copy(0, spans[-1], results[1])
    return out, lse


def _last_rows(query: Tensor, key: Tensor, value: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The last rows of one sequence's causal attention."""
    options = case.options
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * (options.get("scale") or query.shape[-1] ** -0.5)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    length, count = scores.shape[-2:]
    ages = torch.arange(count, device=query.device)
    age = ages[count - length :, None] - ages
    seen = (age >= 0) & (age < (options.get("window") or count))
    scores = scores.masked_fill(~seen, -torch.inf)
    if case.sinks is not None:
        scores = torch.cat([scores, case.sinks[:, None, None].expand(-1, length, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :count]
    return (weights @ value.transpose(0, 1)).transpose(0, 1), scores.logsumexp(-1).t()


def run(case: Case, impl: str, grad: Tensor, grad_lse: Tensor | None = None) -> dict[str, Tensor]:
    """Output, LSE and every gradient; impl "alone" is `attend_alone`."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name in ("query", "key", "value", "sinks")
        if (tensor := getattr(case, name)) is not None
    }
    own = Case(case.tree, **({"sinks": None} | leaves), prefix_kv=case.prefix_kv, options=case.options)
    if impl == "alone":
        out, lse = attend_alone(own)
    else:
        out, lse = shared_prefix_attention(
            own.query,
            own.key,
            own.value,
            case.tree,
            prefix_kv=case.prefix_kv,
            sinks=own.sinks,
            return_lse=True,
            impl=impl,
            **case.options,
        )
    loss = (out * grad.to(out)).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.to(lse)).sum()
    loss.backward()
    grads = {
        f"grad_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return {"out": out.detach(), "lse": lse.detach()} | grads
