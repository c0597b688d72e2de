"""Workloads of `bench step`: hidden states of student and teacher, loss and backward, prompts once or repeated."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft_kernels.cli._bench.prefix_case import FLOOR, MODELS, StepCase

TokenIds = list[int]
# Per prompt: the student's, the teacher's, and its completions.
Example = tuple[TokenIds, TokenIds, list[TokenIds]]


def load_model(name: str, dtype: torch.dtype, device: str, seed: int) -> Any:
    """A random model by its name in `MODELS`, or the model in a folder, in eval mode.

    Raises:
        ValueError: neither.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name in MODELS:
        torch.manual_seed(seed)
        # Three times transformers' default, so that student and teacher, which differ by their prompts, differ.
        model = LlamaForCausalLM(LlamaConfig(**MODELS[name], initializer_range=0.06)).to(dtype)
    elif Path(name).is_dir():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    else:
        raise ValueError(f"--model must be a folder or one of {', '.join(MODELS)}, got {name!r}")
    return model.to(device).eval()


class StepWorkload:
    """One step of one variant, up to the gradients of all weights. The teacher is the model itself."""

    def __init__(self, case: StepCase, variant: str, model: Any) -> None:
        from sdft_kernels.models import enable_shared_prefix
        from sdft_kernels.prefix_attention import PrefixCache

        self.case, self.variant, self.model = case, variant, model
        self.packed = variant != FLOOR
        self.cache = PrefixCache(2**40) if variant == "packed_cached" else None
        if self.packed:
            enable_shared_prefix(model, verify=False)
        generator = torch.Generator().manual_seed(case.seed)
        vocabulary = model.config.vocab_size
        draw = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
        self.examples: list[Example] = [
            (draw(case.prompt), draw(case.teacher_prompt), [draw(case.tokens) for _ in range(case.completions)])
            for _ in range(case.prompts)
        ]

    def run(self) -> Tensor:
        """Mean KL(teacher‖student) over all completion tokens, detached; micro-batch after micro-batch."""
        from sdft_kernels import AffineTokenLoss, linear_divergence_loss
        from sdft_kernels.models import head_kwargs

        case = self.case
        token_loss = AffineTokenLoss(kl_teacher_student=1.0 / (case.prompts * case.completions * case.tokens))
        head = head_kwargs(self.model, side="student") | head_kwargs(self.model, side="teacher")
        total = torch.zeros((), dtype=torch.float64)
        for batch in self._micro_batches():
            student = self._hidden(batch, teacher=False)
            with torch.no_grad():
                teacher = self._hidden(batch, teacher=True)
            loss, _ = linear_divergence_loss(
                student_input=student, teacher_input=teacher, token_loss=token_loss, **head
            )
            loss.backward()
            total += loss.detach().cpu()
        return total

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def allocate_gradients(self) -> None:
        """Allocate the gradients and touch every page."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)

    def results(self) -> dict[str, Tensor]:
        """Loss and the gradients of all weights, to compare variants by."""
        self.clear()
        loss = self.run()
        grads = [p.grad.double().flatten().cpu() for p in self.model.parameters() if p.grad is not None]
        return {"loss": loss, "gradient": torch.cat(grads)}

    def predictions(self) -> dict[str, float]:
        """FLOPs of this variant by kind, and the ratio of repeated to them."""
        from sdft_kernels.models import step_flops

        case, lengths = self.case, [self.case.tokens] * self.case.completions
        flops = step_flops(
            self.model.config,
            [(case.prompt, lengths)] * case.prompts,
            teacher_groups=[(case.teacher_prompt, lengths)] * case.prompts,
            teacher_cached=self.cache is not None,
        )
        mine = flops.shared if self.packed else flops.repeated
        parts = {"body": mine.body, "attention": mine.attention, "head": mine.head}
        return {"predicted_speedup": flops.repeated.total / mine.total, "predicted_tokens": float(mine.tokens)} | {
            f"predicted_{name}_gflop": 1e-9 * value for name, value in parts.items()
        }

    def _micro_batches(self) -> Iterator[list[Example]]:
        """Examples within the token budget; repeated, every completion is an example of its own."""
        case = self.case
        prompt = max(case.prompt, case.teacher_prompt)
        if self.packed:
            examples, size = self.examples, prompt + case.completions * case.tokens
        else:
            examples = [(s, t, [completion]) for s, t, group in self.examples for completion in group]
            size = prompt + case.tokens
        count = max(1, case.token_budget // size)
        for start in range(0, len(examples), count):
            yield examples[start : start + count]

    def _hidden(self, batch: list[Example], *, teacher: bool) -> Tensor:
        """(tokens, H) of all completions of the batch."""
        from sdft_kernels.models import completion_hidden_states, packed_hidden_states

        prompts = [theirs if teacher else own for own, theirs, _ in batch]
        completions = [example[2] for example in batch]
        if not self.packed:
            return completion_hidden_states(self.model, prompts, [group[0] for group in completions])
        groups = packed_hidden_states(self.model, prompts, completions, cache=self.cache if teacher else None)
        return torch.cat([hidden for group in groups for hidden in group])


@functools.lru_cache(maxsize=1)
def _loaded(name: str, dtype: str, device: str, seed: int) -> Any:
    """One model for a process, however many workloads it builds."""
    return load_model(name, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device, seed)


def build(case: StepCase, variant: str, *, exact: bool = False) -> StepWorkload:
    """The workload of a variant; `exact`: the floor's, in fp64, with the same rounded weights."""
    model = _loaded(case.model, case.dtype, case.device, case.seed)
    if exact:
        return StepWorkload(case, FLOOR, copy.deepcopy(model).double())
    return StepWorkload(case, variant, model)
