"""The forward passes of student and teacher: prefixes that completions share are computed once where that saves any."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels.distill.batch import TokenIds
from sdft_kernels.distill.teacher import Teacher
from sdft_kernels.models import completion_hidden_states, enable_shared_prefix, packed_hidden_states
from sdft_kernels.models.attention_hook import CannotShareError
from sdft_kernels.models.dropout import attention_drops
from sdft_kernels.models.flops import Group, step_flops
from sdft_kernels.models.hidden import unwrap_peft
from sdft_kernels.models.shared_prefix import PassCounts
from sdft_kernels.prefix_attention import PrefixCache, prefix_tree

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 2**30
# Of the tokens. Where there is less to share, sequences side by side in a padded batch are as fast and simpler.
LEAST_SAVED = 0.1
SEPARATELY = "prefixes are computed once per completion: %s"
UNCHANGING = ("frozen", "model")  # kinds of teachers whose keys and values stay right from step to step


class Passes:
    """Hidden states of completions under student and teacher, and what sharing prefixes saved.

    Args:
        model: the student.
        teacher: runs inside its own `active()`.
        share_prefix: True shares and raises where a model cannot; None shares where it can and says why not; False
            runs every sequence separately.
        prefix_cache: of the teacher's prompts: a `PrefixCache`, its bytes, or None: 1 GiB where the teacher does not
            change (kinds "frozen" and "model"), else none.
        token_budget: tokens per forward pass.

    Raises:
        ValueError, NotImplementedError: from `enable_shared_prefix`, with share_prefix=True; a cache without sharing.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        share_prefix: bool | None,
        prefix_cache: PrefixCache | int | None,
        token_budget: int,
    ) -> None:
        if share_prefix is False and prefix_cache:
            raise ValueError("prefix_cache needs shared prefixes: leave it out, or share_prefix=False")
        self.model, self.teacher, self.token_budget = model, teacher, token_budget
        self.required = share_prefix is True
        self.shares = enable_sharing((model, teacher.model), share_prefix)
        if prefix_cache is None:
            prefix_cache = DEFAULT_CACHE_BYTES if teacher.kind in UNCHANGING else 0
        kept = PrefixCache(prefix_cache) if isinstance(prefix_cache, int) else prefix_cache
        self.cache = kept if self.shares and kept.budget_bytes else None
        self.counts = PassCounts()
        self._groups: dict[str, list[Group]] = {}

    def student_states(self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> Tensor:
        """(N, H) hidden states that predict the completions, packed; prompts stand once per completion."""
        return self._states("student", self.model, prompts, completions, None)

    def teacher_states(self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> Tensor:
        """The same under the teacher, without gradients."""
        with self.teacher.active() as model:
            return self._states("teacher", model, prompts, completions, self.cache)

    def weights_changed(self) -> None:
        """The teacher may have other weights now: forget what the old ones computed."""
        if self.teacher.kind not in UNCHANGING:
            self.weights_loaded()

    def weights_loaded(self) -> None:
        """The teacher's state was restored, whatever its kind: forget what was computed before."""
        if self.cache is not None:
            self.cache.invalidate()

    def take_metrics(self, device: torch.device) -> dict[str, Tensor]:
        """Of the passes since the last call: tokens computed and saved, the predicted speed-up over separate sequences
        (`step_flops`: layers, attention, head; no generation), and the cache's hits and size in MiB."""
        counts, self.counts = self.counts, PassCounts()
        numbers: dict[str, float] = {
            "tokens_computed": counts.computed,
            "tokens_saved": counts.separate - counts.computed,
        }
        speedup = self._predicted_speedup(counts)
        if speedup is not None:
            numbers["predicted_speedup"] = speedup
        if self.cache is not None:
            numbers |= {"prefix_cache_hits": counts.hits, "prefix_cache_mib": self.cache.statistics.bytes / 2**20}
        return {name: torch.tensor(float(value), dtype=torch.float32, device=device) for name, value in numbers.items()}

    def _predicted_speedup(self, counts: PassCounts) -> float | None:
        groups, self._groups = self._groups, {}
        if "student" not in groups:
            return None
        teacher = groups.get("teacher")
        found = bool(teacher) and counts.hits == len(teacher or ())
        config = unwrap_peft(self.model).config
        gradient = torch.is_grad_enabled()
        try:
            return step_flops(
                config, groups["student"], teacher_groups=teacher, teacher_cached=found, gradient=gradient
            ).ratio
        except (AttributeError, TypeError):  # a configuration that does not say what the layers are made of
            return None

    def _states(
        self,
        side: str,
        model: nn.Module,
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
        cache: PrefixCache | None,
    ) -> Tensor:
        separate = sum(len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True) if len(c))
        packs, cache = self._way(model, prompts, completions, cache)
        if not packs:
            self._groups[side] = [(len(p), (len(c),)) for p, c in zip(prompts, completions, strict=True)]
            self.counts.add(computed=separate, separate=separate)
            return completion_hidden_states(model, prompts, completions, token_budget=self.token_budget)
        groups = _grouped(prompts, completions)
        try:
            pieces = packed_hidden_states(
                model, *groups, cache=cache, token_budget=self.token_budget, counts=self.counts
            )
        except CannotShareError as error:  # what neither the check at the start nor `_way` foresaw
            if self.required:
                raise
            _say_once(str(error))
            self.shares, self.cache = False, None
            return self._states(side, model, prompts, completions, None)
        self._groups[side] = [(len(p), [len(c) for c in members]) for p, members in zip(*groups, strict=True)]
        return torch.cat([piece for group in pieces for piece in group])

    def _way(
        self,
        model: nn.Module,
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
        cache: PrefixCache | None,
    ) -> tuple[bool, PrefixCache | None]:
        """Whether the pass is packed, and with which cache."""
        if not self.shares or not any(map(len, completions)):
            return False, None
        if not self.required and attention_drops(model):  # the attention over a tree has none
            _say_once(f"{type(unwrap_peft(model)).__name__} has attention dropout in training")
            return False, None
        if cache is not None and not _one_prompt_each(prompts, completions):
            return True, cache
        if tree_saves(prompts, completions):
            return True, None  # prompts that share only their beginning: a cache of whole prompts would not find that
        return cache is not None, cache


def enable_sharing(models: Iterable[nn.Module], share_prefix: bool | None) -> bool:
    """Whether passes are to share prefixes; enables every model for it (`enable_shared_prefix`).

    Args:
        models: student and teacher, which may be one. Where one cannot share, the others have the attention
            implementation that they had.
        share_prefix: True: or raise. None: where all models allow it, else not, with the reason logged. False: not.

    Raises:
        Exception: what `enable_shared_prefix` raised of a model that cannot, with share_prefix=True.
    """
    if share_prefix is False:
        return False
    before: list[tuple[Any, str]] = []
    try:
        for model in {id(unwrap_peft(model)): model for model in models}.values():
            base: Any = unwrap_peft(model)
            before.append((base, getattr(getattr(base, "config", None), "_attn_implementation", "")))
            enable_shared_prefix(model)
    # Whatever a model's own code raises on a packed row: separate sequences ask for nothing but its plain forward.
    except Exception as error:
        for base, implementation in before[:-1]:  # the last one is as it was
            base.set_attn_implementation(implementation)
        if share_prefix:
            raise
        logger.info(SEPARATELY, error or type(error).__name__)
        return False
    return True


@functools.lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    """Log, once for each reason, why the sequences of a pass are computed separately."""
    logger.info(SEPARATELY, reason)


def tree_saves(prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> bool:
    """Whether the prefix tree of the sequences has at least `LEAST_SAVED` fewer tokens than they have together."""
    sequences = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True) if len(c)]
    return len(prefix_tree(sequences).tokens) <= (1 - LEAST_SAVED) * sum(map(len, sequences))


def _one_prompt_each(prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> bool:
    used = [tuple(p) for p, c in zip(prompts, completions, strict=True) if len(c)]
    return len(set(used)) == len(used)


def _grouped(
    prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
) -> tuple[list[TokenIds], list[list[TokenIds]]]:
    """Neighbouring completions of equal prompts together; the order stays."""
    grouped: list[TokenIds] = []
    members: list[list[TokenIds]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not grouped or list(grouped[-1]) != list(prompt):
            grouped.append(prompt)
            members.append([])
        members[-1].append(completion)
    return grouped, members
