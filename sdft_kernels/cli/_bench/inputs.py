"""Inputs of the loss benchmark and their fp64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# 64 MiB of fp32 noise at a time: what builds the inputs must stay below the gradients whose memory it precedes.
_NOISE_ELEMENTS = 2**24

# Rows of W that the fp64 truth upcasts at a time.
_TRUTH_ROWS = 8192


@dataclass
class LossInputs:
    """Student and teacher of one benchmark case; the student's tensors are leaves that require grad.

    student_input, teacher_input: (N, H); student_weight, teacher_weight: (V, H); all of one dtype on one device.
    memory_budget (bytes, None: the default) and impl are for ``sdft`` variants only.
    """

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    memory_budget: int | None = None
    impl: str = "auto"

    def first_rows(self, count: int) -> LossInputs:
        """The same heads with the first `count` tokens, as new leaves."""
        return LossInputs(
            self.student_input.detach()[:count].clone().requires_grad_(),
            self.student_weight,
            self.teacher_input[:count].clone(),
            self.teacher_weight,
            self.memory_budget,
            self.impl,
        )

    def clear_gradients(self) -> None:
        """Drop both gradients, so that the next backward allocates them again."""
        self.student_input.grad = self.student_weight.grad = None

    def allocate_gradients(self) -> None:
        """Allocate both gradients and touch every page: the baseline of a memory measurement."""
        self.student_input.grad = torch.empty_like(self.student_input).fill_(1.0)
        self.student_weight.grad = torch.empty_like(self.student_weight).fill_(1.0)


def make_loss_inputs(
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    seed: int,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> LossInputs:
    """Return inputs in SDFT's normal state, teacher ≈ student: logits of standard deviation 3, KL about 0.05.

    A demonstration moves a 135M model's next-token distribution by a KL of 0.04 to 0.05 on tool-use data; the teacher's
    hidden states and head (an EMA copy) both differ from the student's here.
    """
    tokens, hidden, vocabulary = shape
    generator = torch.Generator(device).manual_seed(seed)
    student_input = _normal((tokens, hidden), 1.0, dtype, device, generator)
    student_weight = _normal((vocabulary, hidden), 3.0 * hidden**-0.5, dtype, device, generator)
    teacher_input = _normal((tokens, hidden), 0.1, dtype, device, generator, base=student_input)
    teacher_weight = _normal((vocabulary, hidden), 0.06 * hidden**-0.5, dtype, device, generator, base=student_weight)
    return LossInputs(
        student_input.requires_grad_(),
        student_weight.requires_grad_(),
        teacher_input,
        teacher_weight,
        memory_budget,
        impl,
    )


def _normal(
    size: tuple[int, int],
    std: float,
    dtype: str,
    device: str,
    generator: torch.Generator,
    base: Tensor | None = None,
) -> Tensor:
    """Return `base` (or zero) plus normal noise, rounded to `dtype` once, made in slices of rows."""
    out = torch.empty(size, dtype=DTYPES[dtype], device=device)
    rows = max(1, _NOISE_ELEMENTS // size[1])
    for start in range(0, size[0], rows):
        part = out[start : start + rows]
        noise = torch.randn(part.shape, generator=generator, device=device, dtype=torch.float32).mul_(std)
        part.copy_(noise if base is None else noise.add_(base[start : start + rows]))
    return out


@dataclass(frozen=True)
class Truth:
    """Mean forward KL(teacher‖student) in fp64, and what makes its gradient: (p_s − p_t)/N, shape (N, V), fp64."""

    loss: float
    logit_gradient: Tensor

    def relative_errors(self, inputs: LossInputs) -> tuple[float, float]:
        """Return ‖dH − truth‖/‖truth‖ and the same of dW, for the gradients held by `inputs`.

        Raises:
            ValueError: the variant left one of the two gradients empty.
        """
        if inputs.student_input.grad is None or inputs.student_weight.grad is None:
            raise ValueError("the variant computed no gradient of student_input or student_weight")
        hidden = inputs.student_input.detach().double()
        grad_input = torch.zeros_like(hidden)
        weight_error = weight_norm = 0.0
        for start in range(0, inputs.student_weight.shape[0], _TRUTH_ROWS):
            rows = slice(start, start + _TRUTH_ROWS)
            grad_input += self.logit_gradient[:, rows] @ inputs.student_weight.detach()[rows].double()
            grad_weight = self.logit_gradient[:, rows].T @ hidden
            weight_error += (inputs.student_weight.grad[rows].double() - grad_weight).square().sum().item()
            weight_norm += grad_weight.square().sum().item()
        input_error = (inputs.student_input.grad.double() - grad_input).norm() / grad_input.norm()
        return input_error.item(), (weight_error / weight_norm) ** 0.5


@torch.no_grad()
def forward_kl_truth(inputs: LossInputs) -> Truth:
    """Return the fp64 truth of the mean KL(teacher‖student) over all tokens of `inputs`, from its rounded values."""
    student, teacher = (
        _project_fp64(hidden, weight).log_softmax(-1)
        for hidden, weight in (
            (inputs.student_input, inputs.student_weight),
            (inputs.teacher_input, inputs.teacher_weight),
        )
    )
    tokens = student.shape[0]
    loss = (teacher.exp() * (teacher - student)).sum().item() / tokens
    return Truth(loss, student.exp_().sub_(teacher.exp_()).div_(tokens))


def _project_fp64(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float64, device=hidden.device)
    for start in range(0, weight.shape[0], _TRUTH_ROWS):
        rows = slice(start, start + _TRUTH_ROWS)
        torch.mm(hidden.double(), weight[rows].double().T, out=logits[:, rows])
    return logits
