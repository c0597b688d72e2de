"""Random runs of a `SelfDistiller`: a tiny model, an adapter, a teacher, a batch and options, drawn from a seed."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import torch
import transformers

VOCABULARY = 61
DTYPES = ("fp32", "fp32", "fp32", "bf16", "autocast")
ADAPTERS = ("none", "none", "lora", "rslora", "dora", "pissa", "two", "merged", "part")
MODES = ("grad", "grad", "grad", "grad", "no_grad", "inference")  # of one step
COMPLETIONS = (*(6 * ["given"]), "short", "empty", "greedy", "sampled", "equal")
TEACHERS = ("frozen", "live", "ema", "ema_pair", "model", "trained_model")

_WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
_WIDE = dict(head_dim=16)
# Family -> (name of its classes, what it adds to `_BASE`).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", _WINDOW | dict(use_sliding_window=True)),
    "qwen3": ("Qwen3", _WIDE),
    "gemma": ("Gemma", _WIDE),
    "gemma2": ("Gemma2", _WINDOW | _WIDE | dict(query_pre_attn_scalar=11, attn_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", _WINDOW | _WIDE | dict(query_pre_attn_scalar=11)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", dict(sliding_window=6)),
    "cohere": ("Cohere", dict(logit_scale=0.3)),
    "cohere2": ("Cohere2", _WINDOW | dict(logit_scale=0.3)),
    "granite": ("Granite", dict(logits_scaling=3.0, residual_multiplier=0.7, attention_multiplier=0.3)),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", dict(residual_dropout=0.0, embedding_dropout=0.0)),
    "stablelm": ("StableLm", {}),
    "nemotron": ("Nemotron", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    "opt": ("OPT", dict(dropout=0.0, word_embed_proj_dim=32, ffn_dim=48)),
    "bloom": ("Bloom", dict(hidden_dropout=0.0)),
    "falcon": ("Falcon", dict(hidden_dropout=0.0)),
}
_BASE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, attention_dropout=0.0, pad_token_id=0,
    bos_token_id=None, eos_token_id=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that a run depends on; `draw(seed)` makes it, and its repr is what a failure prints."""

    seed: int
    family: str
    tied: bool
    adapter: str
    teacher: str
    dtype: str
    training: bool
    modes: tuple[str, ...]
    default_dtype: str
    completions: str
    per_completion_prompts: bool
    fields: tuple[str, ...]
    num_completions: int | None
    options: dict[str, Any]


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    loss = r.choice(("kl", "kl", "kl", "ce"))
    options: dict[str, Any] = dict(
        loss=loss,
        temperature=r.choice((1.0, 1.0, 0.7, 2.0)),
        alpha=r.choice((0.0, 1.0, 0.5, 0.13)),
        skip_first_tokens=r.choice((0, 0, 0, 1, 3)),
        importance_clip=r.choice((None, 0.8, 3.0)),
        sampling_clip=r.choice((2.0, 0.9)),
        share_prefix=r.choice((None, None, False)),
        token_budget=r.choice((8192, 40, 1)),
        memory_budget=r.choice((None, None, 16_900_000)),
        impl=r.choice(("auto", "auto", "torch", "reference")),
    )
    if loss == "kl" and r.random() < 0.35:
        options["token_loss"] = r.choice(TOKEN_LOSSES)
    if options["share_prefix"] is None:
        options["prefix_cache"] = r.choice((None, 0, 3000, 1 << 20))
    return Case(
        seed=seed,
        family=r.choice(tuple(FAMILIES)),
        tied=r.random() < 0.5,
        adapter=r.choice(ADAPTERS),
        teacher=r.choice(TEACHERS),
        dtype=r.choice(DTYPES),
        training=r.random() < 0.7,
        modes=tuple(r.choice(MODES) for _ in range(r.choice((1, 2, 2, 3)))),
        default_dtype="bfloat16" if r.random() < 0.08 else "float32",
        completions=r.choice(COMPLETIONS),
        per_completion_prompts=r.random() < 0.2,
        fields=tuple(n for n in ("loss_mask", "weights", "old_logprobs", "sampling_logprobs") if r.random() < 0.4),
        num_completions=r.choice((None, None, 1, 7)),
        options=options,
    )


def _affine(**weights: Any) -> Any:
    from sdft_kernels.divergence import AffineTokenLoss

    return AffineTokenLoss(**weights)


TOKEN_LOSSES: tuple[Any, ...] = (
    _affine(kl_teacher_student=0.7, student_entropy=-0.1, student_logprob=0.2),
    _affine(jsd=2.0, kl_student_teacher=0.3, alpha=0.4),
    lambda tokens, index: tokens.kl_teacher_student * tokens.kl_student_teacher.exp().clamp(max=50.0),
)


