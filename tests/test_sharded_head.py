"""A head that FSDP2 has sharded over two processes (gloo): where the loss may be called, and how to gather it."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial

from sdft_kernels import linear_divergence, linear_divergence_loss
from sdft_kernels.testing import relative_error

TOKENS, HIDDEN, VOCABULARY = 10, 8, 53
RIGHT = ("in the head's forward", "in the root's forward", "averaged", "averaged, numbers")


def loss_of(hidden, weight, teacher, numbers=False):
    """The mean over this process' tokens; `weight` is whole, and the teacher's too."""
    if numbers:  # projects again in backward
        return linear_divergence(hidden, weight, teacher, weight.detach()).kl_student_teacher.mean()
    return linear_divergence_loss(hidden, weight, teacher, weight.detach())[0]


class Head(nn.Linear):
    def forward(self, hidden, teacher=None):
        return super().forward(hidden) if teacher is None else loss_of(hidden, self.weight, teacher)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), Head(HIDDEN, VOCABULARY, bias=False)

    def forward(self, x, teacher, way):
        hidden = self.body(x)
        weight = self.head.weight
        if way == "in the head's forward":
            return self.head(hidden, teacher)
        if way.startswith("averaged"):
            weight = weight.full_tensor(grad_placements=[Partial("avg")])
        elif way == "plain full_tensor":
            weight = weight.full_tensor()
        return loss_of(hidden, weight, teacher, numbers=way.endswith("numbers"))


def draw():
    g = torch.Generator().manual_seed(1)
    return [3 * torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float32) for _ in range(2)]


def gradients(model):
    return {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}


def rank_main(folder):
    from torch.distributed.fsdp import fully_shard

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=size)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (size,))
    own = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size)
    results = {}
    for way in (*RIGHT, "plain full_tensor"):
        model = Model()
        if way != "in the root's forward":  # where the head is no unit of its own, its weight is whole there
            fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x, teacher = (t[own] for t in draw())
        model(x, teacher, way).backward()
        results[way] = gradients(model)
    with pytest.raises(ValueError) as raised:
        model(x, teacher, "as it is")
    results["error"] = str(raised.value)
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_gathered_head_gets_the_mean_gradient(tmp_path):
    from processes import run_ranks

    run_ranks(__file__, 2, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for way in (*RIGHT, "plain full_tensor"):
            model, (x, teacher) = Model(), draw()
            model(x, teacher, "whole, numbers" if way.endswith("numbers") else "whole").backward()
            for name, expected in gradients(model).items():
                error = relative_error(found[way][name], expected)
                # Control: without placements each shard keeps its own process' gradient, silently.
                wrong = way == "plain full_tensor" and name == "head.weight"
                assert error > 0.1 if wrong else error < 1e-5, (way, name)
        for words in ("student_weight is a DTensor", 'full_tensor(grad_placements=[Partial("avg")])', "own forward"):
            assert words in found["error"]


if __name__ == "__main__":
    rank_main(sys.argv[1])
