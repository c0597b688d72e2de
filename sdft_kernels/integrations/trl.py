"""TRL's `SDFTTrainer` without logits: the same loss, gradients and metrics through the fused ops.

    from sdft_kernels.integrations.trl import fuse
    trainer = fuse(SDFTTrainer(...))                    # or: FusedSDFTTrainer(...), the same arguments
    trainer.train()

The stock trainer holds student and teacher logits, (B, T, V) each, their log-softmaxes and gradients. Here the models'
backbones give (B*T, H) hidden states, and one op computes loss and gradient from them chunk by chunk. Temperature,
masks, `num_loss_tokens_to_skip`, the clipped importance ratio, the mean per sequence and then over the batch, and the
logged metrics are the stock trainer's. Completions of one prompt share it (`share_prefix`): it is computed once.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sdft_kernels.distill.passes import enable_sharing
from sdft_kernels.divergence import TokenDivergence, linear_divergence_loss, sdft_token_loss
from sdft_kernels.integrations.trl_prefix import completion_hidden
from sdft_kernels.models import head_kwargs, head_spec, verify_head
from sdft_kernels.models.hidden import unwrap_peft
from sdft_kernels.models.unsupported import refuse_sharded
from sdft_kernels.token_logprob import linear_token_logprob
from sdft_kernels.topk_divergence import linear_topk_divergence

if TYPE_CHECKING:
    from trl.experimental.sdft import SDFTTrainer

    class FusedSDFTTrainer(SDFTTrainer):
        """Typing only; built on first use by `fused_trainer_class`."""


OLDEST_TRL = (1, 16)
MODES = ("full_logits", "topk_logits", "sampled_token")

# What is overridden (first three) or called, with the parameters this module relies on. A release of TRL that changes
# one fails the signature test, and at run time `fused_trainer_class`, instead of training on another loss in silence.
TRL_SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "_compute_teacher_student_logits": ("self", "model", "teacher_model", "inputs"),
    "_compute_self_distillation_loss": ("self", "model", "inputs", "distillation_logits"),
    "_compute_rollout_logps": ("self", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    "_forward_logits": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_get_teacher_context_for_self_distillation": ("self",),
    "_log_self_distillation_metric": ("self", "mode", "value"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
}
# A subclass that changes one of these computes something from logits that the fused trainer would leave out.
NEED_LOGITS = tuple(TRL_SIGNATURES)[:4]
_FUSED_CLASSES: dict[type, type] = {}


@dataclass
class DeferredForward:
    """What `_compute_teacher_student_logits` returns here: the masks; the forward passes run inside the loss.

    Attributes:
        completion_ids: (B, T) int64.
        loss_mask: (B, T) int64, 1 at the tokens in the loss.
        teacher_model: the teacher.
    """

    completion_ids: Tensor
    loss_mask: Tensor
    teacher_model: Any

    @property
    def student_logits(self) -> Tensor:
        raise _no_logits("student_logits")

    @property
    def teacher_logits(self) -> Tensor:
        raise _no_logits("teacher_logits")


def _no_logits(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} do not exist in the fused SDFTTrainer, which computes its loss from hidden states. Code that reads "
        "logits needs the stock trl SDFTTrainer; trainer._forward_logits still computes those of one batch"
    )


class TokenBatch(NamedTuple):
    """One batch, flattened to N = B*T tokens.

    Attributes:
        student_input, teacher_input: (N, H) hidden states that predict the tokens.
        target: (N,) int64 completion tokens.
        mask: (N,) bool, True at the tokens in the loss.
        weight: (N,) 1 / (tokens in the loss of the sequence * B), 0 where masked.
        old_logprob: (N,) at rollout time, or None for no importance ratio.
    """

    student_input: Tensor
    teacher_input: Tensor
    target: Tensor
    mask: Tensor
    weight: Tensor
    old_logprob: Tensor | None


class _FusedMixin:
    """The overrides, in front of `SDFTTrainer` or a subclass of it."""

    args: Any
    accelerator: Any
    model: Any
    teacher_model: Any
    temperature: float
    num_iterations: int
    num_loss_tokens_to_skip: int
    _log_self_distillation_metric: Callable[[str, float], None]
    _get_teacher_context_for_self_distillation: Callable[[], AbstractContextManager]
    _memory_budget: int | None
    _shares_prefix: bool

    def __init__(
        self, *args: Any, memory_budget: int | None = None, share_prefix: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_trainer(self)
        _set_options(self, memory_budget, share_prefix)

    def _compute_teacher_student_logits(self, model: Any, teacher_model: Any, inputs: Mapping) -> DeferredForward:
        mask = inputs["completion_mask"]
        if self.num_loss_tokens_to_skip > 0:
            position = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
            mask = mask * (position >= self.num_loss_tokens_to_skip).to(mask.dtype)
        return DeferredForward(inputs["completion_ids"], mask, teacher_model)

    def _compute_self_distillation_loss(
        self, model: Any, inputs: Mapping, distillation_logits: DeferredForward
    ) -> Tensor:
        if not isinstance(distillation_logits, DeferredForward):
            raise TypeError(
                f"distillation_logits must be a DeferredForward, got {type(distillation_logits).__name__}: the fused "
                "SDFTTrainer computes its loss from hidden states, a loss on logits needs the stock trl SDFTTrainer"
            )
        student = self.accelerator.unwrap_model(model)

        def forward(inputs: Mapping) -> tuple[Tensor, Tensor]:
            with self.accelerator.autocast():
                batch = self._token_batch(student, inputs, distillation_logits)
                heads = head_kwargs(student, "student") | self._teacher_head(distillation_logits.teacher_model)
                return token_batch_loss(self.args, batch, heads | self._options())

        loss, mean = _inside_forward(model, student, forward, inputs)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return loss

    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """(B, T) log-probabilities of the completion under the student, 0 at padding; None where none are needed."""
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0:
            return None
        student = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self.accelerator.autocast():
            ids = torch.cat([prompt_ids, completion_ids], dim=1)
            attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
            hidden = self._hidden(student, ids, attention_mask, completion_ids.shape[1])
            head = head_spec(student)
            tokens = linear_token_logprob(
                hidden, head.weight, completion_ids.flatten(), mask=completion_mask.flatten().bool(), bias=head.bias,
                logit_scale=head.logit_scale, softcap=head.softcap, outputs=("logprob",), **self._options(),
            )  # fmt: skip
        return tokens.logprob.view(completion_ids.shape)

    def _options(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, memory_budget=self._memory_budget)

    def _token_batch(self, student: Any, inputs: Mapping, deferred: DeferredForward) -> TokenBatch:
        completion_ids = deferred.completion_ids
        sequences, length = completion_ids.shape
        student_input = self._hidden(
            student,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            length,
        )
        # The student first, as in the stock trainer: dropout draws the same numbers.
        teacher = self.accelerator.unwrap_model(deferred.teacher_model)
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            teacher_input = self._hidden(teacher, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], length)
        # fp64 weights for an fp64 model: 1/3 in fp32 would cost its loss 9 digits.
        dtype = torch.float64 if student_input.dtype == torch.float64 else torch.float32
        mask = deferred.loss_mask.to(dtype)
        weight = mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(sequences, 1))
        old = inputs.get("old_per_token_logps") if self.args.distillation_is_clip is not None else None
        return TokenBatch(
            student_input, teacher_input, completion_ids.flatten(), mask.flatten().bool(), weight.flatten(),
            None if old is None else old.flatten(),
        )  # fmt: skip

    def _hidden(self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """(B*length, H): the hidden states that predict the last `length` tokens, after the final norm."""
        return completion_hidden(model, input_ids, attention_mask, length, self._shares_prefix)

    def _teacher_head(self, teacher_model: Any) -> dict[str, Any]:
        """The teacher's head, without gradient whatever its parameters require (the stock teacher runs in no_grad)."""
        head = head_kwargs(self.accelerator.unwrap_model(teacher_model), "teacher")
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in head.items()}


