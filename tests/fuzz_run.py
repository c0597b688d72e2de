"""One random run of a `SelfDistiller` beside the dense computation, step by step."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fuzz_cases
import fuzz_oracle
import torch
from fuzz_budget import distance, over
from fuzz_cases import Case, draw
from fuzz_oracle import Dense
from torch import Tensor

from sdft_kernels.distill import SelfDistiller
from sdft_kernels.models.hidden import unwrap_peft

__all__ = ["check", "draw"]

RATE = 0.3  # of the EMA: large, so that a wrong average shows after one update


class Twin:
    """Copies of student and teacher that only the dense computation uses."""

    def __init__(self, case: Case, models: fuzz_cases.Models, dtype: torch.dtype, attention: str) -> None:
        self.case, self.dtype = case, dtype
        self.student = _copy(models.student, dtype, attention)
        if case.teacher == "live":
            self.teacher = self.student
        elif case.teacher in ("model", "trained_model"):
            self.teacher = _copy(models.other, dtype, attention)
        elif case.teacher == "frozen" and case.adapter in ("lora", "rslora", "two"):
            self.teacher = _copy(models.base, dtype, attention)
        else:
            self.teacher = _copy(models.student, dtype, attention)
        self.average = {n: self._kept(p.detach().double()) for n, p in self.teacher.named_parameters()}

    def follow(self, student: Any) -> None:
        """Take over the student's weights."""
        self.student.load_state_dict(student.state_dict())

    def update(self, student: Any) -> None:
        """Average the student's weights into those of an EMA teacher: in fp64, rounded to their dtype."""
        if not self.case.teacher.startswith("ema"):
            return
        own = dict(self.teacher.named_parameters())
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.requires_grad:
                    self.average[name] += RATE * (parameter.double() - self.average[name])
                    self.average[name] = self._kept(self.average[name])
                    own[name].copy_(self.average[name].to(parameter.dtype))

    def _kept(self, average: Tensor) -> Tensor:
        """What a pair of bf16 tensors keeps of an average, in the twins that have a dtype."""
        if self.case.teacher != "ema_pair" or self.dtype == torch.float64:
            return average
        high = average.bfloat16().double()
        return high + (average - high).bfloat16().double()

    def jitter(self, generator: torch.Generator) -> None:
        """Move every weight by up to an ulp: another sample of what rounding does. Half of one would round away."""
        eps = torch.finfo(torch.bfloat16 if self.case.dtype == "autocast" else self.dtype).eps
        with torch.no_grad():
            for parameter in {id(p): p for m in (self.student, self.teacher) for p in m.parameters()}.values():
                noise = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
                parameter.copy_((parameter.double() * (1 + eps * noise)).to(parameter.dtype))

    def dense(self, batch: Any, padded: bool, grad: bool) -> Dense:
        case = self.case
        return fuzz_oracle.dense(self.student, self.teacher, batch, case.options, case.num_completions, padded, grad)


def _copy(model: Any, dtype: torch.dtype, attention: str) -> Any:
    result = copy.deepcopy(model).to(dtype)
    base = unwrap_peft(result)
    if base._can_set_attn_implementation() and base.config._attn_implementation != attention:
        eager_only = getattr(base.config, "attn_logit_softcapping", None)
        base.set_attn_implementation("eager" if eager_only else attention)
    return result


@dataclass
class Step:
    """One step: what came out, the truth, eager runs, and how to get more of these."""

    ours: Dense
    truth: Dense
    eager: list[Dense]
    more: Callable[[], list[Dense]]


def run(case: Case) -> Iterator[Step]:
    """The steps of a case. `ours` has the fields of `Dense` that a distiller returns."""
    models = fuzz_cases.build(case)
    student = models.student
    own = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    truth = Twin(case, models, torch.float64, "eager")
    eager = [Twin(case, models, own, attention) for attention in ("eager", "sdpa")]
    kind: Any = {"ema_pair": "ema", "model": models.other, "trained_model": models.other}.get(
        case.teacher, case.teacher
    )
    pair = {"ema_dtype": torch.bfloat16} if case.teacher == "ema_pair" else {}
    distiller = SelfDistiller(student, kind, ema_rate=RATE, **case.options, **pair)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.003)
    distiller.attach(optimizer)
    fuzz_cases.perturb(student, case.seed + 1)
    for number, mode in enumerate(case.modes):
        for twin in (truth, *eager):
            twin.follow(student)
        batch = fuzz_cases.make_batch(case, student, number)
        out = _step(case, distiller, batch, mode)
        with fuzz_oracle.widened():
            exact = truth.dense(batch, False, mode == "grad")
        more = functools.partial(_jittered, case, eager, batch, mode)
        yield Step(out, exact, _eager(case, eager, batch, mode), more)
        if mode == "grad":
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for twin in (truth, *eager):
                twin.update(student)


