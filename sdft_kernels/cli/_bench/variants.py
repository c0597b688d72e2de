"""The losses that are timed, all as mean KL(teacher‖student) over tokens with gradients of student input and head.

A variant is a function ``make(inputs) -> loss_and_grad`` where ``loss_and_grad()`` returns the detached 0-d loss and
leaves both gradients in ``inputs.student_input.grad`` and ``inputs.student_weight.grad``. A name ``module:function``
times anyone's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft_kernels.cli._bench.case import parse_variant
from sdft_kernels.cli._bench.inputs import LossInputs

LossAndGrad = Callable[[], Tensor]

# 256 tokens make an fp32 tile of logits of 48 MiB at V = 49152, near a last-level cache. On CUDA the fp32 accumulator
# of dW is read and written once per chunk, so fewer chunks make the better floor.
_FLOOR_TOKENS = {"cpu": 256, "cuda": 2048}


def make_gemm4(inputs: LossInputs) -> LossAndGrad:
    """The floor: both logits, dH and dW as four matrix products in token chunks; no softmax, not a loss.

    CUDA: fp32 logits and an fp32 dW, as an exact loss needs. CPU: everything in the input's dtype, since PyTorch has
    no product of bf16 operands with an fp32 result there.
    """
    hidden, weight = inputs.student_input.detach(), inputs.student_weight.detach()
    exact = hidden.is_cuda and hidden.dtype != torch.float32
    fp32: dict[str, Any] = {"out_dtype": torch.float32} if exact else {}
    chunk = _FLOOR_TOKENS[hidden.device.type]

    @torch.no_grad()
    def four_products() -> Tensor:
        tokens = hidden.shape[0]
        rows = min(tokens, chunk)
        result = torch.float32 if exact else hidden.dtype
        student, teacher = torch.empty((2, rows, weight.shape[0]), dtype=result, device=hidden.device)
        # Converting logits is no matrix product: where the gradient's dtype differs, any operand of its size serves.
        gradient = torch.zeros_like(student, dtype=hidden.dtype) if exact else student
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight, dtype=result)
        for start in range(0, tokens, chunk):
            h = hidden[start : start + chunk]
            n = h.shape[0]
            torch.mm(h, weight.T, out=student[:n], **fp32)
            torch.mm(inputs.teacher_input[start : start + chunk], inputs.teacher_weight.T, out=teacher[:n], **fp32)
            torch.mm(gradient[:n], weight, out=grad_hidden[start : start + chunk])
            beta = 0.0 if start == 0 else 1.0
            torch.addmm(grad_weight, gradient[:n].T, h, beta=beta, out=grad_weight, **fp32)
        return teacher[0, 0].clone()

    return four_products


def make_plain(inputs: LossInputs) -> LossAndGrad:
    """PyTorch with full logits in fp32, as a careful user writes it."""

    def loss_and_grad() -> Tensor:
        with torch.no_grad():
            teacher = (inputs.teacher_input @ inputs.teacher_weight.T).float().log_softmax(-1)
        student = (inputs.student_input @ inputs.student_weight.T).float().log_softmax(-1)
        loss = F.kl_div(student, teacher, reduction="sum", log_target=True) / student.shape[0]
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_trl_full(inputs: LossInputs) -> LossAndGrad:
    """TRL's SDFT trainer with ``distillation_mode="full_logits"``, alpha 0: full logits in the model's dtype."""
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    def loss_and_grad() -> Tensor:
        with torch.no_grad():
            teacher = inputs.teacher_input @ inputs.teacher_weight.T
        student = inputs.student_input @ inputs.student_weight.T
        loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0).mean()
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_trl_kernel(inputs: LossInputs) -> LossAndGrad:
    """TRL's own chunked kernel (Triton on CUDA, its PyTorch path on CPU), beta 0."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss_and_grad() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            inputs.student_input, inputs.student_weight, None, inputs.teacher_input, inputs.teacher_weight, None, 0.0
        )
        loss = divergence.mean()
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_liger_chunked(inputs: LossInputs) -> LossAndGrad:
    """Liger's PyTorch chunks, beta 0, its hard loss weighted 0; not compiled, as TRL called it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    labels = torch.zeros(inputs.student_input.shape[0], dtype=torch.long, device=inputs.student_input.device)

    def loss_and_grad() -> Tensor:
        loss = loss_module(
            inputs.student_input, inputs.student_weight, inputs.teacher_input, inputs.teacher_weight, labels
        )
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_liger_triton(inputs: LossInputs) -> LossAndGrad:
    """Liger's Triton kernel, beta 0."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss_module = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss_and_grad() -> Tensor:
        loss = loss_module(inputs.student_input, inputs.student_weight, inputs.teacher_input, inputs.teacher_weight)
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_sdft_torch(inputs: LossInputs) -> LossAndGrad:
    """`make_sdft` with the PyTorch row kernels, whatever the run's implementation is."""
    return make_sdft(replace(inputs, impl="torch"))


def make_sdft(inputs: LossInputs) -> LossAndGrad:
    """This package's `linear_divergence_loss` with its default token loss: value and gradient in one pass (4G)."""
    from sdft_kernels import linear_divergence_loss

    def loss_and_grad() -> Tensor:
        loss, _ = linear_divergence_loss(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            memory_budget=inputs.memory_budget,
            impl=inputs.impl,
        )
        loss.backward()
        return loss.detach()

    return loss_and_grad


def make_sdft_tokens(inputs: LossInputs) -> LossAndGrad:
    """This package's `linear_divergence`: per-token values, logits recomputed in backward (6G)."""
    from sdft_kernels import linear_divergence

    def loss_and_grad() -> Tensor:
        tokens = linear_divergence(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            memory_budget=inputs.memory_budget,
            impl=inputs.impl,
        )
        assert tokens.kl_teacher_student is not None
        loss = tokens.kl_teacher_student.mean()
        loss.backward()
        return loss.detach()

    return loss_and_grad


@dataclass(frozen=True)
class Variant:
    """How to make a variant; `is_loss` is False for the floor, which has no value to check."""

    make: Callable[[LossInputs], LossAndGrad]
    is_loss: bool = True


VARIANTS = {
    "gemm4": Variant(make_gemm4, is_loss=False),
    "plain": Variant(make_plain),
    "trl_full": Variant(make_trl_full),
    "trl_kernel": Variant(make_trl_kernel),
    "liger_chunked": Variant(make_liger_chunked),
    "liger_triton": Variant(make_liger_triton),
    "sdft": Variant(make_sdft),
    "sdft_tokens": Variant(make_sdft_tokens),
    "sdft_torch": Variant(make_sdft_torch),
}


def find_variant(name: str) -> Variant:
    """Return the variant called `name`, importing ``module:function`` names.

    Raises:
        ValueError: no such variant, or the function does not exist.
    """
    if parse_variant(name) in VARIANTS:
        return VARIANTS[name]
    module_name, _, function_name = name.partition(":")
    make = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(make):
        raise ValueError(f"variant {name!r}: {module_name} has no function {function_name!r}")
    return Variant(make)