def _inside_forward(model: Any, inner: Any, method: Callable[[Mapping], Any], inputs: Mapping) -> Any:
    """`method(inputs)`, inside the forward of the wrapper `model` where it is one.

    DDP prepares its gradient reduction in its own forward, for the parameters its output depends on: with
    `find_unused_parameters` a head used outside would be reduced twice, without gradients sync silently stops.
    """
    if model is inner:
        return method(inputs)
    from trl.models.utils import _ForwardRedirection

    return _ForwardRedirection()(model, inner, method, inputs)


def token_batch_loss(args: Any, batch: TokenBatch, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(loss, mean over the tokens): TRL's objective for `args.distillation_mode`, and its metric.

    Args:
        args: TRL's `SDFTConfig`: `distillation_mode`, `_alpha`, `_topk`, `_add_tail`, `_is_clip`.
        batch: the tokens.
        options: keyword arguments of `linear_divergence`: both heads, temperature, memory_budget.

    Returns:
        loss: 0-d, differentiable in the student's hidden states and head; the sum of weight * token loss. A batch
            without a token gives 0 with zero gradients, not none, as the stock trainer.
        mean: 0-d, detached, the mean token loss over the batch.

    Raises:
        ValueError: an unknown mode, a mode and an alpha that exclude each other, `topk_logits` without a k.
    """
    mode, alpha = args.distillation_mode, args.distillation_alpha
    if mode == "full_logits":
        loss, values = _full_loss(batch, alpha, args.distillation_is_clip, options)
    elif mode == "sampled_token":
        loss, values = _sampled_loss(batch, alpha, args.distillation_is_clip, options)
    elif mode == "topk_logits":
        loss, values = _topk_loss(batch, args, options)
    else:
        raise ValueError(f"distillation_mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    values = values.detach().where(batch.mask, 0.0)
    return loss, values.sum() / batch.mask.sum().clamp(min=1)


def _ratio(student_logprob: Tensor, old_logprob: Tensor | None, clip: float) -> Tensor | float:
    """The clipped importance ratio per token, without gradient: TRL's `apply_importance_sampling_clipping`."""
    if old_logprob is None:
        return 1.0
    return (student_logprob.detach() - old_logprob).clamp(-20, 20).exp().clamp(max=clip)


def _full_loss(batch: TokenBatch, alpha: float, clip: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    old = batch.old_logprob
    token_loss = sdft_token_loss(alpha, batch.weight, old, None if old is None else clip)
    loss, tokens = linear_divergence_loss(**_inputs(batch), token_loss=token_loss, **options)
    name = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}.get(float(alpha), "jsd")
    assert tokens.student_logprob is not None
    return loss, getattr(tokens, name) * _ratio(tokens.student_logprob, old, clip)


def _sampled_loss(batch: TokenBatch, alpha: float, clip: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if alpha != 1.0:
        raise ValueError(f"distillation_mode='sampled_token' supports only distillation_alpha=1.0, got {alpha}")

    def value(tokens: TokenDivergence, old: Tensor | None) -> Tensor:
        """The score-function surrogate of KL(student || teacher): its gradient counts, its value is no KL."""
        student, teacher = tokens.student_logprob, tokens.teacher_logprob
        assert student is not None and teacher is not None
        return (student - teacher).detach() * student * _ratio(student, old, clip)

    def token_loss(tokens: TokenDivergence, index: Tensor) -> Tensor:
        old = None if batch.old_logprob is None else batch.old_logprob[index]
        return batch.weight[index] * value(tokens, old)

    loss, tokens = linear_divergence_loss(**_inputs(batch), token_loss=token_loss, **options)
    return loss, value(tokens, batch.old_logprob)


def _topk_loss(batch: TokenBatch, args: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if args.distillation_topk is None:
        raise ValueError("distillation_mode='topk_logits' requires distillation_topk, got None")
    tokens = linear_topk_divergence(
        **_inputs(batch),
        k=args.distillation_topk,
        support="student",
        tail="bucket" if args.distillation_add_tail else "renormalize",
        alpha=args.distillation_alpha,
        **options,
    )
    assert tokens.student_logprob is not None
    values = tokens.divergence * _ratio(tokens.student_logprob, batch.old_logprob, args.distillation_is_clip)
    return (values * batch.weight).sum(), values


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return dict(
        student_input=batch.student_input, teacher_input=batch.teacher_input, target=batch.target, mask=batch.mask
    )


def fuse(trainer: Any, *, memory_budget: int | None = None, share_prefix: bool | None = None) -> Any:
    """Turn a stock TRL `SDFTTrainer` (or an instance of a subclass) into a fused one, in place.

    Args:
        trainer: the trainer, before or between calls of `train()`.
        memory_budget: bytes the fused op may use beyond its inputs and gradients; None is the op's default.
        share_prefix: compute what the completions of a batch have in common (their prompts) once, for student and
            teacher. None: where both models allow it. True: or raise. False: every sequence whole. The same numbers to
            rounding.

    Returns:
        The same object; its class is now a subclass of the one it had. A fused trainer gets the new options.

    Raises:
        ImportError: TRL is missing, older than 1.16, or has changed the methods used here.
        TypeError: not an `SDFTTrainer`, or a subclass that overrides what computes the loss from logits.
        ValueError, NotImplementedError: a setup that cannot be fused (see `check_trainer`); the trainer is unchanged.
    """
    base = _sdft_trainer()
    if not isinstance(trainer, base):
        raise TypeError(f"trainer must be a trl SDFTTrainer, got {type(trainer).__name__}")
    if not isinstance(trainer, _FusedMixin):
        fused = fused_trainer_class(type(trainer))
        check_trainer(trainer)
        trainer.__class__ = fused
    _set_options(trainer, memory_budget, share_prefix)
    return trainer


def _set_options(trainer: Any, memory_budget: int | None, share_prefix: bool | None) -> None:
    models = [trainer.accelerator.unwrap_model(model) for model in (trainer.model, trainer.teacher_model)]
    trainer._memory_budget, trainer._shares_prefix = memory_budget, enable_sharing(models, share_prefix)


def fused_trainer_class(base: Any = None) -> Any:
    """The fused subclass of `base`, TRL's `SDFTTrainer` (None) or a subclass of it; `base` itself if it is fused.

    Raises:
        ImportError, TypeError: as `fuse`.
    """
    stock = _sdft_trainer()
    base = stock if base is None else base
    if not issubclass(base, stock):
        raise TypeError(f"base must be trl's SDFTTrainer or a subclass of it, got {base.__name__}")
    if issubclass(base, _FusedMixin):
        return base
    if base in _FUSED_CLASSES:
        return _FUSED_CLASSES[base]
    for name in NEED_LOGITS:
        if getattr(base, name) is not getattr(stock, name):
            raise TypeError(
                f"{base.__name__} overrides {name}, which works on logits that the fused trainer does not compute: "
                "drop the override, or keep the stock trainer for it"
            )
    name = "FusedSDFTTrainer" if base is stock else f"Fused{base.__name__}"
    document = f"{base.__name__} without logits: same arguments plus memory_budget and share_prefix, see `fuse`."
    _FUSED_CLASSES[base] = type(name, (_FusedMixin, base), {"__module__": __name__, "__doc__": document})
    return _FUSED_CLASSES[base]


def _sdft_trainer() -> Any:
    """TRL's `SDFTTrainer`, of a release whose methods are the ones overridden here."""
    wanted = f"trl>={'.'.join(map(str, OLDEST_TRL))},<2"
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("sdft_kernels.integrations.trl needs trl: pip install 'sdft-kernels[trl]'") from error
    from packaging.version import Version

    if Version(version).release[:2] < OLDEST_TRL:
        raise ImportError(f"sdft_kernels.integrations.trl needs {wanted}, found trl {version}: pip install '{wanted}'")
    from trl.experimental.sdft import SDFTTrainer

    for name, expected in TRL_SIGNATURES.items():
        method = getattr(SDFTTrainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)
        if found != expected:
            raise ImportError(
                f"trl {version} changed SDFTTrainer.{name}: expected {expected}, found {found}. Install a release of "
                f"sdft_kernels that knows it, or {wanted}"
            )
    return SDFTTrainer


def check_trainer(trainer: Any) -> None:
    """Refuse what the fused trainer would get wrong.

    Raises:
        NotImplementedError: a teacher server, FSDP, DeepSpeed ZeRO-3, a model that is sharded already, DataParallel,
            torch_compile, a model spread over devices, fp16, an adapter on the head, prompt-learning PEFT.
        ValueError: an unknown mode; a head or logit post-processing that is not known; hooks on the head.
    """
    args, accelerator = trainer.args, trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if args.distillation_mode not in MODES:
        raise ValueError(
            f"distillation_mode must be one of {', '.join(map(repr, MODES))}, got {args.distillation_mode!r}"
        )
    for found, what, fix in _unsupported(trainer, model):
        if found:
            raise NotImplementedError(f"the fused SDFTTrainer does not support {what}: {fix}")
    for side in (model, accelerator.unwrap_model(trainer.teacher_model)):
        refuse_sharded(side)
        head_kwargs(side)
        head = unwrap_peft(side).get_output_embeddings()
        if head._forward_hooks or head._forward_pre_hooks:
            raise ValueError("forward hooks on the language-model head would not run in the fused loss: remove them")
    with accelerator.autocast():
        verify_head(model, rtol=None if accelerator.mixed_precision == "no" else 0.03)


def _unsupported(trainer: Any, model: Any) -> tuple[tuple[bool, str, str], ...]:
    """(found, what, what to do instead) of every setup that is refused."""
    args, state = trainer.args, trainer.accelerator.state
    plugin = getattr(state, "deepspeed_plugin", None)
    zero_stage = plugin.zero_stage if trainer.is_deepspeed_enabled and plugin is not None else 0
    devices = set(getattr(unwrap_peft(model), "hf_device_map", {}).values())
    half = trainer.accelerator.mixed_precision == "fp16" or unwrap_peft(model).dtype == torch.float16
    compiled = getattr(args, "torch_compile", False) or hasattr(model, "_orig_mod")
    return (
        (
            trainer.use_teacher_server,
            "use_teacher_server=True (its teacher has no hidden states here)",
            "set use_teacher_server=False, or keep the stock trainer",
        ),
        (trainer.is_fsdp_enabled, "FSDP (the head's weight is sharded)", "use DDP or DeepSpeed ZeRO-1/2"),
        (zero_stage == 3, "DeepSpeed ZeRO-3 (the head's weight is sharded)", "use ZeRO-1/2 or DDP"),
        (args.n_gpu > 1, "torch.nn.DataParallel", "start one process per GPU (accelerate launch, torchrun)"),
        (
            compiled,
            "torch_compile=True (it compiles the forward that computes logits)",
            "set it to False and compile the backbone in place: model.base_model.compile()",
        ),
        (len(devices) > 1, f"a model spread over {sorted(map(str, devices))}", "load it on one device"),
        (half, "fp16 (logits beyond 65504 overflow)", "use bf16=True, or fp32"),
    )


def __getattr__(name: str) -> Any:
    if name != "FusedSDFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = fused_trainer_class()
    return globals()[name]


__all__ = ["DeferredForward", "FusedSDFTTrainer", "check_trainer", "fuse", "fused_trainer_class"]