def _eager(case: Case, twins: list[Twin], batch: Any, mode: str) -> list[Dense]:
    with _setting(case):
        return [twin.dense(batch, padded, mode == "grad") for twin, padded in zip(twins, (False, True), strict=True)]


def _jittered(case: Case, twins: list[Twin], batch: Any, mode: str, times: int = 3) -> list[Dense]:
    generator = torch.Generator().manual_seed(case.seed)
    results = []
    for _ in range(times):
        moved = copy.deepcopy(twins)
        for twin in moved:
            twin.jitter(generator)
        results += _eager(case, moved, batch, mode)
    return results


def _step(case: Case, distiller: SelfDistiller, batch: Any, mode: str) -> Dense:
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "grad"):
        with _setting(case):
            out = distiller(batch, case.num_completions)
        if mode == "grad":
            out.loss.backward()
    trained = {name: p for name, p in distiller.model.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
    tokens = {name: value for name, value in out.tokens._asdict().items() if value is not None}
    none = torch.empty(0)
    return Dense(out.loss.detach(), none, none, tokens, gradients)


@contextlib.contextmanager
def _setting(case: Case) -> Iterator[None]:
    """Autocast and torch's default dtype as the case has them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.default_dtype))
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast"):
            yield
    finally:
        torch.set_default_dtype(before)


def check(case: Case) -> dict[str, float]:
    """Run a case; error over budget, by what is compared, the largest of all steps.

    Raises:
        AssertionError: naming the number, the step and the case, where one is above 1.
    """
    largest: dict[str, float] = {}
    for number, step in enumerate(run(case)):
        ratios = _ratios(step)
        if max(ratios.values()) > 1:  # two eager runs may be lucky; eight are not
            step.eager += step.more()
            ratios = _ratios(step)
        worst = max(ratios, key=lambda name: ratios[name])
        assert ratios[worst] <= 1, (
            f"step {number}: the error of {worst} is {ratios[worst]:.3g} times its budget; {case}"
        )
        largest |= {name: max(largest.get(name, 0.0), ratio) for name, ratio in ratios.items()}
    return largest


def _ratios(step: Step) -> dict[str, float]:
    """Errors over their budgets: twice the largest error of the eager runs, or 1 ulp."""
    ours, truth, eager = step.ours, step.truth, step.eager
    ulp = torch.finfo(ours.loss.dtype).eps
    of_terms = max((e.terms.double() - truth.terms).abs().sum().item() for e in eager)
    # A sum that cancels is held to its terms.
    ratios = {
        "loss": over(
            ours.loss, truth.loss, [e.loss for e in eager], max(of_terms, ulp * truth.terms.abs().sum().item())
        )
    }
    kept = truth.kept
    for name, exact in truth.tokens.items():
        value = ours.tokens.get(name)
        if value is None:
            continue
        assert value.shape == kept.shape and not value[~kept].count_nonzero(), f"{name} of tokens left out: {value}"
        ratios[name] = over(
            value[kept], exact[kept], [e.tokens[name][kept] for e in eager], ulp * exact[kept].norm().item()
        )
    whole = _joined(truth.gradients)
    level = max(distance(_joined(e.gradients), whole) for e in eager) / max(whole.norm().item(), 1e-300)
    for name, exact in truth.gradients.items():
        value = ours.gradients[name]
        # What eager loses over all parameters, no parameter is asked to be better than: some have hardly an entry.
        floor = level * exact.norm().item() + ulp * whole.norm().item()
        ratios[f"gradient of {name}"] = over(value, exact, [e.gradients[name] for e in eager], floor)
    return ratios


def _joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(g.double().flatten() for g in gradients.values())])
