"""Workloads of `bench attention`: one layer over a prompt and its completions, prompt once or with every completion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft_kernels.cli._bench.prefix_case import FLOOR, AttentionCase


class AttentionWorkload:
    """Query, key and value of one case, in the layout of one variant, forward and backward.

    All variants hold the same numbers: packed ``(P + R*L, heads, D)`` for ``shared``, ``(R, heads, P + L, D)`` for
    sequences whole, where every sequence has a copy of the prompt's.
    """

    def __init__(self, case: AttentionCase, variant: str, dtype: torch.dtype) -> None:
        from sdft_kernels.prefix_attention import PrefixTree

        self.case, self.variant = case, variant
        self.tree = PrefixTree([case.prompt] + [case.tokens] * case.completions, [-1] + [0] * case.completions)
        self.packed = variant == "shared"
        rounded = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
        generator = torch.Generator().manual_seed(case.seed)
        self.leaves = []
        for heads in (case.heads, case.key_heads, case.key_heads, case.heads):  # query, key, value, upstream gradient
            rows = (
                torch.randn(self.tree.tokens, heads, case.head_size, generator=generator, dtype=torch.float32)
                .to(rounded)
                .to(dtype)
            )
            self.leaves.append(self._layout(rows).to(case.device).contiguous())
        self.upstream = self.leaves.pop()
        if not self.packed:
            # A prompt that is copied R times gets the gradient of one: together they are the gradient of the tree.
            self.upstream[..., : case.prompt, :] /= case.completions
        for leaf in self.leaves:
            leaf.requires_grad_()

    def run(self) -> None:
        """Forward and backward."""
        self.output().backward(self.upstream)

    def output(self) -> Tensor:
        """In the variant's layout."""
        query, key, value = self.leaves
        if self.packed:
            from sdft_kernels import shared_prefix_attention

            output = shared_prefix_attention(query, key, value, self.tree, impl=self.case.impl)
            assert isinstance(output, Tensor)
            return output
        if self.variant == "flash_attn":
            from flash_attn import flash_attn_func

            result: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)
            return result.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape != key.shape)

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def allocate_gradients(self) -> None:
        """Allocate the gradients and touch every page."""
        for leaf in self.leaves:
            leaf.grad = torch.ones_like(leaf)

    def results(self) -> dict[str, Tensor]:
        """Output and gradients over the tree, whatever the layout, to compare variants by."""
        self.clear()
        output = self.output()
        output.backward(self.upstream)
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        shared = {"output": self._over_tree(output.detach(), total=False)}
        names = ("query_gradient", "key_gradient", "value_gradient")
        return shared | {name: self._over_tree(g, total=True) for name, g in zip(names, grads, strict=True)}

    def predictions(self) -> dict[str, float]:
        """(query, key) pairs, as FLOPs forward and backward, and the ratio of repeated to this variant's."""
        from sdft_kernels.models.flops import visible_pairs

        case, whole = self.case, self.case.prompt + self.case.tokens
        repeated = case.completions * visible_pairs(0, whole)
        own = visible_pairs(0, case.prompt) + case.completions * visible_pairs(case.prompt, whole)
        pairs = own if self.packed else repeated
        gflop = 3.5 * 4e-9 * case.heads * case.head_size * pairs
        return {"predicted_speedup": repeated / pairs, "predicted_attention_gflop": gflop}

    def _layout(self, rows: Tensor) -> Tensor:
        if self.packed:
            return rows
        return torch.stack([rows[self.tree.rows(i)] for i in range(self.case.completions)]).transpose(1, 2)

    def _over_tree(self, tensor: Tensor, *, total: bool) -> Tensor:
        """(T, heads, D) fp64; of the prompt's copies their `total`, or the first."""
        if self.packed:
            return tensor.double().cpu()
        copies = tensor.transpose(1, 2).double().cpu()  # (R, P + L, heads, D)
        prompt = copies[:, : self.case.prompt]
        return torch.cat([prompt.sum(0) if total else prompt[0], copies[:, self.case.prompt :].flatten(0, 1)])


def build(case: AttentionCase, variant: str, *, exact: bool = False) -> AttentionWorkload:
    """The workload of a variant; `exact`: the floor's, in fp64, on the same rounded inputs."""
    if exact:
        return AttentionWorkload(case, FLOOR, torch.float64)
    return AttentionWorkload(case, variant, {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype])
