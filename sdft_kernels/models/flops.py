"""FLOPs of one distillation step, predicted from the configuration: with prompts computed once, and repeated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sdft_kernels.models.attention_hook import has_window

# A prompt's length P, and those of its completions, in tokens.
Group = tuple[int, Sequence[int]]

# Multiples of the forward pass that forward and backward take together. Each matrix product has two in the backward
# pass. Attention has two in the forward pass and five in the backward one, which recomputes the probabilities.
_BODY_AND_BACKWARD = 3.0
_ATTENTION_AND_BACKWARD = 3.5

# Products of the head, in G = 2*N*V*H: both logits, dH and dW; without a teacher its logits go.
_HEAD_WITH_TEACHER, _HEAD_ALONE = 4, 3


class PassFlops(NamedTuple):
    """Cost of one way to compute a step, or a pass.

    Attributes:
        tokens: that go through the layers, student's and teacher's.
        body: FLOPs of the layers' matrix products.
        attention: FLOPs of scores and weighted sums, over visible (query, key) pairs only.
        head: FLOPs of the head's products.
    """

    tokens: int
    body: float
    attention: float
    head: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of all three."""
        return self.body + self.attention + self.head


class StepFlops(NamedTuple):
    """Cost of a step with every prompt computed once (or read from a cache), and with every sequence computed whole."""

    shared: PassFlops
    repeated: PassFlops

    @property
    def ratio(self) -> float:
        """FLOPs repeated over FLOPs shared: the predicted speed-up. 1.0 where there is nothing to share."""
        return self.repeated.total / self.shared.total if self.shared.total else 1.0


def step_flops(
    config: Any,
    groups: Sequence[Group],
    *,
    teacher_groups: Sequence[Group] | None = None,
    teacher_cached: bool | Sequence[bool] = False,
    gradient: bool = True,
    checkpointing: bool = False,
) -> StepFlops:
    """Predict the cost of one step: a student's pass, a teacher's forward pass, and the head's products. No generation.

    Of a completion of L tokens L - 1 are fed, since the last one predicts nothing; an empty one runs nothing. Equal
    beginnings of completions, or of different prompts, count each time. Norms, rotations and softmaxes do not count.
    Exact for decoders as Llama's: query, key, value, output, and gated layers (three matrices), or a mixture of such.

    Args:
        config: a transformers text configuration: sizes, experts and windows are read from it.
        groups: (P, lengths of its completions) for each prompt of the student.
        teacher_groups: the same with the teacher's prompts, its model having the same configuration; None: no teacher.
        teacher_cached: whether the keys and values of the teacher's prompts, but of their last token, are in a cache;
            one bool, or one for each of `teacher_groups`.
        gradient: the student's pass has a backward pass through all weights; False: forward passes and logits only.
        checkpointing: the student's layers run forward once more in the backward pass.

    Raises:
        ValueError: a prompt of no token with a completion; `teacher_cached` of another length than `teacher_groups`.
    """
    cached = _flags(teacher_cached, len(teacher_groups or ()))
    again = float(gradient and checkpointing)
    body = (_BODY_AND_BACKWARD if gradient else 1.0) + again
    attention = (_ATTENTION_AND_BACKWARD if gradient else 1.0) + again
    teacher = teacher_groups is not None
    products = (_HEAD_WITH_TEACHER if teacher else _HEAD_ALONE) if gradient else 1 + teacher
    predicted = sum(sum(completions) for _, completions in groups)
    head = products * 2.0 * predicted * config.vocab_size * config.hidden_size

    def cost(split: bool) -> PassFlops:
        student = _forward(config, _alone(groups) if split else groups)
        others = [] if teacher_groups is None else list(teacher_groups)
        other = _forward(config, _alone(others)) if split else _forward(config, others, cached)
        return PassFlops(
            tokens=student.tokens + other.tokens,
            body=body * student.body + other.body,
            attention=attention * student.attention + other.attention,
            head=head,
        )

    return StepFlops(shared=cost(split=False), repeated=cost(split=True))


def visible_pairs(start: int, stop: int, window: int | None = None) -> int:
    """(query, key) pairs of the tokens at positions `start` to ``stop - 1``, each seeing `window` keys at most."""
    edge = stop if window is None else min(max(start, window), stop)  # from here on a token sees `window` keys
    causal = (start + 1 + edge) * (edge - start) // 2
    return causal + (stop - edge) * (window or 0)


def body_flops_per_token(config: Any) -> float:
    """FLOPs of all layers' matrix products for one token, forward."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = _head_size(config)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = hidden * size * (2 * heads + 2 * key_heads)
    return 2.0 * sum(projections + _feed_forward(config, layer) for layer in range(config.num_hidden_layers))


def _forward(config: Any, groups: Sequence[Group], cached: Iterable[bool] | None = None) -> PassFlops:
    """Forward pass of the layers, each prompt once; of a cached prompt only its last token runs."""
    layers = range(config.num_hidden_layers)
    windows = [config.sliding_window if has_window(config, layer) else None for layer in layers]
    tokens = pairs = 0
    for (prompt, completions), skip in zip(groups, cached or [False] * len(groups), strict=True):
        fed = [length - 1 for length in completions if length]
        if not fed:
            continue
        if prompt < 1:
            raise ValueError(f"a prompt must have a token, got one of {prompt} with completions of {list(completions)}")
        first = prompt - 1 if skip else 0
        spans = [(first, prompt), *((prompt, prompt + length) for length in fed)]
        tokens += sum(stop - start for start, stop in spans)
        pairs += sum(visible_pairs(*span, window) for span in spans for window in windows)
    per_pair = 4.0 * config.num_attention_heads * _head_size(config)
    return PassFlops(tokens, tokens * body_flops_per_token(config), pairs * per_pair)


def _alone(groups: Sequence[Group]) -> list[Group]:
    """Each completion with a prompt of its own."""
    return [(prompt, (length,)) for prompt, completions in groups for length in completions]


def _flags(cached: bool | Sequence[bool], count: int) -> list[bool]:
    flags = [cached] * count if isinstance(cached, bool) else list(cached)
    if len(flags) != count:
        raise ValueError(f"teacher_cached must be one bool, or one per teacher group ({count}), got {len(flags)}")
    return flags


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _feed_forward(config: Any, layer: int) -> int:
    """Multiplications per token in one layer's feed-forward part."""
    hidden = config.hidden_size
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    sparse_step = getattr(config, "decoder_sparse_step", 1) or 1
    dense = layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % sparse_step
    if not experts or dense:
        return 3 * hidden * int(config.intermediate_size)
    width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    shared = int(getattr(config, "shared_expert_intermediate_size", None) or 0)
    return hidden * int(experts) + 3 * hidden * (config.num_experts_per_tok * width + shared)
