"""The teacher: the same model with other weights (frozen, live or averaged), or another model.

A teacher of the same model keeps only tensors for the parameters that train; during its pass they stand in for the
student's, parameter by parameter, so frozen parameters, buffers and the adapter structure are shared. Under LoRA that
makes an EMA teacher a second set of adapter weights, a few MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels._ema import ema_update_, ema_update_hilo_, split_hilo
from sdft_kernels.distill.adapters import (
    adapter_state,
    adapters_as,
    adapters_change_nothing,
    only_lora,
    refuse_changed_base,
    refuse_merged,
)
from sdft_kernels.models import HeadSpec, head_spec
from sdft_kernels.models.hidden import evaluation_mode
from sdft_kernels.models.unsupported import refuse_sharded

logger = logging.getLogger(__name__)

KINDS = ("frozen", "base", "live", "ema")
LATER_KINDS = ("sync", "cached")
LOW = ":low"  # ends the name of a compensated average's second tensor in a state dict


class Teacher:
    """A teacher. Make one with `make_teacher`.

    Attributes:
        kind: "frozen", "live", "ema" or "model" (a model of the caller's).
        updates: number of updates done (ema).
    """

    kind = "live"
    updates = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model with the teacher's weights, in eval mode and without gradients; all restored afterwards."""
        try:
            with torch.no_grad(), evaluation_mode(self.model), self.weights():
                yield self.model
        finally:
            # torch releases before 2.13 may hand the student's pass weights that autocast cast here, without a graph.
            torch.clear_autocast_cache()

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """The teacher's weights in place of the student's."""
        yield

    def head(self) -> HeadSpec:
        """The teacher's head."""
        return head_spec(self.model)

    def update(self) -> None:
        """Follow the student after an optimizer step."""

    def distance(self) -> Tensor:
        """Euclidean distance of teacher and student over the trained parameters, a 0-d fp32 tensor."""
        return torch.zeros((), dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes this teacher holds beyond the student."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: names or shapes that do not fit this teacher.
        """
        if state:
            raise ValueError(f"a {self.kind} teacher has no state, got {len(state)} tensors")


class LiveTeacher(Teacher):
    """The student itself."""


class ModelTeacher(Teacher):
    """A frozen model of the caller's, possibly of another size (same vocabulary). Nothing in it changes."""

    kind = "model"

    def head(self) -> HeadSpec:
        """The teacher's head, without gradient whatever its parameters require."""
        head = super().head()
        bias = None if head.bias is None else head.bias.detach()
        return dataclasses.replace(head, weight=head.weight.detach(), bias=bias)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


class AdapterOffTeacher(Teacher):
    """The base model under PEFT: adapters off. Costs nothing.

    Raises:
        ValueError: adapters that are merged, here and at every pass.
    """

    kind = "frozen"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        refuse_merged(model)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        with adapters_as(self.model, {}):
            yield

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(
                f"this checkpoint's teacher is not the base with adapters off: it has {len(state)} tensors; resume "
                "with the teacher and the model, its adapter too, that the run started from"
            )


class SwapTeacher(Teacher):
    """Own tensors for the student's trained parameters, swapped in during the teacher's pass.

    Adapters are then on, off and active as they were when the teacher was made, whatever the student's are.

    Raises:
        ValueError: nothing trains; adapters are merged, here and at every pass.
        RuntimeError: at a pass or an update, the model trains other tensors than those this teacher was made for.
    """

    kind = "frozen"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError("no parameter of the model requires grad; use teacher='live'")
        refuse_merged(model)
        self.adapters = adapter_state(model)
        # Under every name, so that a tied parameter that is untied is missed.
        self.places = {name: p for name, p in _all_parameters(model) if p.requires_grad}
        self.copies = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in self.names.items()}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        with self._swapped(), adapters_as(self.model, self.adapters):
            yield

    def _check_parameters(self) -> None:
        """Raise RuntimeError where the model no longer trains exactly the tensors this teacher was made for."""
        copies, now = {id(p): self.copies[name] for name, p in self.names.items()}, dict(_all_parameters(self.model))
        for name, own in self.places.items():
            found, copy = now.pop(name, None), copies[id(own)]
            if found is None:
                raise _other_model(name, "is gone from the model")
            if found is not own and found is not copy:  # its copy, within this teacher's pass
                raise _other_model(name, "is another tensor")
            for what in ("shape", "dtype", "device"):
                before, after = getattr(copy, what), getattr(found, what)
                if before != after:
                    raise _other_model(name, f"changed its {what} from {before} to {after}")
        for name, parameter in now.items():
            if parameter.requires_grad:
                raise _other_model(name, "trains, and did not or was not there")

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        self._check_parameters()
        copies = {id(p): self.copies[name] for name, p in self.names.items()}
        # By identity over every module, so that a tied parameter is swapped wherever it occurs.
        places = [
            (module, key, parameter)
            for module in self.model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in copies
        ]
        for module, key, parameter in places:
            module._parameters[key] = copies[id(parameter)]
        try:
            yield
        finally:
            for module, key, parameter in places:
                module._parameters[key] = parameter

    def head(self) -> HeadSpec:
        with self.weights():
            return head_spec(self.model)

    @torch.no_grad()
    def distance(self) -> Tensor:
        return _distance(self.names, self.copies.items())

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.copies.values())

    def state_dict(self) -> dict[str, Tensor]:
        """A fingerprint only: a resumed run is given the model the run started from again."""
        return {"fingerprint": torch.stack([_fingerprint(p) for p in self.copies.values()])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()["fingerprint"]
        saved = state.get("fingerprint")
        if saved is None or saved.shape != own.shape or not torch.allclose(saved, own, rtol=1e-9, atol=0):
            raise ValueError(
                "the frozen teacher of this checkpoint had other weights: resume with the model the run started from, "
                "not with a checkpoint as the model"
            )


class StartingAdapterTeacher(SwapTeacher):
    """The student as it is now where its adapter changes it already: a copy of the adapter."""

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter the run started from."""
        return {name: copy.detach() for name, copy in self.copies.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            raise ValueError(
                "this checkpoint's frozen teacher is the base, adapters off, and the adapter of this model changed it "
                "when the teacher was made: resume with the model the run started from, or with teacher='base'"
            )
        _check_state(state, self.state_dict(), self.kind)
        for name, tensor in state.items():
            self.copies[name].copy_(tensor)


class EMATeacher(SwapTeacher):
    """An exponential moving average of the trained parameters: state += rate * (student - state), in fp32 arithmetic.

    In plain bf16 at rate 0.01 most updates round away: of a gap of 1 % to the student's weights 250 updates close 2 %
    instead of 92 % (`tests/test_distill_teacher.py`). So the state is fp32 whatever the model's dtype, and a 16-bit
    model gets a 16-bit copy of it for the teacher's pass. Or, with ``dtype=torch.bfloat16``, the state is the pair of
    bf16 tensors of `ema_update_hilo_`, and a bf16 model runs with its first: 4 bytes a parameter in place of 6.
    """

    kind = "ema"

    def __init__(
        self,
        model: nn.Module,
        rate: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"ema_rate must be within (0, 1], got {rate}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"ema_dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        super().__init__(model)
        self.rate = rate
        self.updates = 0
        # Where dtype and device already are the state's, the copy is the state.
        self.state = {name: c.detach().to(device=device, dtype=dtype) for name, c in self.copies.items()}
        # What bf16 rounds away; empty where the state is fp32.
        self.low: dict[str, Tensor] = {}
        if dtype == torch.bfloat16:
            self.low = {name: split_hilo(c)[1].to(self.state[name]) for name, c in self.copies.items()}

    def average(self, name: str) -> Tensor:
        """The average of one parameter, fp32; where the state is fp32, the state itself."""
        state = self.state[name]
        return state.float().add_(self.low[name]) if self.low else state

    @torch.no_grad()
    def update(self) -> None:
        self._check_parameters()
        for name, parameter in self.names.items():
            if self.low:
                ema_update_hilo_(self.state[name], self.low[name], parameter.detach(), self.rate)
            else:
                ema_update_(self.state[name], parameter.detach(), self.rate)
            self._refresh(name)
        self.updates += 1

    def _refresh(self, name: str) -> None:
        """Bring the copy that the teacher's pass uses up to the state."""
        if not self._shared(name):
            self.copies[name].copy_(self.average(name))

    def _shared(self, name: str) -> bool:
        return self.copies[name].data_ptr() == self.state[name].data_ptr()

    @torch.no_grad()
    def distance(self) -> Tensor:
        return _distance(self.names, ((name, self.average(name)) for name in self.state))

    @property
    def nbytes(self) -> int:
        own = [tensor for name, tensor in self.state.items() if not self._shared(name)] + list(self.low.values())
        return super().nbytes + sum(t.numel() * t.element_size() for t in own)

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.state, **{f"{name}{LOW}": tensor for name, tensor in self.low.items()}}

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._tensors(), "updates": torch.tensor(self.updates, dtype=torch.int64)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own, tensors = self._tensors(), {name: tensor for name, tensor in state.items() if name != "updates"}
        saved_low = any(name.endswith(LOW) for name in tensors)
        if saved_low != bool(self.low):
            saved, given = (torch.bfloat16 if low else torch.float32 for low in (saved_low, self.low))
            raise ValueError(f"this checkpoint's EMA was kept with ema_dtype={saved}, this teacher's has {given}")
        _check_state(tensors, own, self.kind)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        for name in self.state:
            self._refresh(name)
        self.updates = int(state["updates"])


