"""What no student and no teacher may be, by whatever entry it comes: sharded, or fp16. Said before any work is done."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from sdft_kernels.models.hidden import unwrap_peft


def refuse_unsupported(model: nn.Module, role: str = "model") -> None:
    """Raise where `model` is sharded (`refuse_sharded`) or in fp16 (`refuse_fp16`).

    Args:
        model: a model, PEFT model or wrapper.
        role: its name in the message.
    """
    refuse_sharded(model, role)
    refuse_fp16(model, role)


def refuse_sharded(model: nn.Module, role: str = "model") -> None:
    """Raise NotImplementedError where a module of `model` is an FSDP unit or a tensor of it is sharded.

    After a forward in eval mode an FSDP2 unit has its parameters whole and of the plain class, until the next one frees
    them: a reference kept to one reads freed memory. So the units are looked for, not only the tensors.
    """
    found = _sharded(model)
    if found:
        raise NotImplementedError(
            f"the {role} is sharded: {found}. Sharded models are not supported yet: use DDP, or one device "
            "(DeepSpeed ZeRO-1/2 keep the parameters whole)"
        )


def _sharded(model: nn.Module) -> str | None:
    """The first thing in `model` that is sharded, in words."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: no model can be wrapped by it
    units = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, units):
            kind = "FSDP2 (fully_shard)" if isinstance(module, fsdp.FSDPModule) else "FSDP1"
            return f"{name or 'the whole'} is an {kind} unit"
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if hasattr(tensor, "ds_id"):
                return f"{name} is partitioned by DeepSpeed ZeRO-3"
            if hasattr(tensor, "placements"):
                return f"{name} is a DTensor (FSDP2 or tensor parallel)"
    return None


def refuse_fp16(model: nn.Module, role: str = "model") -> None:
    """Raise ValueError where the head or the embedding of `model` is fp16, as the op would at the first batch."""
    base = unwrap_peft(model)
    for layer in ("get_output_embeddings", "get_input_embeddings"):
        module = getattr(base, layer)() if hasattr(base, layer) else None
        if getattr(getattr(module, "weight", None), "dtype", None) == torch.float16:
            raise ValueError(
                f"the {role} is fp16, which is not supported (its range ends at 65504): load it with "
                "dtype=torch.bfloat16 or torch.float32, or call model.bfloat16()"
            )
