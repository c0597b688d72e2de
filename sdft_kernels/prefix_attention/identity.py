"""What a cached key or value depends on besides the tokens: which model, in which state, with which weights.

PEFT adapters are recognised by the attributes that its layers have, so that nothing is imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Elements read of each parameter. The 273 parameters of a 135M model take 5 ms on one core, next to a pass of seconds.
SAMPLES = 64


class ModelState(NamedTuple):
    """What decides a model's keys and values besides its weights. Equal states of one model can share a prefix.

    Attributes:
        training: training mode, since dropout may be on.
        dtypes: of the floating parameters.
        autocast: its dtype on the model's device, None where it is off.
        adapters: of each adapted layer, its active adapters and those merged into its weight.
        rope: the configuration's rope parameters and position limits, as text.
    """

    training: bool
    dtypes: tuple[torch.dtype, ...]
    autocast: torch.dtype | None
    adapters: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    rope: str


class Fingerprint(NamedTuple):
    """Of the weights in use: each one's in-place version counter and a digest of a strided sample of its values."""

    versions: tuple[int, ...]
    digest: bytes


def unwrapped(model: Any) -> nn.Module:
    """The model inside a PEFT model, whose layers the two share; `model` itself if it is none."""
    inner: nn.Module = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return inner


def model_state(model: nn.Module) -> ModelState:
    """The state of `model` now."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    device = parameters[0].device.type if parameters else "cpu"
    return ModelState(
        training=model.training,
        dtypes=tuple(sorted({p.dtype for p in parameters}, key=str)),
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        adapters=tuple((_active(layer), tuple(getattr(layer, "merged_adapters", ()))) for layer in _adapted(model)),
        rope=_rope(getattr(model, "config", None)),
    )


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the parameters that `model` would use now; adapters that are off do not count.

    A write that neither counts as in place for autograd (through ``.data``) nor touches a sampled element is not seen.
    """
    unused = {id(p) for p in _inactive_parameters(model)}
    parameters = [p for p in model.parameters() if id(p) not in unused]
    # Inference tensors have no version counter.
    versions = tuple(0 if p.is_inference() else p._version for p in parameters)
    digest = hashlib.blake2b(digest_size=16)
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        sample = _sample(parameter)
        by_device.setdefault(sample.device, []).append(sample)
    for samples in by_device.values():
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return Fingerprint(versions, digest.digest())


def _sample(parameter: Tensor) -> Tensor:
    """Up to `SAMPLES` elements, as bytes."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # DTensor
    flat = local.detach().reshape(-1)
    if flat.is_meta:
        raise ValueError(
            "the model has parameters on the meta device (offloaded or not loaded): nothing to fingerprint"
        )
    # Odd, so that it is no multiple of a row's length, which would read one column only.
    return flat[:: max(1, flat.numel() // SAMPLES) | 1].contiguous().view(torch.uint8)


def _adapted(model: nn.Module) -> Iterator[Any]:
    """The layers that carry PEFT adapters."""
    return (module for module in model.modules() if hasattr(module, "adapter_layer_names"))


def _active(layer: Any) -> tuple[str, ...]:
    if getattr(layer, "disable_adapters", False):
        return ()
    return tuple(getattr(layer, "active_adapters", ()))


def _inactive_parameters(model: nn.Module) -> Iterator[Tensor]:
    for layer in _adapted(model):
        active = _active(layer)
        for name in layer.adapter_layer_names:
            container = getattr(layer, name, None)
            if not isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
                continue
            for adapter, part in container.items():
                if adapter not in active:
                    yield from _parameters(part)


def _parameters(part: nn.Module | Tensor) -> Iterable[Tensor]:
    return (part,) if isinstance(part, Tensor) else part.parameters()


def _rope(config: Any) -> str:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {} if text is None else vars(text)
    names = sorted(name for name in values if "rope" in name or "rotary" in name or "position_embeddings" in name)
    return repr([(name, values[name]) for name in names])