def make_teacher(
    model: nn.Module,
    teacher: str | nn.Module | Teacher | None = None,
    *,
    ema_rate: float = 0.01,
    device: torch.device | str | None = None,
    ema_dtype: torch.dtype = torch.float32,
) -> Teacher:
    """The teacher for a student.

    Args:
        model: the student.
        teacher: "frozen": the student as it is now. Under LoRA whose adapter adds nothing yet (B is 0, as
            `get_peft_model` makes it) that is the model with adapters off, at no cost; under an adapter that adds
            something (trained before; PiSSA, OLoRA, CorDA, LoftQ, DoRA) it is a copy of the adapter.
            "base": under PEFT the model with adapters off, whatever the adapter adds now; else "frozen".
            "live": the student itself. "ema": an average of the student; under LoRA of its adapter. A model: frozen,
            the caller's. A `Teacher`. None: frozen under LoRA, else ema.
        ema_rate: share of the student in every update.
        device: where the state of an EMA lives ("cpu" to spare accelerator memory); None is the parameters'.
        ema_dtype: of that state: fp32, or bf16 for a compensated pair of bf16 tensors. A bf16 model runs with the first
            of the pair: 4 bytes a parameter in place of 6. For an fp32 model fp32 is smaller, its state being the copy.

    Raises:
        NotImplementedError: "sync" and "cached"; a sharded student or teacher (FSDP, ZeRO-3, tensor parallel).
        ValueError: an unknown kind, a rate outside (0, 1], another `ema_dtype`; nothing that trains; merged adapters;
            "base" where the adapter's initialisation changed the base weights or some of them train.
    """
    refuse_sharded(model, "student")
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        refuse_sharded(teacher, "teacher")
        made: Teacher = ModelTeacher(teacher) if teacher is not model else LiveTeacher(model)
    else:
        default = "frozen" if only_lora(model) else "ema"
        kind = default if teacher is None else teacher
        if kind in LATER_KINDS:
            raise NotImplementedError(f"teacher={kind!r} is not supported yet; use one of {KINDS}")
        if kind == "live":
            made = LiveTeacher(model)
        elif kind == "ema":
            made = EMATeacher(model, ema_rate, device, ema_dtype)
        elif kind == "frozen":
            made = _frozen(model)
        elif kind == "base":
            refuse_changed_base(model)
            made = AdapterOffTeacher(model) if getattr(model, "peft_config", None) else SwapTeacher(model)
        else:
            raise ValueError(f"teacher must be one of {KINDS}, a model, or None; got {teacher!r}")
    logger.info("teacher: %s, %.1f MiB beyond the student", made.kind, made.nbytes / 2**20)
    return made


