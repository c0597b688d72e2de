"""`SelfDistiller`: student pass, teacher pass, fused loss, metrics. No trainer, no data, no generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sdft_kernels.distill.batch import DistillBatch, FlatBatch, TokenIds
from sdft_kernels.distill.memory import give_back_freed_memory
from sdft_kernels.distill.metrics import token_metrics
from sdft_kernels.distill.passes import Passes
from sdft_kernels.distill.teacher import EMATeacher, ModelTeacher, Teacher, make_teacher
from sdft_kernels.divergence import (
    AffineTokenLoss,
    TokenDivergence,
    linear_divergence_loss,
    sdft_token_loss,
)
from sdft_kernels.models import HeadSpec, context_length, head_spec, verify_head
from sdft_kernels.models.hidden import TOKEN_BUDGET
from sdft_kernels.models.unsupported import refuse_unsupported
from sdft_kernels.prefix_attention import PrefixCache
from sdft_kernels.token_logprob import TokenLogprob, linear_token_logprob

logger = logging.getLogger(__name__)


class DistillOutput(NamedTuple):
    """What a `SelfDistiller` returns.

    Attributes:
        loss: 0-d, differentiable.
        metrics: detached 0-d tensors by name (nats; means over the tokens in the loss). Which names there are depends
            on the batch: reduce them over processes together, from one fixed list (`RunningMetrics`), never one by one.
        tokens: per-token numbers of the batch, (N,) each, packed over completions.
        mask: (N,) bool, True at the tokens in the loss.
        importance: (N,) detached importance weights where any are in use, else None.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: TokenDivergence
    mask: Tensor
    importance: Tensor | None


