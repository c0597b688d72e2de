"""Public test kit: error budgets, inputs that bite, fp64 oracles. For our tests and for yours."""

from .budget import assert_within_budget, budget_ratio, relative_error
from .inputs import KINDS, DivergenceInputs, make_divergence_inputs
from .oracle import (
    cast,
    random_logprob_upstream,
    random_upstream,
    random_weight,
    run_divergence,
    run_divergence_loss,
    run_token_logprob,
    run_topk_divergence,
)
from .supports import on_the_same_ids, restrict_support, teacher_logprobs

__all__ = [
    "KINDS",
    "DivergenceInputs",
    "assert_within_budget",
    "budget_ratio",
    "cast",
    "make_divergence_inputs",
    "on_the_same_ids",
    "random_logprob_upstream",
    "random_upstream",
    "random_weight",
    "relative_error",
    "restrict_support",
    "run_divergence",
    "run_divergence_loss",
    "run_token_logprob",
    "run_topk_divergence",
    "teacher_logprobs",
]
