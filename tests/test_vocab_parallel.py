"""The vocabulary sharded over 2 and 3 gloo processes, in shards of different size, against the whole in one process."""

import os
import sys

import pytest
import torch

from sdft_kernels import AffineTokenLoss, linear_divergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels._head import IDENTITY, Transform
from sdft_kernels.divergence import rows_torch
from sdft_kernels.divergence.fields import FIELDS
from sdft_kernels.divergence.statistics import PARTIAL, STATE, finish, merge, state_of
from sdft_kernels.testing import make_divergence_inputs, random_upstream, relative_error

TOKENS, VOCABULARY = 11, 203
CUTS = {2: (0, 70, 203), 3: (0, 16, 150, 203)}
LIMIT = 1e-10  # fp64
TRAINED = ("student_input", "student_weight", "student_bias")
ROWS = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")


def squared(tokens, index):
    return tokens.kl_teacher_student.square() + 0.1 * tokens.student_logprob + 0.01 * index


def token_losses():
    w = torch.randn(5, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {
        "default": None,
        "reverse": sdft_token_loss(alpha=1.0),
        "clip": sdft_token_loss(weight=w[0].abs(), old_logprob=w[1] - 1, importance_clip=2.0),
        "all": AffineTokenLoss(
            kl_teacher_student=w[0],
            kl_student_teacher=w[1],
            jsd=w[2],
            alpha=0.3,
            student_logprob=w[3],
            student_entropy=0.2,
        ),
        "callable": squared,
    }


def cases():
    """Name -> inputs, options. The bias of "masked shard" is -inf on all of the second shard of two."""
    inputs = make_divergence_inputs("peaked", TOKENS, VOCABULARY, 16, dtype=torch.float64, bias=True, mask=True)
    options = {"student_softcap": 20.0, "teacher_softcap": 30.0, "temperature": 1.3}
    masked = {name: getattr(inputs, name).clone() for name in ("student_bias", "teacher_bias")}
    for bias in masked.values():
        bias[70:] = -float("inf")
    yield "packed", inputs, {}
    yield "selected", inputs, {"pack": False} | options
    yield "chunks", inputs.replace(mask=None), {"memory_budget": rows_torch.scratch_bytes(11, 203, 8) + 3 * 8 * 600}
    yield "masked shard", inputs.replace(**masked, target=inputs.target.clamp(max=69)), {}
    yield "shared head", inputs.replace(teacher_weight=inputs.student_weight, teacher_bias=inputs.student_bias), {}
    yield "no tokens", make_divergence_inputs("near", 0, VOCABULARY, 16, dtype=torch.float64), {}


def run(inputs, options, rows=slice(None), group=None):
    """Losses, numbers and gradients by name; the heads cut to `rows`."""
    results = {}
    count = inputs.student_input.shape[0]
    shared = inputs.teacher_weight is inputs.student_weight
    for name, token_loss in (token_losses() if count else {"default": None}).items():
        a = {k: v if v is None or k not in ROWS else v[rows].clone() for k, v in inputs.tensors().items()}
        if shared:
            a |= {"teacher_weight": a["student_weight"], "teacher_bias": a["student_bias"]}
        trained = [
            a[k].requires_grad_() for k in ("student_input", "student_weight", "student_bias") if a[k] is not None
        ]
        loss, tokens = linear_divergence_loss(**a, token_loss=token_loss, vocab_group=group, **options)
        grads = torch.autograd.grad(loss, trained)
        results[name] = (loss.detach(), *(t for t in tokens if t is not None), *grads)
        if name == "all":
            upstream = random_upstream(count, True)
            tokens = linear_divergence(**a, jsd_alpha=0.3, vocab_group=group, **options)
            total = sum((upstream[k] * getattr(tokens, k)).sum() for k in upstream)
            results["numbers"] = (*(t.detach() for t in tokens), *torch.autograd.grad(total, trained))
    return results


@pytest.mark.parametrize("world_size", CUTS)
def test_equals_the_whole_vocabulary(world_size, tmp_path):
    from processes import run_ranks

    run_ranks(__file__, world_size, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    for case, inputs, options in cases():
        for name, whole in run(inputs, options).items():
            parts = [rank[case][name] for rank in ranks]
            local = 2 if inputs.student_bias is not None else 1  # dW and dbias are the rank's own rows
            for i, truth in enumerate(whole):
                is_local = i >= len(whole) - local
                found = [torch.cat([part[i] for part in parts])] if is_local else [part[i] for part in parts]
                for value in found:
                    assert relative_error(value, truth) < LIMIT, (case, name, i)
                assert is_local or all(value.equal(found[0]) for value in found)  # the same bits on every rank
    for rank in ranks:
        assert "every rank must pass the same tokens, got [11, " in rank["other tokens"]
        assert "in [0, 203)" in rank["target out of range"]
    assert "needs at least" in ranks[0]["no room on rank 0"]
    assert all("no token of the shard of ranks [0]" in rank["no room on rank 0"] for rank in ranks[1:])


def rank_main(folder):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=size)
    rows = slice(*CUTS[size][rank : rank + 2])
    group = torch.distributed.group.WORLD
    results = {name: run(inputs, options, rows, group) for name, inputs, options in cases()}
    _, x, _ = next(cases())
    a = {k: v if v is None or k not in ROWS else v[rows] for k, v in x.tensors().items()}
    for name, change in (
        ("other tokens", {k: a[k][: TOKENS - rank] for k in ("student_input", "teacher_input", "target", "mask")}),
        ("target out of range", {"target": torch.full_like(x.target, 203)}),
        ("no room on rank 0", {"memory_budget": 1 if rank == 0 else None}),
    ):
        with pytest.raises(ValueError) as raised:
            linear_divergence_loss(**(a | change), vocab_group=group)
        results[name] = str(raised.value)
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def shard_by_shard(rows, student, teacher, target, transforms, alpha, cuts):
    """What `ShardedRows` does, with the exchange in one process: numbers and gradient of the whole."""
    tiles, partials = [], []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        stride = rows.row_stride(stop - start)
        pair = [z.new_empty(z.shape[0], stride)[:, : stop - start].copy_(z[:, start:stop]) for z in (student, teacher)]
        local = target - start
        local = local.masked_fill((local < 0) | (local >= stop - start), -1).masked_fill(target == -100, -100)
        tiles.append((*pair, local))
        partials.append(rows.partial_statistics(*pair, local, transforms, None))
    numbers = finish(merge(torch.stack(partials)), target, student.shape[1])
    state = state_of(numbers, partials[0][0])
    sums = 0
    for (s, t, _), partial in zip(tiles, partials, strict=True):
        rows.repivot_(s, t, partial, state)
        sums = sums + rows.mixture_sums(s, t, state, transforms, alpha, None)
    state[STATE.index("kl_student_mixture")] = sums[0]
    upstream = {name: w.to(student) for name, w in random_upstream(student.shape[0], True).items()}
    grads = [
        rows.divergence_grad_(s, t, state, local, dict(upstream), transforms, alpha, None, s.dtype)
        for s, t, local in tiles
    ]
    return numbers, sums, torch.cat(grads, 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("transforms", ((IDENTITY, IDENTITY), (Transform(1.2, 20.0, 1.5), Transform(1.0, 30.0, 1.5))))
def test_both_row_kernels_shard_by_shard(transforms, interpreted):
    """Triton's and PyTorch's partial statistics, mixture sums and gradients, against the unsharded PyTorch rows."""
    rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
    dtype, limit = (torch.float64, 1e-10) if interpreted.type == "cpu" else (torch.float32, 1e-4)
    g = torch.Generator().manual_seed(0)
    student = 6 * torch.randn(4, 203, generator=g, dtype=torch.float64).to(interpreted, dtype)
    teacher = student + 0.1 * torch.randn(4, 203, generator=g, dtype=torch.float64).to(student)
    student[0, 60:] = teacher[0, 60:] = -float("inf")  # row 0 is all -inf in the last two shards
    teacher[1, :16] = -float("inf")
    target = torch.tensor([5, 100, -100, 202], device=interpreted)
    tokens = student.new_zeros(len(FIELDS), 4)
    whole = rows_torch.divergence_stats(student.clone(), teacher.clone(), target, transforms, 0.3, None, tokens)
    a, b = student.clone(), teacher.clone()
    state = rows_torch.divergence_stats(a, b, target, transforms, 0.3, None, tokens)
    upstream = {name: w.to(student) for name, w in random_upstream(4, True).items()}
    gradient = rows_torch.divergence_grad_(a, b, state, target, upstream, transforms, 0.3, None, dtype)
    for rows in (rows_torch, rows_triton):
        numbers, sums, grads = shard_by_shard(rows, student, teacher, target, transforms, 0.3, (0, 16, 70, 203))
        for i, name in enumerate(FIELDS):
            if name in numbers:
                assert relative_error(numbers[name], tokens[i]) < limit, name
        assert relative_error(sums[0], whole[STATE.index("kl_student_mixture")]) < limit
        finite = [0, 2, 3]  # row 1 has an infinite KL, and a gradient that no convention makes finite
        assert relative_error(grads[finite], gradient[finite]) < limit


def test_merge_of_one_part_changes_nothing():
    part = torch.randn(len(PARTIAL), 3, dtype=torch.float64).abs() + 0.1
    merged = merge(part[None])
    for i, name in enumerate(PARTIAL):
        assert torch.equal(merged[name], part[i]), name


if __name__ == "__main__":
    rank_main(sys.argv[1])
