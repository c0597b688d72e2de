"""Variants of this package for ``bench loss``, named ``benchmarks.variants:sdft_callable`` and the like.

Both compute the mean KL(teacher‖student) and its gradients, as every variant must, so that the gate can judge them.
"""

from __future__ import annotations

import torch

from sdft_kernels import AffineTokenLoss, TokenDivergence, linear_divergence_loss
from sdft_kernels.cli._bench.inputs import LossInputs
from sdft_kernels.cli._bench.variants import LossAndGrad


def _loss_and_grad(inputs: LossInputs, token_loss: object) -> LossAndGrad:
    def loss_and_grad() -> torch.Tensor:
        loss, _ = linear_divergence_loss(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            token_loss=token_loss,
            impl=inputs.impl,
        )
        loss.backward()
        return loss.detach()

    return loss_and_grad


def sdft_callable(inputs: LossInputs) -> LossAndGrad:
    """A token loss that is a Python function: statistics and gradient are two row kernels with it between them."""
    tokens = inputs.student_input.shape[0]

    def mean(numbers: TokenDivergence, index: torch.Tensor) -> torch.Tensor:
        return numbers.kl_teacher_student / tokens

    return _loss_and_grad(inputs, mean)


def sdft_jsd(inputs: LossInputs) -> LossAndGrad:
    """All that a JSD of alpha 0.5 costs, and the KL on top: its weight is a tensor of zeros, which no one looks into.

    An upper bound of the cost of a JSD alone, with a value that the gate can check.
    """
    tokens = inputs.student_input.shape[0]
    zeros = torch.zeros(tokens, dtype=torch.float32, device=inputs.student_input.device)
    return _loss_and_grad(inputs, AffineTokenLoss(kl_teacher_student=1.0 / tokens, jsd=zeros, alpha=0.5))
