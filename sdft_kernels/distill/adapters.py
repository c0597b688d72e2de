"""What a teacher needs of PEFT adapters: their state, read, set and put back; whether they change the model at all.

PEFT's layers are recognised by the attributes they have, so that nothing is imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

# Of each adapted layer, whether its adapters are off and which are active.
AdapterState = Mapping[Any, tuple[bool, Any]]

# Parts of an adapter whose product is all it adds. Any other part (DoRA's magnitudes, a module trained whole, …) is
# taken to change the model.
FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# Of `LoraConfig.init_lora_weights`, those that leave the base weights as they were. PiSSA, OLoRA, CorDA, LoftQ and
# LoRA-GA put the adapter's share aside; so may what comes later.
INIT_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of `model` that carry adapters, and its wrappers of modules that are trained whole."""
    return [module for module in model.modules() if hasattr(module, "adapter_layer_names")]


def only_lora(model: nn.Module) -> bool:
    """Whether the model carries LoRA adapters and nothing else trains."""
    if not getattr(model, "peft_config", None):
        return False
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return bool(trained) and all("lora_" in name for name in trained)


def adapter_state(model: nn.Module) -> AdapterState:
    """The state of every adapted layer now."""
    return {layer: (layer._disable_adapters, layer._active_adapter) for layer in adapter_layers(model)}


@contextlib.contextmanager
def adapters_as(model: nn.Module, state: AdapterState) -> Iterator[None]:
    """The adapters in `state`, off in layers that it does not name; every layer's own state afterwards.

    PEFT's `enable_adapters` and `set_adapter` also rewrite requires_grad, which is the student's, and switch on what
    was off. So the two attributes that a layer's forward reads are set, and nothing else.

    Raises:
        ValueError: an adapter is merged into its layer's weight.
    """
    refuse_merged(model)
    before = adapter_state(model)
    for layer, (_, active) in before.items():
        layer._disable_adapters, layer._active_adapter = state.get(layer, (True, active))
    try:
        yield
    finally:
        for layer, (disabled, active) in before.items():
            layer._disable_adapters, layer._active_adapter = disabled, active


def refuse_merged(model: nn.Module) -> None:
    """Raise ValueError where adapters are merged into weights, which then hold student and base in one."""
    merged = sorted({name for layer in adapter_layers(model) for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(
            f"adapters {merged} are merged into the model's weights, where no teacher can tell them from the base, and "
            "the student's do not train: call model.unmerge_adapter() first"
        )


def adapters_change_nothing(model: nn.Module) -> bool:
    """Whether the model with its active adapters is the model without: of each product one factor is zero, exactly."""
    return all(_adds_nothing(layer, name) for layer in adapter_layers(model) for name in layer.active_adapters)


def _adds_nothing(layer: Any, adapter: str) -> bool:
    parts = dict(_parts(layer, adapter))
    if not parts:
        return True
    if adapter in getattr(layer, "lora_variant", {}) or not set(parts) <= {name for pair in FACTORS for name in pair}:
        return False
    return all(_product_is_zero(parts[a], parts[b]) for a, b in FACTORS if a in parts or b in parts)


def _product_is_zero(a: list[Tensor], b: list[Tensor]) -> bool:
    """The second may have a bias, which is added whatever the first is."""
    return _zero(b) or (len(b) == 1 and _zero(a))


def _zero(tensors: list[Tensor]) -> bool:
    return not any(bool(tensor.detach().any()) for tensor in tensors)


def _parts(layer: Any, adapter: str) -> Iterator[tuple[str, list[Tensor]]]:
    """By name, the tensors that `layer` holds for `adapter`."""
    for name in layer.adapter_layer_names:
        container = attrgetter(name)(layer)  # a name may hold dots
        if adapter in container:
            part = container[adapter]
            yield name, [part] if isinstance(part, Tensor) else list(part.parameters())


def refuse_changed_base(model: Any) -> None:
    """Raise ValueError where adapters off is not the base: an initialisation changed it, or it trains."""
    if not getattr(model, "peft_config", None):
        return
    for name, config in model.peft_config.items():
        init = getattr(config, "init_lora_weights", True)
        if init not in INIT_KEEPS_BASE:
            raise ValueError(
                f"teacher='base': adapter {name!r} has init_lora_weights={init!r}, which changes the base weights, so "
                "the model with adapters off is not the base: use teacher='frozen' (the model as it is now), or give "
                "the base as a second model"
            )
    parts = (part for layer in adapter_layers(model) for name in layer._get_available_adapters() for part in
             _parts(layer, name))  # fmt: skip
    adapters = {id(tensor) for _, tensors in parts for tensor in tensors}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    if trained:
        raise ValueError(
            f"teacher='base': {len(trained)} parameters outside the adapters train, {trained[:3]}, so the model with "
            "adapters off does not stay the base: use teacher='frozen' (the model as it is now)"
        )
