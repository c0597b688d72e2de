"""Public test kit: error budgets, inputs that bite, fp64 oracles. For our tests and for yours."""

from .budget import assert_within_budget, budget_ratio, relative_error
from .inputs import KINDS, DivergenceInputs, make_divergence_inputs
from .oracle import random_upstream, run_divergence, run_divergence_loss

__all__ = [
    "KINDS",
    "DivergenceInputs",
    "assert_within_budget",
    "budget_ratio",
    "make_divergence_inputs",
    "random_upstream",
    "relative_error",
    "run_divergence",
    "run_divergence_loss",
]
