"""What the demo shows at the end: tables, curves, and the same as JSON."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.demo.scoring import Row, Score

# Step metrics drawn and kept.
KL, STUDENT_ENTROPY, TEACHER_ENTROPY = "kl_teacher_student", "student_entropy", "teacher_entropy"


def peak_memory_gib() -> float | None:
    """Largest resident size of this process so far in GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine() -> dict[str, Any]:
    """The machine in general terms."""
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "avx512": torch.backends.cpu.get_cpu_capability() == "AVX512",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def score_dict(score: Score) -> dict[str, Any]:
    """The numbers of a score."""
    return {"exact": score.correct, "tasks": len(score.exact), "expert_logprob": round(score.expert_logprob, 4)}


def verdict(before: Score, after: Score) -> str:
    """One sentence about the held-out tasks, whichever way they went."""
    change = after.correct - before.correct
    logprob = after.expert_logprob - before.expert_logprob
    how = "better" if change > 0 and logprob > 0 else "worse" if change < 0 or logprob < 0 else "no better"
    return (
        f"Held-out tool calls got {how}: {before.correct} → {after.correct} of {len(after.exact)} exact, "
        f"expert log-prob {before.expert_logprob:.3f} → {after.expert_logprob:.3f} nats per token."
    )


def print_teacher_check(console: Console, scores: dict[str, Score]) -> None:
    """Table of the student and of the teacher per template on training tasks."""
    table = Table(title="What the teacher can do (training tasks, before training)")
    table.add_column("prompt")
    table.add_column("exact calls", justify="right")
    table.add_column("expert log-prob, nats/token", justify="right")
    for name, result in scores.items():
        table.add_row(name, f"{result.correct}/{len(result.exact)}", f"{result.expert_logprob:.3f}")
    console.print(table)


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Table of held-out scores and costs."""
    heldout = results["heldout"]
    table = Table(title=f"SDFT on {results['model']}: held-out tool calls")
    for column in ("", "student before", "student after", "teacher (sees the demonstration)"):
        table.add_column(column, justify="left" if not column else "right")
    order = ("before", "after", "teacher")
    table.add_row("exact tool and arguments", *(f"{heldout[k]['exact']}/{heldout[k]['tasks']}" for k in order))
    table.add_row("expert log-prob, nats/token", *(f"{heldout[k]['expert_logprob']:.3f}" for k in order))
    console.print(table)
    costs = Table(show_header=False)
    seconds, memory = results["seconds"], results["peak_memory_gib"]
    phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    costs.add_row("seconds", f"{seconds['total']:.0f} ({phases})")
    costs.add_row("peak memory", "unknown" if memory is None else f"{memory:.1f} GiB resident")
    costs.add_row("tokens trained", f"{results['tokens_trained']:,} in {len(results['steps'])} optimizer steps")
    costs.add_row(
        "training tasks",
        f"{results['tasks']['trained']} used of {results['tasks']['admitted']} admitted "
        f"(the teacher gets them right) of {results['tasks']['measured']}",
    )
    console.print(costs)


def select_answers(tasks: Sequence[Row], before: Score, after: Score, count: int = 6) -> list[dict[str, Any]]:
    """Held-out answers before and after: what was lost comes first (up to two), then what was gained, then the rest."""
    pairs = list(zip(before.exact, after.exact, strict=True))
    lost = [i for i, (was, now) in enumerate(pairs) if was and not now][:2]
    gained = [i for i, (was, now) in enumerate(pairs) if now and not was][: count - len(lost) - 1]
    rest = [i for i in range(len(pairs)) if i not in lost + gained and pairs[i] == (False, False)]
    rest += [i for i in range(len(pairs)) if i not in lost + gained + rest]
    return [
        {
            "request": tasks[i]["prompt"][-1]["content"],
            "expert": tasks[i]["privileged_context"],
            "before": before.answers[i],
            "before_exact": before.exact[i],
            "after": after.answers[i],
            "after_exact": after.exact[i],
        }
        for i in (lost + gained + rest)[:count]
    ]


def print_answers(console: Console, answers: Sequence[dict[str, Any]]) -> None:
    """The selected answers side by side."""
    table = Table(title="Held-out answers (lost first, then gained)", show_lines=True)
    for column in ("request", "before", "after", "expert"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        cells = [
            f"[{'green' if answer[f'{when}_exact'] else 'red'}]{escape(answer[when])}[/]"
            for when in ("before", "after")
        ]
        table.add_row(escape(answer["request"]), *cells, escape(answer["expert"]))
    console.print(table)


def plot_curves(steps: Sequence[dict[str, float]], path: Path) -> None:
    """KL and entropies over the optimizer steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    x = [step["step"] for step in steps]
    left.plot(x, [step[KL] for step in steps], "o-", label="KL(teacher ‖ student)")
    right.plot(x, [step[STUDENT_ENTROPY] for step in steps], "o-", label="student")
    right.plot(x, [step[TEACHER_ENTROPY] for step in steps], "s-", label="teacher")
    left.set(title="Divergence on the student's completions", ylabel="nats per token")
    right.set(title="Entropy of the next token", ylabel="nats")
    for axis in (left, right):
        axis.set_ylim(0, 1.15 * max(max(line.get_ydata()) for line in axis.lines))
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
