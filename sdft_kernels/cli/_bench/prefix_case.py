"""What `bench attention` and `bench step` measure: shapes with repetitions, and the request that one worker gets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

from sdft_kernels.cli._bench.case import why_absent

FLOOR = "repeated"  # each sequence whole, its prompt included

# Module that a variant imports, and whether it needs CUDA, as in `case.VARIANT_NEEDS`.
ATTENTION_VARIANTS: dict[str, tuple[str | None, bool]] = {
    FLOOR: (None, False),
    "flash_attn": ("flash_attn", True),
    "shared": (None, False),
}
STEP_VARIANTS: dict[str, tuple[str | None, bool]] = {
    FLOOR: ("transformers", False),
    "packed": ("transformers", False),
    "packed_cached": ("transformers", False),
}

# Relative error against fp64 up to which a variant is timed.
GATE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}

# Random models by name: a toy, and one of SmolLM2-135M's sizes, as arguments of a Llama configuration.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def parse_counts(names: str) -> Any:
    """A parser of ``"512,8,64"`` for counts called `names` (``"P,R,L"``), which raises ValueError."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            counts = tuple(int(part) for part in text.split(","))
        except ValueError:
            counts = ()
        if len(counts) != len(names.split(",")) or min(counts) <= 0:
            raise ValueError(f"expected {names}, positive integers, got {text!r}")
        return counts

    return parse


@dataclasses.dataclass(frozen=True)
class PrefixCase:
    """Prompts of P tokens with R completions of L tokens each, and the variants timed on them against `FLOOR`."""

    kind: ClassVar[str]
    needs: ClassVar[dict[str, tuple[str | None, bool]]]

    prompt: int
    completions: int
    tokens: int
    dtype: str
    device: str
    variants: tuple[str, ...]
    repeats: int
    threads: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of a progress bar: ready, memory, and one per repetition of each variant."""
        return 2 + (len(self.requests()) - 1) * (self.repeats + 2)

    def requests(self) -> list[PrefixRequest]:
        """One request per variant, the floor first, asked for or not."""
        return [PrefixRequest(self, name) for name in dict.fromkeys((FLOOR, *self.variants))]

    def small(self) -> PrefixCase:
        """The same with few tokens: to load libraries, and to compare with fp64."""
        few = dict(prompt=min(self.prompt, 40), completions=min(self.completions, 3), tokens=min(self.tokens, 9))
        return dataclasses.replace(self, **few)  # type: ignore[arg-type]

    @property
    def title(self) -> str:
        """One line for people."""
        return f"P={self.prompt} R={self.completions} L={self.tokens} {self.dtype}"

    @property
    def config(self) -> dict[str, Any]:
        """Everything but what is measured, for the CSV."""
        fields = dataclasses.asdict(self)
        del fields["variants"]
        return fields


@dataclasses.dataclass(frozen=True)
class AttentionCase(PrefixCase):
    """One layer's attention over one prompt and its completions, forward and backward."""

    kind = "attention"
    needs = ATTENTION_VARIANTS

    heads: int = 9
    key_heads: int = 3
    head_size: int = 64
    impl: str = "auto"

    @property
    def title(self) -> str:
        return f"{super().title}, {self.heads}/{self.key_heads} heads of {self.head_size}"


@dataclasses.dataclass(frozen=True)
class StepCase(PrefixCase):
    """Student's and teacher's hidden states, loss and backward. `model` is a name of `MODELS` or a folder."""

    kind = "step"
    needs = STEP_VARIANTS

    model: str = "smollm2-135m"
    teacher_prompt: int = 598
    prompts: int = 1
    token_budget: int = 8192

    def small(self) -> PrefixCase:
        return dataclasses.replace(super().small(), teacher_prompt=min(self.teacher_prompt, 50))  # type: ignore[call-arg]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.prompts} x ({super().title}), teacher prompt {self.teacher_prompt}"


@dataclasses.dataclass(frozen=True)
class PrefixRequest:
    """What a worker is told: the case and the variant's name."""

    case: PrefixCase
    variant: str

    worker = "sdft_kernels.cli._bench.prefix_worker"

    @property
    def label(self) -> str:
        """The provider's name in tables and files."""
        return self.variant

    @property
    def repeats(self) -> int:
        """Pairs to measure."""
        return self.case.repeats

    @property
    def is_ours(self) -> bool:
        """False for another library's kernel, whose failure does not fail the benchmark."""
        return self.variant != "flash_attn"

    def why_absent(self) -> str | None:
        """Return why this variant cannot run here, or None; imports nothing."""
        return why_absent(self.case.needs[self.variant], self.case.device)

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        return json.dumps({"kind": self.case.kind, "case": dataclasses.asdict(self.case), "variant": self.variant})

    @classmethod
    def from_json(cls, text: str) -> PrefixRequest:
        """Return the request that `to_json` wrote."""
        fields = json.loads(text)
        case = fields["case"] | {"variants": tuple(fields["case"]["variants"])}
        kinds: dict[str, type[PrefixCase]] = {"attention": AttentionCase, "step": StepCase}
        return cls(kinds[fields["kind"]](**case), fields["variant"])