class SelfDistiller:
    """Self-distillation of a transformers causal language model, for any training loop.

        distiller = SelfDistiller(model)
        distiller.attach(optimizer)
        out = distiller(batch)
        out.loss.backward(); optimizer.step()

    The loss is the mean over a completion's tokens, then over the completions of the batch (the released SDFT code and
    TRL): token weights 1 / (length * completions). A completion whose tokens are all masked still counts; a batch
    without a token gives 0, connected to the graph. No logits are materialised.

    Args:
        model: the student; the caller owns its mode, device and dtype. PEFT models (LoRA on the backbone) are fine.
        teacher: see `make_teacher`: None (frozen under LoRA, else ema), "frozen", "live", "ema", a model, a `Teacher`.
        ema_rate: share of the student in every EMA update.
        ema_device: where the EMA state lives; None is beside the parameters.
        ema_dtype: of the EMA state: fp32, or bf16 for a compensated pair of bf16 tensors (`make_teacher`).
        alpha: 0 is KL(teacher || student), the paper's code; 1 is KL(student || teacher); between, the generalized JSD.
        temperature: of both distributions.
        skip_first_tokens: completion tokens left out at the start of every completion (the paper's code: 3). A shorter
            one has nothing in the loss, which is said once in a warning.
        importance_clip: upper limit of the per-token ratio exp(student - old_logprobs); None is no ratio.
        sampling_clip: upper limit of exp(old - sampling_logprobs) before its mean over a completion (paper's code: 2).
        loss: "kl", or "ce": cross-entropy on the completions, without a teacher pass.
        token_loss: replaces `alpha`: an `AffineTokenLoss` with float weights, or a callable (tokens, index) -> (C,),
            elementwise over tokens. Multiplied by the token weights above, and by the importance ratio.
        memory_budget: bytes the fused loss may use; None is the op's default.
        token_budget: padded tokens per forward pass of the backbone.
        share_prefix: compute what completions have in common (their prompts) once, for student and teacher. None: where
            the model allows it, else separately, with the reason logged. True: or raise. False: separately. The same
            numbers to rounding. Changes the model's attention implementation (`enable_shared_prefix`).
        prefix_cache: of keys and values of teacher prompts, kept across batches: a `PrefixCache`, its bytes, or None: 1
            GiB where the teacher does not change, else none.
        impl: of the op, "auto" or by name.
        verify: compare the head with the model's own logits on four tokens now (`verify_head`).

    Raises:
        ValueError, NotImplementedError: from `head_spec`, `verify_head` and `make_teacher`; a model that is sharded or
            fp16; vocabularies that differ.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: str | nn.Module | Teacher | None = None,
        ema_rate: float = 0.01,
        alpha: float = 0.0,
        temperature: float = 1.0,
        skip_first_tokens: int = 3,
        importance_clip: float | None = None,
        *,
        ema_device: torch.device | str | None = None,
        ema_dtype: torch.dtype = torch.float32,
        sampling_clip: float = 2.0,
        loss: Literal["kl", "ce"] = "kl",
        token_loss: AffineTokenLoss | Any | None = None,
        memory_budget: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        share_prefix: bool | None = None,
        prefix_cache: PrefixCache | int | None = None,
        impl: str = "auto",
        verify: bool = True,
    ) -> None:
        check_options(alpha, temperature, skip_first_tokens, importance_clip, loss, sampling_clip)
        _check_token_loss(token_loss, loss)
        for role, side in (("student", model), ("teacher", teacher)):
            inner = side.model if isinstance(side, Teacher) else side
            if isinstance(inner, nn.Module):
                refuse_unsupported(inner, role)
        if verify:
            verify_head(model)
        self.model = model
        self.teacher = make_teacher(model, teacher, ema_rate=ema_rate, device=ema_device, ema_dtype=ema_dtype)
        if isinstance(self.teacher, ModelTeacher):
            _check_vocabulary(head_spec(model), self.teacher.head())
        self.alpha, self.temperature, self.skip_first_tokens = float(alpha), float(temperature), skip_first_tokens
        self.importance_clip, self.sampling_clip = importance_clip, sampling_clip
        self.loss, self.token_loss = loss, token_loss
        self.op_options: dict[str, Any] = dict(temperature=self.temperature, memory_budget=memory_budget, impl=impl)
        self.passes = Passes(model, self.teacher, share_prefix, prefix_cache, token_budget)
        self._handle: Any = None
        self._training_forwards = 0
        self._warned_of_short = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the teacher after every step of `optimizer`; replaces an earlier attachment.

        A step that a `GradScaler` skips does not count, whether the scaler leaves out the step or (fused optimizers)
        the optimizer itself does.
        """
        self.detach()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Undo `attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler while a fused optimizer steps
        if found_inf is None or not found_inf.item():
            self.teacher.update()
            self.passes.weights_changed()

    def __call__(self, batch: DistillBatch, num_completions: int | None = None) -> DistillOutput:
        """Loss and metrics of one batch.

        Args:
            batch: the completions and both prompts.
            num_completions: divisor of the sum over completions, for gradient accumulation: the completions of all
                micro-batches together. None is this batch's own.

        Raises:
            ValueError: a sequence longer than a model's context, a missing teacher prompt.
            RuntimeError: an EMA teacher that was never attached to an optimizer, at the second training forward.
        """
        self._check_attached()
        batch.check_context(context_length(self.model), context_length(self.teacher.model))
        flat = batch.flatten()
        self._warn_of_short(flat.lengths)
        head = head_spec(self.model)
        device = head.weight.device
        target = torch.tensor([t for c in flat.completions for t in c], dtype=torch.int64, device=device)
        mask = self._mask(flat, device)
        taught = self._teacher_pass(flat.teacher_prompts, flat.completions) if self.loss == "kl" else None
        student_input = self.passes.student_states(flat.student_prompts, flat.completions)
        weight, ratio = self._token_weights(flat, mask, num_completions, student_input, target, head)
        if taught is None:
            loss, tokens = self._cross_entropy(flat, mask, weight, student_input, target, head)
        else:
            teacher_input, teacher_head = taught
            inputs: dict[str, Any] = dict(
                student_input=student_input, teacher_input=teacher_input, target=target, mask=mask
            )
            heads = head.kwargs("student") | teacher_head.kwargs("teacher") | self.op_options
            loss, tokens = linear_divergence_loss(**inputs, token_loss=self._token_loss(flat, weight), **heads)
        if not len(target):
            loss = loss + self._zero_with_graph()
        importance = self._importance(flat, tokens, ratio)
        metrics = token_metrics(tokens, mask, importance, with_teacher=self.loss == "kl")
        metrics |= self.passes.take_metrics(mask.device)
        if torch.is_grad_enabled():
            give_back_freed_memory(device)
        return DistillOutput(loss, metrics, tokens, mask, importance)

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's state; the student's is the model's own."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`; raises ValueError where it does not fit."""
        self.teacher.load_state_dict(state)
        self.passes.weights_loaded()

    def _check_attached(self) -> None:
        if not (torch.is_grad_enabled() and self.model.training):
            return
        self._training_forwards += 1
        if self._training_forwards > 1 and self._handle is None and isinstance(self.teacher, EMATeacher):
            raise RuntimeError(
                "the EMA teacher follows no optimizer: call distiller.attach(optimizer) before training "
                "(or choose teacher='frozen')"
            )

    def _warn_of_short(self, lengths: list[int]) -> None:
        """Say once that completions are too short for `skip_first_tokens` to leave anything of them in the loss."""
        short = sum(0 < length <= self.skip_first_tokens for length in lengths)
        if short and not self._warned_of_short:
            self._warned_of_short = True
            logger.warning(
                "%d of the %d completions of a batch have no token in the loss: skip_first_tokens=%d (in SDFTConfig: "
                "num_loss_tokens_to_skip) leaves out all that they have. Lower it where answers are that short; this "
                "is said once",
                short, len(lengths), self.skip_first_tokens,
            )  # fmt: skip

    def _teacher_pass(self, prompts: list[TokenIds] | None, completions: list[TokenIds]) -> tuple[Tensor, HeadSpec]:
        if prompts is None:
            raise ValueError("teacher_prompts is None; only loss='ce' does without")
        return self.passes.teacher_states(prompts, completions), self.teacher.head()

    def _mask(self, flat: FlatBatch, device: torch.device) -> Tensor:
        """(N,) bool: tokens in the loss."""
        position = [i for length in flat.lengths for i in range(length)]
        mask = torch.tensor(position, dtype=torch.int64, device=device) >= self.skip_first_tokens
        if flat.loss_mask is not None:
            mask = mask & torch.tensor(flat.loss_mask, dtype=torch.bool, device=device)
        return mask

    @torch.no_grad()
    def _token_weights(
        self,
        flat: FlatBatch,
        mask: Tensor,
        num_completions: int | None,
        student_input: Tensor,
        target: Tensor,
        head: HeadSpec,
    ) -> tuple[Tensor, Tensor | None]:
        """((N,) fp32 weights 1 / (length * completions), times the caller's; (N,) truncated sampling ratio or None)."""
        lengths = torch.tensor(flat.lengths, dtype=torch.int64, device=mask.device)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device=mask.device), lengths)
        counted = _sum_by(mask.float(), sequence, len(lengths)).clamp(min=1)
        weight = 1.0 / (counted[sequence] * max(num_completions or len(lengths), 1))
        if flat.weights is not None:
            weight = weight * torch.tensor(flat.weights, dtype=torch.float32, device=mask.device)
        if flat.sampling_logprobs is None:
            return weight, None
        old = flat.old_logprobs
        if old is None:
            old_logprob = self._logprob(student_input, target, head, None, ("logprob",)).logprob.float()
        else:
            old_logprob = torch.tensor(old, dtype=torch.float32, device=mask.device)
        sampling = torch.tensor(flat.sampling_logprobs, dtype=torch.float32, device=mask.device)
        gap = old_logprob - sampling
        truncated = gap.clamp(-20, 20).exp().clamp(max=self.sampling_clip)
        per_sequence = _sum_by(truncated, sequence, len(lengths)) / lengths.clamp(min=1)
        # NaN stands for a completion that came without (`DistillBatch`).
        ratio = per_sequence[sequence].where(~sampling.isnan(), 1.0)
        return weight * ratio, ratio

    def _logprob(
        self, hidden: Tensor, target: Tensor, head: HeadSpec, mask: Tensor | None, outputs: tuple[str, ...]
    ) -> TokenLogprob:
        options = {name: self.op_options[name] for name in ("temperature", "memory_budget")}
        impl = self.op_options["impl"] if self.op_options["impl"] in ("reference", "torch") else "auto"
        return linear_token_logprob(
            hidden, head.weight, target, mask=mask, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            outputs=outputs, impl=impl, **options,
        )  # fmt: skip

    def _cross_entropy(
        self, flat: FlatBatch, mask: Tensor, weight: Tensor, student_input: Tensor, target: Tensor, head: HeadSpec
    ) -> tuple[Tensor, TokenDivergence]:
        """Minus the weighted log-probability of the completions: one projection, no teacher."""
        numbers = self._logprob(student_input, target, head, mask, ("logprob", "entropy"))
        detached = TokenDivergence(student_logprob=numbers.logprob.detach(), student_entropy=numbers.entropy.detach())
        importance = self._importance(flat, detached, None)
        if importance is not None:
            weight = weight * importance
        return -(weight.where(mask, 0.0) * numbers.logprob).sum(), detached

    def _token_loss(self, flat: FlatBatch, weight: Tensor) -> Any:
        old = None
        if self.importance_clip is not None and flat.old_logprobs is not None:
            old = torch.tensor(flat.old_logprobs, dtype=torch.float32, device=weight.device)
        clip = None if old is None else self.importance_clip
        if self.token_loss is None:
            return sdft_token_loss(self.alpha, weight, old, clip)
        if isinstance(self.token_loss, AffineTokenLoss):
            scaled: dict[str, Any] = {name: value * weight for name, value in self.token_loss.weights().items()}
            return AffineTokenLoss(**scaled, alpha=self.token_loss.alpha, old_logprob=old, importance_clip=clip)
        return _scaled(self.token_loss, weight, old, clip)

    def _importance(self, flat: FlatBatch, tokens: TokenDivergence, ratio: Tensor | None) -> Tensor | None:
        """(N,) importance weights in use, or None."""
        if self.importance_clip is None or flat.old_logprobs is None or tokens.student_logprob is None:
            return ratio
        gap = tokens.student_logprob - torch.tensor(
            flat.old_logprobs, dtype=torch.float32, device=tokens.student_logprob.device
        )
        clipped = gap.clamp(-20, 20).exp().clamp(max=self.importance_clip)
        return clipped if ratio is None else clipped * ratio

    def _zero_with_graph(self) -> Tensor:
        """0 connected to every trained parameter: backward and gradient synchronisation run as in any other step."""
        trained = [p.flatten()[:0].sum() for p in self.model.parameters() if p.requires_grad]
        return torch.stack(trained).sum() if trained else torch.zeros((), dtype=torch.float32)


