"""The demo from the first measurement to the last: what the teacher can do, training, what the student learnt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.demo import report
from benchmarks.demo.make_tasks import DATA_DIRECTORY
from benchmarks.demo.model import ensure_model, load_model
from benchmarks.demo.scoring import Row, Score, load_tasks, score
from benchmarks.demo.training import Settings, train

TEMPLATES = ("turn", "paper")


@dataclass(frozen=True)
class Plan:
    """How much the demo does.

    Attributes:
        check: training tasks on which every template is measured; the best one is then measured on all.
        measured: training tasks at most.
        trained: admitted tasks trained on at most.
        heldout: held-out tasks at most.
        template: the teacher's template; None takes the best of `TEMPLATES` on the check tasks.
        settings: of the training run.
    """

    check: int = 15
    measured: int = 45
    trained: int = 40
    heldout: int = 30
    template: str | None = None
    settings: Settings = field(default_factory=Settings)

    @staticmethod
    def quick(settings: Settings) -> Plan:
        """A few tasks and two steps: shows that everything runs, not what SDFT can do."""
        return Plan(check=6, measured=12, trained=8, heldout=6, settings=replace(settings, epochs=1, batch_size=4))


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before

    def summary(self) -> dict[str, float]:
        """Every phase, and `total` since the clock was made."""
        rounded = {name: round(value, 1) for name, value in self.seconds.items()}
        return rounded | {"total": round(time.perf_counter() - self.started, 1)}


@dataclass(frozen=True)
class TeacherCheck:
    """What the teacher can do: scores by prompt on the check tasks, the template taken, and the admitted tasks."""

    scores: dict[str, Score]
    template: str
    admitted: list[Row]


def check_teacher(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Row], plan: Plan
) -> TeacherCheck:
    """Score the student and the teacher, and admit the tasks that the teacher gets right.

    Raises:
        ValueError: the teacher gets no task right, so there is nothing to learn from it.
    """
    head, tail = tasks[: plan.check], tasks[plan.check : plan.measured]
    scores = {"student: the plain question": score(model, tokenizer, head, description="student on training tasks")}
    by_template = {
        name: score(model, tokenizer, head, template=name, description=f"teacher, template {name}")
        for name in ((plan.template,) if plan.template else TEMPLATES)
    }
    scores |= {f"teacher: template {name}": result for name, result in by_template.items()}
    best = max(by_template, key=lambda name: (by_template[name].correct, by_template[name].expert_logprob))
    exact = by_template[best].exact
    if tail:
        label = "teacher on the other training tasks"
        rest = score(model, tokenizer, tail, template=best, with_logprob=False, description=label)
        exact = exact + rest.exact
    admitted = [task for task, right in zip([*head, *tail], exact, strict=True) if right]
    if not admitted:
        raise ValueError(
            f"the teacher gets none of {len(exact)} tasks right even with the demonstration (template {best!r}): "
            "this model cannot follow it, and SDFT has nothing to teach"
        )
    return TeacherCheck(scores, best, admitted)


def run(model_folder: Path | None, output: Path, plan: Plan, console: Console) -> dict[str, Any]:
    """Run the demo and write `results.json` and `curves.png` to `output`.

    Args:
        model_folder: a folder written by `save_pretrained`; None is SmolLM2-135M-Instruct, converted on first use.
        output: created where it does not exist.
        plan: how much to do.
        console: where tables go.

    Returns:
        What `results.json` holds.
    """
    clock = Clock()
    with clock.phase("loading"):
        folder = model_folder or ensure_model()
        model, tokenizer = load_model(folder)
        train_tasks = load_tasks(DATA_DIRECTORY / "train.jsonl")[: plan.measured]
        heldout_tasks = load_tasks(DATA_DIRECTORY / "heldout.jsonl")[: plan.heldout]
    output.mkdir(parents=True, exist_ok=True)
    with clock.phase("teacher check"):
        check = check_teacher(model, tokenizer, train_tasks, plan)
    report.print_teacher_check(console, check.scores)
    _say_what_it_means(console, check, len(train_tasks))
    settings = replace(plan.settings, template=check.template)
    trained = check.admitted[: plan.trained]
    with clock.phase("held-out scores"):
        before = score(model, tokenizer, heldout_tasks, description="held-out tasks before")
        teacher = score(model, tokenizer, heldout_tasks, template=check.template, description="held-out tasks, teacher")
    console.print(f"Held-out tasks: student {before}; teacher {teacher}.")
    with clock.phase("training"):
        steps = train(model, tokenizer, trained, settings, output)
    with clock.phase("held-out scores"):
        after = score(model, tokenizer, heldout_tasks, description="held-out tasks after")
    results = {
        "model": folder.name,
        "settings": asdict(settings),
        "machine": report.machine(),
        "teacher_check": {name: report.score_dict(result) for name, result in check.scores.items()},
        "tasks": {"measured": len(train_tasks), "admitted": len(check.admitted), "trained": len(trained)},
        "heldout": {
            "before": report.score_dict(before),
            "after": report.score_dict(after),
            "teacher": report.score_dict(teacher),
        },
        "seconds": clock.summary(),
        "peak_memory_gib": _rounded(report.peak_memory_gib()),
        "tokens_trained": round(sum(step["num_loss_tokens"] for step in steps)),
        "steps": [_numbers(step) for step in steps],
        "answers": report.select_answers(heldout_tasks, before, after),
    }
    report.plot_curves(steps, output / "curves.png")
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report.print_answers(console, results["answers"])
    report.print_results(console, results)
    console.print(report.verdict(before, after))
    console.print(f"Written: {output / 'results.json'}, {output / 'curves.png'}")
    return results


def _say_what_it_means(console: Console, check: TeacherCheck, measured: int) -> None:
    student, *_ = check.scores.values()
    teacher = check.scores[f"teacher: template {check.template}"]
    console.print(
        f"Template [bold]{check.template}[/]: the teacher gets {len(check.admitted)} of {measured} training tasks "
        "right; these are admitted, the others left out."
    )
    if teacher.correct <= student.correct:
        console.print("[yellow]The teacher is no better than the student here: expect SDFT to teach little.[/]")


def _numbers(step: dict[str, float]) -> dict[str, float]:
    names = ("step", report.KL, report.STUDENT_ENTROPY, report.TEACHER_ENTROPY, "num_loss_tokens")
    return {name: round(step[name], 5) for name in names}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
