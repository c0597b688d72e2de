#!/usr/bin/env bash
# Finding: under FSDP2, the gradient through `weight.full_tensor()` of a unit lacks the other ranks' part, without a word.
# Versions: torch==2.13.0, numpy==2.4.6
# Expected: a head that is a unit of its own (`fully_shard(head)`) and is used as `hidden @ head.weight.full_tensor().T` gets the same
#   averaged gradient as a call `head(hidden)` would give it.
# Behaviour: the backward of `full_tensor()` takes each rank's gradient to be the whole and already equal on all ranks. Each shard keeps
#   its own rank's part and nothing is reduced. With different data per rank the gradient is wrong, and no error or warning says so.
#   `full_tensor(grad_placements=[Partial("avg")])` gives the right one.
# Output:
#     relative error of the head's gradient: full_tensor() 0.671, with Partial("avg") 0.000, head(hidden) 0.000
# Exit: 0 if shown; 1 if the behaviour changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial

RANKS = 2


def problem(rank):
    """The same body and head on each rank, and the rank's own data: x [4, 8] and target [4, 6]."""
    torch.manual_seed(0)
    body, head = nn.Linear(8, 8, bias=False), nn.Linear(8, 6, bias=False)
    generator = torch.Generator().manual_seed(1 + rank)
    return body, head, torch.randn(4, 8, generator=generator), torch.randn(4, 6, generator=generator)


def sharded_gradient(rank, mesh, logits):
    body, head, x, target = problem(rank)
    for unit in (body, head):
        fully_shard(unit, mesh=mesh)
    (logits(head, body(x)) - target).square().mean().backward()
    return head.weight.grad.full_tensor()


def expected_gradient():
    total = 0
    for rank in range(RANKS):
        body, head, x, target = problem(rank)
        (head(body(x)) - target).square().mean().backward()
        total = total + head.weight.grad / RANKS
    return total


def work(rank, folder):
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh, expected = init_device_mesh("cpu", (RANKS,)), expected_gradient()
    ways = (
        lambda head, hidden: hidden @ head.weight.full_tensor().T,
        lambda head, hidden: hidden @ head.weight.full_tensor(grad_placements=[Partial("avg")]).T,
        lambda head, hidden: head(hidden),
    )
    errors = [((sharded_gradient(rank, mesh, way) - expected).norm() / expected.norm()).item() for way in ways]
    dist.destroy_process_group()
    if rank == 0:
        plain, average, call = errors
        print(
            f'relative error of the head\'s gradient: full_tensor() {plain:.3f}, with Partial("avg") {average:.3f}, '
            f"head(hidden) {call:.3f}"
        )
        sys.exit(0 if plain > 0.1 and average < 1e-5 and call < 1e-5 else 1)


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=RANKS)
PYTHON

"$folder/venv/bin/python" -I "$folder/finding.py" "$folder"
