"""The teacher: the same model with other weights (frozen, live or averaged), or another model.

A teacher of the same model keeps only tensors for the parameters that train; during its pass they stand in for the
student's, parameter by parameter, so frozen parameters, buffers and the adapter structure are shared. Under LoRA that
makes an EMA teacher a second set of adapter weights, a few MB.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels._ema import ema_update_, ema_update_hilo_, split_hilo
from sdft_kernels.models import HeadSpec, head_spec
from sdft_kernels.models.hidden import evaluation_mode

logger = logging.getLogger(__name__)

KINDS = ("frozen", "live", "ema")
LATER_KINDS = ("sync", "cached")
ALIASES = {"base": "frozen"}  # TRL's name
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
    """A frozen model of the caller's, possibly of another size (same vocabulary)."""

    kind = "model"

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


class AdapterOffTeacher(Teacher):
    """The base model under LoRA: adapters off. Costs nothing."""

    kind = "frozen"

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        # enable_adapters switches requires_grad of the adapter weights, which are the student's.
        trainable = [(p, p.requires_grad) for p in self.model.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


class SwapTeacher(Teacher):
    """Own tensors for the student's trained parameters, swapped in during the teacher's pass."""

    kind = "frozen"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError("no parameter of the model requires grad; use teacher='live'")
        self.copies = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in self.names.items()}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
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
        teacher: "frozen" (the student as it is now; under LoRA the base, adapters off), "live" (the student itself),
            "ema" (an average of the student; under LoRA of its adapter), a model (frozen, the caller's), a `Teacher`,
            or None: frozen under LoRA, else ema. TRL's "base" is "frozen".
        ema_rate: share of the student in every update.
        device: where the state of an EMA lives ("cpu" to spare accelerator memory); None is the parameters'.
        ema_dtype: of that state: fp32, or bf16 for a compensated pair of bf16 tensors. A bf16 model runs with the first
            of the pair: 4 bytes a parameter in place of 6. For an fp32 model fp32 is smaller, its state being the copy.

    Raises:
        NotImplementedError: "sync" and "cached".
        ValueError: an unknown kind, a rate outside (0, 1], another `ema_dtype`.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        made: Teacher = ModelTeacher(teacher) if teacher is not model else LiveTeacher(model)
    else:
        default = "frozen" if only_lora(model) else "ema"
        kind = default if teacher is None else ALIASES.get(teacher, teacher)
        if kind in LATER_KINDS:
            raise NotImplementedError(f"teacher={kind!r} is not supported yet; use one of {KINDS}")
        if kind == "live":
            made = LiveTeacher(model)
        elif kind == "ema":
            made = EMATeacher(model, ema_rate, device, ema_dtype)
        elif kind == "frozen":
            made = AdapterOffTeacher(model) if only_lora(model) else SwapTeacher(model)
        else:
            raise ValueError(f"teacher must be one of {KINDS}, a model, or None; got {teacher!r}")
    logger.info("teacher: %s, %.1f MiB beyond the student", made.kind, made.nbytes / 2**20)
    return made


def only_lora(model: nn.Module) -> bool:
    """Whether the model carries LoRA adapters and nothing else trains."""
    if not getattr(model, "peft_config", None):
        return False
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return bool(trained) and all("lora_" in name for name in trained)


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
