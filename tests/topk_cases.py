"""What the tests of op 2 share: inputs by argument name, and one run's numbers and gradients by name."""

import torch

from sdft_kernels.testing import make_divergence_inputs
from sdft_kernels.topk_divergence import linear_topk_divergence

K = 7
TAILS = ("renormalize", "bucket", "drop")
NAMED = ("student", "teacher", "union", "intersection")
SUPPORTS = (*NAMED, "given", "cached", "cached-intersection")
EVERY_OPTION = {
    "temperature": 0.7, "student_logit_scale": 0.5, "teacher_logit_scale": 0.8,
    "student_softcap": 20.0, "teacher_softcap": 30.0,
}  # fmt: skip
TEACHER_OPTIONS = ("teacher_logit_scale", "teacher_softcap")
TRAINED = ("student_input", "student_weight", "student_bias")


def draw(kind="near", **options):
    return make_divergence_inputs(kind, **options).tensors()


def to(arguments, dtype):
    """Detached copies: no gradient leaks from one run into another. A cached teacher keeps its own dtype."""
    return {
        k: v.detach().to(dtype, copy=True) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def logprobs_of_teacher(x, options=None):
    """log p_t (N, V) in fp64, as the op defines it."""
    options = options or {}
    raw = x["teacher_input"].double() @ x["teacher_weight"].double().t()
    raw = raw if x.get("teacher_bias") is None else raw + x["teacher_bias"].double()
    z = raw * options.get("teacher_logit_scale", 1.0)
    if options.get("teacher_softcap"):
        z = options["teacher_softcap"] * torch.tanh(z / options["teacher_softcap"])
    return (z / options.get("temperature", 1.0)).log_softmax(-1)


def restrict(x, support, options=None, k=K, seed=0):
    """Arguments and options of a call on `support`: given ids and a cached teacher are made from `x`."""
    options = dict(options or {})
    if support in NAMED:
        return x, options | {"support": support, "k": k}
    count, vocabulary = x["student_input"].shape[0], x["student_weight"].shape[0]
    g = torch.Generator().manual_seed(seed)
    if support == "given":
        ids = torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(count)])
        likely = (x["student_input"].double() @ x["student_weight"].double().t()).topk(2).indices
        ids[:, :2] = torch.where((ids[:, 2:, None] == likely[:, None]).any(1), ids[:, :2], likely)
        ids[3, 2:4] = -1
        ids[5] = -1
        return x, options | {"support": ids}
    logprobs, ids = logprobs_of_teacher(x, options).topk(k)
    ids[4, -1] = -1
    if support == "cached-intersection":
        options["support"] = "intersection"
    kept = {n: v for n, v in x.items() if not n.startswith("teacher_")}
    cached = (ids, logprobs.to(x["student_input"].dtype))
    return kept, {n: v for n, v in options.items() if n not in TEACHER_OPTIONS} | {"teacher_topk": cached}


def upstream(count, seed=1):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(arguments, impl, trained=TRAINED, weight=None, **options):
    """Every number, and ``grad_*`` of sum_n weight_n divergence_n."""
    arguments = to(arguments, arguments["student_input"].dtype)
    leaves = {k: arguments[k].requires_grad_() for k in trained if arguments.get(k) is not None}
    tokens = linear_topk_divergence(**arguments, impl=impl, **options)
    weight = upstream(arguments["student_input"].shape[0]) if weight is None else weight
    (weight.to(tokens.divergence.dtype) * tokens.divergence).sum().backward()
    numbers = {k: v.detach() for k, v in tokens._asdict().items() if v is not None}
    return numbers | {f"grad_{k}": v.grad for k, v in leaves.items()}