def tiny(family: str, seed: int, tied: bool = True, **overrides: Any) -> Any:
    """A model of two layers, eval mode, fp32. Norms and biases are moved off the constants that they start at."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(_BASE | extra | dict(tie_word_embeddings=tied) | overrides))
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if family == "gemma2":  # sdpa refuses or ignores its softcap
        model.set_attn_implementation("eager")
    return model.eval()


@dataclasses.dataclass
class Models:
    """What a run starts from.

    Attributes:
        student: trained; a PEFT model where the adapter asks for one.
        base: the student without its adapter.
        other: a second model, of the same vocabulary, for the teachers that are one.
    """

    student: Any
    base: Any
    other: Any


def build(case: Case) -> Models:
    """The models of a case, in its dtype."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    student = tiny(case.family, case.seed, case.tied).to(dtype)
    base = copy.deepcopy(student)
    if case.adapter == "part":
        for parameter in list(student.parameters())[::2]:
            parameter.requires_grad_(False)
    elif case.adapter != "none":
        student = _adapted(student, case)
    other = tiny(random.Random(case.seed).choice(("llama", "gemma2", "gpt2")), case.seed + 1).to(dtype)
    if case.teacher == "model":
        other.requires_grad_(False)
    return Models(student.train(case.training), base, other.eval())


def _adapted(model: Any, case: Case) -> Any:
    import peft

    names = _linears(model)

    def config(**more: Any) -> Any:
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0, **more)

    if case.adapter == "pissa":
        # PiSSA decomposes in fp32; the model keeps its dtype.
        return peft.get_peft_model(model, config(init_lora_weights="pissa"), autocast_adapter_dtype=False)
    more = {"rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}.get(case.adapter, {})
    adapted = peft.get_peft_model(model, config(**more), autocast_adapter_dtype=False)
    if case.adapter == "two":
        adapted.add_adapter("second", config(), autocast_adapter_dtype=False)
        adapted.set_adapter("second")
    if case.adapter == "merged":
        perturb(adapted, case.seed)
        merged = adapted.merge_and_unload()
        return merged.requires_grad_(True)
    return adapted


def _linears(model: Any) -> list[str]:
    """Half of the linear layers by name, none of them the head."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = sorted(n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head)
    return names[::2]


def perturb(model: Any, seed: int, scale: float = 0.05) -> None:
    """Move the trained parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise * scale).to(parameter.dtype))


def make_batch(case: Case, model: Any, step: int) -> Any:
    """Prompts and completions of one step: shared beginnings, ragged, some of length 0 and 1.

    Every second step comes with the prompts of the first, so that a cache finds them.
    """
    from sdft_kernels.distill import DistillBatch, generate_completions

    r = random.Random(case.seed * 1000 + step % 2)
    ids = lambda n: [r.randrange(2, VOCABULARY) for _ in range(n)]  # noqa: E731
    opening, demonstration = ids(r.choice((0, 4))), ids(r.choice((1, 6)))
    prompts = [opening + ids(r.randint(1, 6)) for _ in range(r.randint(1, 3))]
    teacher: list[Any] = [demonstration + prompt for prompt in prompts]
    repeats = r.choice((1, 2, 4))
    r = random.Random(case.seed * 1000 + 500 + step)
    if case.completions in ("greedy", "sampled"):
        temperature = 0.0 if case.completions == "greedy" else 1.0
        completions = generate_completions(
            model, prompts, repeats, max_completion_length=8, eos_token_ids=[1], temperature=temperature, seed=case.seed
        )
    else:
        lengths = {"short": (0, 1), "empty": (0,)}.get(case.completions, (0, 1, 2, 5, 9, 12))
        completions = [[ids(r.choice(lengths)) for _ in range(repeats)] for _ in prompts]
        if case.completions == "equal":
            completions = [[group[0] for _ in group] for group in completions]
    if case.per_completion_prompts:
        teacher = [
            [[3 + k, *prompt] for k in range(len(group))] for prompt, group in zip(teacher, completions, strict=True)
        ]
    per_token = lambda f: [[[f() for _ in c] for c in group] for group in completions]  # noqa: E731
    fields: dict[str, Any] = {
        "loss_mask": lambda: per_token(lambda: r.random() < 0.7),
        "weights": lambda: (
            per_token(lambda: r.choice((0.0, 1.0, -0.5, 2.0)))
            if r.random() < 0.5
            else [[r.uniform(-1, 2) for _ in group] for group in completions]
        ),
        "old_logprobs": lambda: per_token(lambda: r.uniform(-6, -1)),
        "sampling_logprobs": lambda: per_token(lambda: r.uniform(-6, -1)),
    }
    given = {name: fields[name]() for name in case.fields}
    return DistillBatch(prompts, None if case.options["loss"] == "ce" else teacher, completions, **given)
