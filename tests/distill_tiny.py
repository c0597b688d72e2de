"""A tiny model, a tiny tokenizer with a chat template, and tiny rows, for the tests of the training module."""

from __future__ import annotations

from typing import Any

import torch

WORDS = (  # noqa: SIM905
    "the a cat dog sat ran on mat in rain what who where did does answer is yes no red blue green one two"
).split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As in SmolLM2: the padding token is the end-of-sequence token.
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=special[2:],
    )  # fmt: skip
    result.chat_template = TEMPLATE
    return result


def model(seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = dict(
        vocab_size=len(WORDS) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, eos_token_id=1, pad_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.2,
    ) | overrides  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config))


def rows(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    pick = lambda n: " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator))  # noqa: E731
    return [
        {"prompt": [{"role": "user", "content": pick(3 + i % 4)}], "privileged_context": pick(2 + i % 3)}
        for i in range(count)
    ]


def batch(lengths: tuple[tuple[int, ...], ...] = ((5, 2), (7,), (0, 4)), vocabulary: int = 29) -> Any:
    """A `DistillBatch` of random tokens: `lengths[i]` are those of the completions of example i."""
    from sdft_kernels.distill import DistillBatch

    generator = torch.Generator().manual_seed(11)
    draw = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    student = [draw(3 + i) for i in range(len(lengths))]
    return DistillBatch(
        student_prompts=student,
        teacher_prompts=[draw(4) + prompt for prompt in student],
        completions=[[draw(n) for n in group] for group in lengths],
    )