def _frozen(model: nn.Module) -> Teacher:
    """The student as it is now, at the least cost."""
    if not only_lora(model):
        return SwapTeacher(model)
    if adapters_change_nothing(model):
        return AdapterOffTeacher(model)
    made = StartingAdapterTeacher(model)
    logger.warning(
        "the model's adapter adds something before the first step (it was trained before, or its initialisation does): "
        "the frozen teacher is the model as it is now, with a copy of the adapter (%.1f MiB). teacher='base' is the "
        "model with adapters off",
        made.nbytes / 2**20,
    )
    return made


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under every name that it has."""
    return model.named_parameters(remove_duplicate=False)


def _other_model(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"the teacher no longer fits its model: {name} {what} since the teacher was made. Change the model (resize, "
        "untie, move, cast, add or set adapters) first, then make the SelfDistiller or teacher, and attach it"
    )


def _distance(student: Mapping[str, Tensor], teacher: Iterable[tuple[str, Tensor]]) -> Tensor:
    gaps = [torch.linalg.vector_norm(student[n].detach().to(t).float() - t.float()) for n, t in teacher]
    return torch.linalg.vector_norm(torch.stack([gap.cpu() for gap in gaps]))


def _fingerprint(tensor: Tensor) -> Tensor:
    """Sum and sum of magnitudes, (2,) fp64 on the CPU."""
    values = tensor.detach().double()
    return torch.stack([values.sum(), values.abs().sum()]).cpu()


def _check_state(state: Mapping[str, Any], own: Mapping[str, Tensor], kind: str) -> None:
    if set(state) != set(own):
        odd = sorted(set(state) ^ set(own))
        raise ValueError(f"the state of the {kind} teacher does not fit this model: {len(odd)} names differ, {odd[:3]}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"the state of the {kind} teacher does not fit this model: {name} is {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}"
            )
