"""Completions to distill on: sampled with `generate`, taken from the data, or from any engine."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels.models.decode_linear import compiled_linears
from sdft_kernels.models.hidden import evaluation_mode
from sdft_kernels.models.rope import generation_batches, reset_rope
from sdft_kernels.models.shared_prefill import prefill_obstacle, prefilled_inputs

logger = logging.getLogger(__name__)

# Per prompt R token-id lists. An engine may return a pair: these, and sampling log-probabilities of the same shape.
Completions = list[list[list[int]]]
RolloutFunction = Callable[[list[list[int]], int], Completions | tuple[Completions, list[list[list[float]]]]]

KINDS = ("student", "teacher", "dataset", "given")


def check_kind(rollouts: str | RolloutFunction) -> None:
    """Raise ValueError unless `rollouts` is one of `KINDS` or a callable."""
    if not callable(rollouts) and rollouts not in KINDS:
        raise ValueError(f"rollouts must be one of {KINDS} or a callable (prompts, n) -> completions, got {rollouts!r}")


@torch.no_grad()
def generate_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num_generations: int = 1,
    *,
    max_completion_length: int = 256,
    eos_token_ids: Sequence[int] = (),
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    share_prefill: bool = True,
) -> Completions:
    """Sample completions with the model's own `generate`, in eval mode (restored), from a random state of its own.

    Args:
        model: a transformers model with `generate` (PEFT models too).
        prompts: token-id lists; batched with left padding and an attention mask.
        num_generations: completions per prompt, R.
        max_completion_length: tokens at most.
        eos_token_ids: a completion ends at the first of these, which it includes. Found by position: padding that
            repeats the end-of-sequence token is never mistaken for one.
        temperature: of sampling; 0 is greedy.
        seed: of the sampling. The global random state is left as it was.
        batch_size: sequences generated at once; None is all of them.
        generation_kwargs: further arguments of `generate` (`top_p`, `top_k`, …).
        share_prefill: compute each prompt once for its R completions, where model and arguments allow it (a warning
            says why not, once). The distribution is the same; in fp32 nearly every completion is, token by token.

    Returns:
        Per prompt a list of R token-id lists.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding within a batch
    step = max(1, (batch_size or len(prompts) * num_generations) // num_generations)
    device = model.get_input_embeddings().weight.device
    arguments: dict[str, Any] = dict(
        max_new_tokens=max_completion_length,
        do_sample=temperature > 0,
        num_return_sequences=num_generations,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        use_cache=True,
    )
    if temperature > 0:
        # top_k=0 and top_p=1: the model's own distribution, not the one its generation_config narrows (top_k is 50 by
        # default), since the loss compares whole distributions.
        arguments |= dict(temperature=temperature, top_k=0, top_p=1.0)
    arguments |= generation_kwargs or {}
    results: Completions = [[] for _ in prompts]
    with evaluation_mode(model), _seeded(seed, device), compiled_linears(model):
        for rows in generation_batches(model, prompts, order, step, arguments["max_new_tokens"]):
            input_ids, attention_mask = _left_padded([prompts[i] for i in rows], arguments["pad_token_id"], device)
            output = _generate(model, input_ids, attention_mask, arguments, share_prefill)
            generated = output[:, input_ids.shape[1] :].tolist()
            for row, i in enumerate(rows):
                group = generated[row * num_generations : (row + 1) * num_generations]
                results[i] = [cut_at_eos(ids, eos_token_ids) for ids in group]
    return results


def _generate(model: Any, input_ids: Tensor, attention_mask: Tensor, arguments: dict[str, Any], share: bool) -> Tensor:
    """(B * R, T + new) int64, the R samples of a prompt one after the other."""
    reset_rope(model)
    repeats, tokens = arguments["num_return_sequences"], input_ids.shape[1]
    # A prompt of one token has nothing before its last one.
    if share and repeats > 1 and tokens > 1:
        obstacle = prefill_obstacle(model, tokens, arguments)
        if obstacle is None:
            inputs = prefilled_inputs(model, input_ids, attention_mask, repeats)
            output: Tensor = model.generate(**inputs, **(arguments | {"num_return_sequences": 1}))
            return output
        _warn_once(f"each prompt is computed {repeats} times, once per completion: {obstacle}")
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
    return output


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def cut_at_eos(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """`ids` up to and including the first end-of-sequence token; all of them where there is none."""
    ends = set(eos_token_ids)
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids)) + 1]


def call_rollouts(
    function: RolloutFunction, prompts: list[list[int]], num_generations: int
) -> tuple[Completions, list[list[list[float]]] | None]:
    """Completions and sampling log-probabilities (or None) of a caller's engine.

    Raises:
        ValueError: not one list of completions per prompt.
    """
    result = function(prompts, num_generations)
    completions, logprobs = result if isinstance(result, tuple) else (result, None)
    if len(completions) != len(prompts):
        raise ValueError(f"rollouts returned completions for {len(completions)} prompts, expected {len(prompts)}")
    return completions, logprobs


def stop_token_ids(model: nn.Module, tokenizer: Any = None) -> list[int]:
    """Every token id that ends a completion: the model's generation config's, and the tokenizer's end of sequence."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    result = [ids] if isinstance(ids, int) else list(ids or [])
    eos = getattr(tokenizer, "eos_token_id", None)
    return result if eos is None or eos in result else [eos, *result]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators seeded inside, restored outside (`generate` takes no generator)."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _left_padded(prompts: list[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask, (B, T) int64 each, prompts flush right so that generation continues them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.int64)
    return ids.to(device), mask.to(device)
