"""Models and tokenizers by name or folder: the one place where training loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def load_model(name: str, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """A causal language model to train, in fp32 unless `init_kwargs` says otherwise.

    transformers loads a checkpoint in the dtype it was saved in. Trained in pure bf16, most weights stay where they
    are: an optimizer's step at a usual learning rate is below half of bf16's last digit. bf16 arithmetic over fp32
    weights is `bf16=True`.

    Args:
        name: a folder, or a name on the hub.
        init_kwargs: of `from_pretrained`; `dtype` "auto" is that of the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    kwargs = dict(init_kwargs or {})
    if "torch_dtype" not in kwargs:  # the older name of dtype
        kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def load_tokenizer(name: str | None, fix: str) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        ValueError: there is none; the message ends in `fix`, what the caller is to do.
    """
    from transformers import AutoTokenizer

    if not name:
        raise ValueError(f"there is no tokenizer: the model was made in memory, so none can be loaded for it; {fix}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r} ({error}); {fix}") from error
    # From a folder with a model alone, transformers 5 makes a tokenizer of no token but the special ones, to which
    # every text is empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise ValueError(f"no tokenizer could be loaded from {name!r}: there are no files of one; {fix}")
    return tokenizer
