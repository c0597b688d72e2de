"""The transformers model inside a PEFT model."""

from __future__ import annotations

from typing import Any


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model; `model` itself if it is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
