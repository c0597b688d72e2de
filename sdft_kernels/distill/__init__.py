"""The training module: teachers, templates, rollouts, `SelfDistiller`, and `SDFTTrainer` over transformers' Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdft_kernels.distill.batch import DistillBatch
from sdft_kernels.distill.distiller import DistillOutput, SelfDistiller
from sdft_kernels.distill.rollouts import generate_completions
from sdft_kernels.distill.teacher import Teacher, make_teacher
from sdft_kernels.distill.templates import encode_completion, encode_prompts, paper, preview, trl, turn

if TYPE_CHECKING:
    from sdft_kernels.distill.config import SDFTConfig
    from sdft_kernels.distill.trainer import SDFTTrainer

__all__ = [
    "DistillBatch",
    "DistillOutput",
    "SDFTConfig",
    "SDFTTrainer",
    "SelfDistiller",
    "Teacher",
    "encode_completion",
    "encode_prompts",
    "generate_completions",
    "make_teacher",
    "paper",
    "preview",
    "trl",
    "turn",
]

_LAZY = {"SDFTConfig": "sdft_kernels.distill.config", "SDFTTrainer": "sdft_kernels.distill.trainer"}


def __getattr__(name: str) -> Any:
    """The two names that need transformers, imported on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
