"""What drops in a model in training, and how to stop it: `disable_dropout`, `attention_drops`.

A rate may be held by an `nn.Dropout`, by any other module that hands it to a function, or by the configuration, which
some modules read in their forward. Names of attributes find the rates; a pass in which calls of dropout functions are
watched proves that none is left.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from sdft_kernels.models.hidden import training_mode, unwrap_peft

logger = logging.getLogger(__name__)

# attention_dropout, hidden_dropout_prob, resid_pdrop, attn_drop, layerdrop, ...
_RATE = re.compile(r"drop")
_ATTENTION = re.compile(r"attention|attn", re.I)
# Rates of an attention module that act after its attention.
_AFTER_ATTENTION = re.compile(r"resid|hidden|output|activation|ffn|embd")


class Rate(NamedTuple):
    """A dropout rate: `getattr(holder, name)`; `path` is how to reach it from the model."""

    holder: Any
    name: str
    path: str


def dropout_rates(model: nn.Module) -> Iterator[Rate]:
    """The rates above 0 that modules of `model` hold."""
    for path, module in model.named_modules():
        names = ["p"] if isinstance(module, _DropoutNd) else _rates_in(vars(module))
        yield from (Rate(module, name, f"{path}.{name}".lstrip(".")) for name in names if getattr(module, name) > 0)


def attention_drops(model: nn.Module) -> bool:
    """Whether a pass in the present mode of `model` has dropout in its attention, as far as its modules tell."""
    return any(
        module.training and _ATTENTION.search(type(module).__name__) is not None and any(_attention_rates(module))
        for module in model.modules()
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` (adapters included) to 0, and check that a pass in train mode draws none.

    The configuration stays as it is, and so does what is saved of it, unless modules read rates from it in their
    forward (Falcon, Persimmon, BLT): then its rates become 0 too, which the log says.

    Args:
        model: a transformers causal language model, or a PEFT model around one.

    Raises:
        ValueError: dropout that is drawn all the same, by code of the model's own.
    """
    for rate in dropout_rates(model):
        setattr(rate.holder, rate.name, 0.0)
    if not _drawn(model):
        return
    for rate in _configured_rates(model):
        logger.info("the configuration's %s is read in every forward: %g is now 0", rate.path, _value(rate))
        setattr(rate.holder, rate.name, 0.0)
    left = _drawn(model)
    if left:
        raise ValueError(
            f"{type(unwrap_peft(model)).__name__} calls {', '.join(sorted(left))} with a rate that is in none of its "
            "modules and not in its configuration, so that dropout cannot be switched off: pass disable_dropout=False "
            "to train with it, or remove it from the model's code"
        )


def _value(rate: Rate) -> float:
    return float(getattr(rate.holder, rate.name))


def _rates_in(attributes: dict[str, Any]) -> list[str]:
    """Names of attributes that hold a rate above 0."""
    found = ((name, value) for name, value in attributes.items() if _RATE.search(name))
    return [name for name, value in found if isinstance(value, (float, int)) and not isinstance(value, bool) and value]


def _attention_rates(module: nn.Module) -> Iterator[float]:
    own = {name: getattr(module, name) for name in _rates_in(vars(module))}
    children = {name: child.p for name, child in module.named_children() if isinstance(child, _DropoutNd)}
    yield from (rate for name, rate in (own | children).items() if not _AFTER_ATTENTION.search(name))


def _configured_rates(model: nn.Module) -> list[Rate]:
    """The rates above 0 in the configurations that modules hold, each once."""
    configurations = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [
        Rate(configuration, name, name)
        for configuration in configurations.values()
        for name in _rates_in(vars(configuration))
    ]


class _Watch(TorchFunctionMode):
    """Notes the functions that are called with a dropout rate above 0, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _rate_of_call(getattr(func, "__name__", ""), args, kwargs):
            self.seen.add(func.__name__)
        return func(*args, **kwargs)


def _rate_of_call(name: str, args: Any, kwargs: dict[str, Any]) -> float:
    if name == "scaled_dot_product_attention":
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if "dropout" not in name:
        return 0.0
    # All of them are called as (input, p, training).
    drops = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if drops else 0.0


@torch.no_grad()
def _drawn(model: nn.Module) -> set[str]:
    """Functions that drop something in a pass over four tokens in train mode; the random state stays."""
    base: Any = unwrap_peft(model)
    weight = base.get_input_embeddings().weight
    ids = torch.arange(1, 5, device=weight.device, dtype=torch.int64)[None]
    devices = [weight.device] if weight.is_cuda else []
    with training_mode(model), torch.random.fork_rng(devices=devices), _Watch() as watch:
        base(input_ids=ids, use_cache=False)
    return watch.seen
