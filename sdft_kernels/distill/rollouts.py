"""Completions to distill on: sampled with `generate`, taken from the data, or from any engine."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels.models.decode_linear import compiled_linears
from sdft_kernels.models.hidden import evaluation_mode, unwrap_peft
from sdft_kernels.models.rope import generation_batches, reset_rope
from sdft_kernels.models.shared_prefill import prefill_obstacle, prefilled_inputs

logger = logging.getLogger(__name__)

# Per prompt R token-id lists. An engine may return a pair: these, and sampling log-probabilities of the same shape.
Completions = list[list[list[int]]]
RolloutFunction = Callable[[list[list[int]], int], Completions | tuple[Completions, list[list[list[float]]]]]

KINDS = ("student", "teacher", "dataset", "given")
# What a model's generation config may forbid; the loss would give these tokens their probability all the same.
_FORBIDS_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# The keys of a call that say how its result is to be read.
_RESERVED = {
    "num_return_sequences": "num_generations",
    "return_dict_in_generate": "nothing (completions are lists of ids)",
    "input_ids": "prompts",
    "attention_mask": "prompts",
}


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

    They follow the distribution that the loss compares, softmax(logits / temperature), and what `generation_kwargs`
    makes of it: nothing of the model's generation config applies (it may hold `repetition_penalty`, `min_p`, lengths,
    beams, …), and it is left as it was. Where it forbids tokens (`suppress_tokens`, `begin_suppress_tokens`,
    `bad_words_ids`), a warning says once that rollouts do not.

    Args:
        model: a transformers model with `generate` (PEFT models too).
        prompts: token-id lists; batched with left padding and an attention mask.
        num_generations: completions per prompt, R.
        max_completion_length: tokens at most.
        eos_token_ids: a completion ends at the first of these, which it includes. Found by position: padding that
            repeats the end-of-sequence token is never mistaken for one.
        temperature: of sampling; 0 is greedy: one completion is computed, and copied R times.
        seed: of the sampling. The global random state is left as it was.
        batch_size: sequences generated at once; None is all of them.
        generation_kwargs: further arguments of `generate` (`top_p`, `top_k`, a `generation_config`, …), which win over
            the ones above.
        share_prefill: compute each prompt once for its R completions, where model and arguments allow it (a warning
            says why not, once). The distribution is the same; in fp32 nearly every completion is, token by token.

    Returns:
        Per prompt a list of R token-id lists.

    Raises:
        ValueError: no generation or a negative temperature; arguments in `generation_kwargs` that another argument
            stands for, or that `generate` refuses.
    """
    if not prompts:
        return []
    arguments = _arguments(num_generations, max_completion_length, eos_token_ids, temperature, generation_kwargs or {})
    repeats, ends = arguments["num_return_sequences"], _as_list(arguments["eos_token_id"])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding within a batch
    step = max(1, (batch_size or len(prompts) * repeats) // repeats)
    device = model.get_input_embeddings().weight.device
    results: Completions = [[] for _ in prompts]
    with evaluation_mode(model), _seeded(seed, device), compiled_linears(model), _own_settings(model, arguments):
        for rows in generation_batches(model, prompts, order, step, arguments["max_new_tokens"]):
            input_ids, attention_mask = _left_padded([prompts[i] for i in rows], arguments["pad_token_id"], device)
            output = _generate(model, input_ids, attention_mask, arguments, share_prefill)
            generated = output[:, input_ids.shape[1] :].tolist()
            for row, i in enumerate(rows):
                group = generated[row * repeats : (row + 1) * repeats] * (num_generations // repeats)
                results[i] = [cut_at_eos(ids, ends) for ids in group]
    return results


def _arguments(
    num_generations: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    temperature: float,
    generation_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Of `generate`, beside the prompts; `num_return_sequences` is 1 where all completions of a prompt are the same."""
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite, got {temperature}")
    arguments: dict[str, Any] = dict(
        max_new_tokens=max_completion_length,
        do_sample=temperature > 0,
        num_return_sequences=num_generations,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        use_cache=True,
    ) | _given(generation_kwargs)
    if arguments["do_sample"]:
        # transformers' own default narrows top_k to 50.
        arguments = dict(temperature=temperature, top_k=0, top_p=1.0) | arguments
    elif (arguments.get("num_beams") or 1) == 1:
        arguments["num_return_sequences"] = 1
    return arguments


def _given(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's arguments of `generate`, those of a generation config among them spelled out."""
    given = dict(generation_kwargs)
    config = given.pop("generation_config", None)
    own = {} if config is None else {k: v for k, v in vars(config).items() if v is not None and not k.startswith("_")}
    given = own | given
    for name, instead in _RESERVED.items():
        if given.get(name) is not None:
            raise ValueError(f"generation_kwargs holds {name}={given[name]!r}: use {instead} of generate_completions")
    return {name: value for name, value in given.items() if name not in _RESERVED}


@contextlib.contextmanager
def _own_settings(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `generate` finds no generation config but one of this call's length and token ids.

    `generate` takes from the model's whatever it is not given, also where it is given None, and what is None has no
    neutral value that could be given. A PEFT wrapper hands the one that it finds to the model inside.
    """
    owners: list[Any] = [module for module in model.modules() if vars(module).get("generation_config") is not None]
    saved = [owner.generation_config for owner in owners]
    forbidden = {n for n in _FORBIDS_TOKENS for c in saved if getattr(c, n, None) and arguments.get(n) is None}
    if forbidden:
        _warn_once(
            f"the generation config of this {type(unwrap_peft(model)).__name__} sets {', '.join(sorted(forbidden))}: "
            "off in rollouts, since the loss is over the whole vocabulary; pass them in generation_kwargs to keep them"
        )
    if owners:
        from transformers import GenerationConfig

        names = ("max_new_tokens", "eos_token_id", "pad_token_id", "use_cache")
        blank = GenerationConfig(**{name: arguments[name] for name in names})
    for owner in owners:
        owner.generation_config = blank
    try:
        yield
    finally:
        for owner, config in zip(owners, saved, strict=True):
            owner.generation_config = config


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
    result = _as_list(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    eos = getattr(tokenizer, "eos_token_id", None)
    return result if eos is None or eos in result else [eos, *result]


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])


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