def _scaled(token_loss: Any, weight: Tensor, old: Tensor | None, clip: float | None) -> Any:
    """A callable token loss times the weight of its tokens, and their importance ratio, (N,) each."""

    def scaled(tokens: TokenDivergence, index: Tensor) -> Tensor:
        value: Tensor = token_loss(tokens, index) * weight[index]
        if old is None or clip is None or tokens.student_logprob is None:
            return value
        gap = tokens.student_logprob.detach() - old[index]
        return value * gap.clamp(-20, 20).exp().clamp(max=clip)

    return scaled


def _sum_by(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add_(0, group, values)


def _check_vocabulary(student: HeadSpec, teacher: HeadSpec) -> None:
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {student.weight.shape[0]} and {teacher.weight.shape[0]} "
            "tokens"
        )


def check_options(
    alpha: float,
    temperature: float,
    skip_first_tokens: int,
    importance_clip: float | None,
    loss: str,
    sampling_clip: float = 2.0,
) -> None:
    """Raise ValueError where an option of `SelfDistiller` is out of range."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], got {alpha}")
    if not isinstance(skip_first_tokens, int) or skip_first_tokens < 0:
        raise ValueError(f"skip_first_tokens must be a non-negative int, got {skip_first_tokens!r}")
    positive = dict(temperature=temperature, importance_clip=importance_clip, sampling_clip=sampling_clip)
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if loss not in ("kl", "ce"):
        raise ValueError(f"loss must be 'kl' or 'ce', got {loss!r}")


def _check_token_loss(token_loss: Any, loss: str) -> None:
    if token_loss is None:
        return
    if loss == "ce":
        raise ValueError("token_loss and loss='ce' exclude each other")
    if not isinstance(token_loss, AffineTokenLoss):
        if not callable(token_loss):
            raise TypeError(f"token_loss must be an AffineTokenLoss or a callable, got {type(token_loss).__name__}")
        return
    if token_loss.mean or token_loss.old_logprob is not None:
        raise ValueError("token_loss: leave out mean and old_logprob, which the distiller supplies per batch")
    if any(isinstance(value, Tensor) for value in token_loss.weights().values()):
        raise ValueError("token_loss: give float weights; per-token ones belong into DistillBatch.weights")
