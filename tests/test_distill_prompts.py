"""Templates, encoding, batches and rollouts: what goes in, token by token."""

import io

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import (  # noqa: E402
    DistillBatch,
    encode_completion,
    encode_prompts,
    generate_completions,
    paper,
    preview,
    trl,
    turn,
)
from sdft_kernels.distill.data import PromptEncoder  # noqa: E402
from sdft_kernels.distill.rollouts import call_rollouts, cut_at_eos, stop_token_ids  # noqa: E402
from sdft_kernels.distill.templates import as_messages, resolve_template, teacher_messages  # noqa: E402

SYSTEM = {"role": "system", "content": "answer the dog"}
QUESTION = {"role": "user", "content": "who sat {prompt} {x}?"}
CHAT = [SYSTEM, QUESTION]
ANSWER = {"role": "assistant", "content": "the cat"}


def test_turn_shows_the_demonstration_as_an_earlier_answer():
    assert turn(CHAT, "the cat") == [*CHAT, ANSWER, QUESTION]
    trace = [ANSWER, {"role": "user", "content": "where"}, {"role": "assistant", "content": "on the mat"}]
    assert turn(CHAT, trace) == [*CHAT, *trace, QUESTION]


def test_paper_and_trl_put_it_into_the_question():
    [system, message] = paper(CHAT, "the cat")
    assert system == SYSTEM and message["role"] == "user"
    assert message["content"] == (
        "who sat {prompt} {x}?\n\nThis is an example for a response to the question:\nthe cat\n\n"
        "Now answer with a response of your own, including the thinking process.\n"
    )
    assert trl(CHAT, "a {privileged_context}")[-1]["content"] == "who sat {prompt} {x}?\n\na {privileged_context}"


def test_trl_template_equals_trl():
    sdft = pytest.importorskip("trl.experimental.sdft.sdft_trainer")

    class Args:
        teacher_prompt_template = "{prompt}\n\n{privileged_context}"

    class Trainer:
        args = Args()

    builder = sdft.DemonstrationTeacherContextBuilder(Trainer())
    for demonstration in ("the cat", [ANSWER, {"role": "user", "content": "yes"}]):
        assert trl(CHAT, demonstration) == builder._compose_teacher_prompt(CHAT, demonstration)


def test_student_and_teacher_share_the_prompt_as_a_token_prefix():
    tokenizer = tiny.tokenizer()
    question = [{"role": "user", "content": "who sat on the mat"}]
    for template in (turn, paper):
        student, teacher = encode_prompts(tokenizer, [question, template(question, "the cat")])
        common = next((i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b), len(student))
        assert common >= 6  # role header and question


def test_prompts_that_cannot_be_used_are_refused():
    for prompt, error, match in (
        ([ANSWER], ValueError, "'assistant'"),
        ([*CHAT, {"role": "tool", "content": "1"}], ValueError, "'tool'"),
        ([], ValueError, "empty"),
        ("", ValueError, "empty"),
        (7, TypeError, "int"),
        (["who"], TypeError, "list"),
    ):
        with pytest.raises(error, match=match):
            as_messages(prompt)
    for demonstration in (None, 3, [], ["the cat"]):
        with pytest.raises(ValueError, match="privileged_context"):
            teacher_messages("who", demonstration)
    with pytest.raises(ValueError, match="template must be"):
        resolve_template("{prompt} only")
    assert resolve_template("Q {prompt} A {privileged_context}")(CHAT, "x")[-1]["content"].endswith("A x")


def test_encode_with_and_without_a_chat_template():
    tokenizer = tiny.tokenizer()
    [ids] = encode_prompts(tokenizer, [as_messages("who sat")])
    assert tokenizer.decode(ids) == "<|user|> who sat <|end|> <|assistant|>"
    assert tokenizer.decode(encode_completion(tokenizer, "who sat", "the cat")) == "the cat <|end|>"
    tokenizer.chat_template = None
    [ids] = encode_prompts(tokenizer, [turn(as_messages("who sat"), "the cat")])
    assert tokenizer.decode(ids) == "who sat the cat who sat"
    assert tokenizer.decode(encode_completion(tokenizer, "who sat", "the cat")) == "the cat <|end|>"


def base_tokenizer(before, after):
    """A base model's: no chat template, and special tokens around every text."""
    from tokenizers import processors

    tokenizer = tiny.tokenizer()
    ids = {"<|user|>": 2, "<|end|>": 1, "<|system|>": 4}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=[(token, ids[token]) for token in {*before, *after}]
    )
    tokenizer.bos_token = "<|user|>"
    return tokenizer


@pytest.mark.parametrize("before", [[], ["<|user|>"]])
@pytest.mark.parametrize("after", [[], ["<|end|>"], ["<|system|>", "<|end|>"]])
@pytest.mark.parametrize("text", ["who sat", "who sat <|end|>", "<|user|> who <|user|>", "<|end|>"])
def test_a_prompt_to_be_continued_has_no_end(before, after, text):
    tokenizer = base_tokenizer(before, after)
    tokenizer.chat_template = None
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == " ".join([*before, text, *after])  # the control
    [ids] = encode_prompts(tokenizer, [as_messages(text)])
    assert tokenizer.decode(ids) == " ".join([*before, text])
    assert tokenizer.decode(encode_completion(tokenizer, text, "the cat")) == "the cat <|end|>"
    encoder = PromptEncoder(tokenizer)
    rows = [{"prompt": text, "privileged_context": "a dog"}]
    assert encoder.student(rows) == [ids]
    assert tokenizer.decode(encoder.teacher(rows)[0]) == " ".join([*before, text, "a dog", text])
    assert tokenizer.decode(encoder.expert(rows)[0]) == "a dog <|end|>"


@pytest.mark.parametrize("after", [[], ["<|end|>"]])
def test_a_chat_template_alone_decides_where_a_prompt_ends(after):
    tokenizer = base_tokenizer([], after)
    [ids] = encode_prompts(tokenizer, [as_messages("who sat")])
    assert tokenizer.decode(ids) == "<|user|> who sat <|end|> <|assistant|>"
    assert tokenizer.decode(encode_completion(tokenizer, "who sat", "the cat")) == "the cat <|end|>"


def test_a_tokenizer_that_hides_where_a_prompt_ends_is_refused():
    class Odd:
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2, 3] if add_special_tokens else [4, 5]}

    with pytest.raises(ValueError, match="other tokens with add_special_tokens.*set a chat_template"):
        encode_prompts(Odd(), [as_messages("who sat")])


def test_add_eos_token_of_a_llama_tokenizer():
    from transformers import LlamaTokenizer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "▁b": 4, "▁": 5, "a": 6, "b": 7}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], add_bos_token=True, add_eos_token=True
    )
    assert tokenizer("a b")["input_ids"][-1] == 2  # the control
    [ids] = encode_prompts(tokenizer, [as_messages("a b")])
    assert ids[0] == 1 and 2 not in ids and ids == tokenizer("a b")["input_ids"][:-1]


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if thinking %}yes{% else %}no{% endif %} " + tiny.TEMPLATE
    [ids] = encode_prompts(tokenizer, [as_messages("who")], {"thinking": True})
    assert tokenizer.decode(ids).startswith("yes")
    assert tokenizer.decode(encode_prompts(tokenizer, [as_messages("who")])[0]).startswith("no")


def test_preview_says_where_the_loss_starts():
    file = io.StringIO()
    text = preview(tiny.tokenizer(), "who sat", "the cat ran", template=turn, skip_first_tokens=2, file=file)
    assert file.getvalue().strip() == text.strip()
    assert "not in the loss: 'the cat'" in text and "in the loss:     'ran <|end|>'" in text


def test_prompt_encoder_never_truncates():
    rows = [{"prompt": "who sat", "privileged_context": "the cat"}]
    encoder = PromptEncoder(tiny.tokenizer(), context_length=12, completion_reserve=4)
    assert len(encoder.student(rows)[0]) == 5
    with pytest.raises(ValueError, match=r"row 7: the teacher prompt has 13 tokens.*4 for the completion.*context of"):
        encoder.teacher(rows, ["row 7"])
    assert PromptEncoder(tiny.tokenizer()).expert([rows[0] | {"completion": "a dog"}]) == [
        tiny.tokenizer()("a dog <|end|>")["input_ids"]
    ]


def test_batches_are_checked():
    good = dict(student_prompts=[[1, 2]], teacher_prompts=[[3, 1, 2]], completions=[[[4, 5], []]])
    assert len(DistillBatch(**good)) == 2
    for change, error, match in (
        (dict(teacher_prompts=[]), ValueError, "teacher_prompts has 0 entries for 1"),
        (dict(completions=[[4, 5]]), TypeError, r"completions\[0\] must be a list of completions"),
        (dict(completions=[["four"]]), TypeError, r"completions\[0\]\[0\]"),
        (dict(completions=[[[4, 0.5]]]), TypeError, "token ids"),
        (dict(completions=[[[4, -1]]]), ValueError, "negative"),
        (dict(student_prompts=[[]]), ValueError, r"student_prompts\[0\] is empty"),
        (dict(teacher_prompts=[[]]), ValueError, r"teacher_prompts\[0\] is empty"),
        (dict(teacher_prompts=[[[1], [2], [3]]]), ValueError, "3 prompts for 2 completions"),
        (dict(loss_mask=[[[True], []]]), ValueError, r"loss_mask\[0\]\[0\] has 1 entries for 2 tokens"),
        (dict(weights=[[1.0]]), ValueError, r"weights\[0\] has 1 entries for 2 completions"),
        (dict(old_logprobs=[[["a", "b"], []]]), TypeError, "numbers"),
    ):
        with pytest.raises(error, match=match):
            DistillBatch(**(good | change))


class Scripted(torch.nn.Module):
    """Stands in for a model: `generate` returns what it is told, and records what it was given."""

    def __init__(self, generated):
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 2)
        self.generated = generated

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, input_ids, attention_mask, **kwargs):
        self.seen = (input_ids, attention_mask, kwargs, self.training)
        return torch.cat([input_ids, torch.tensor(self.generated)], dim=1)


def test_rollouts_end_at_the_first_eos_by_position():
    """Padding equals the end-of-sequence token; the prompt holds it too. Neither may confuse the cut."""
    model = Scripted([[7, 1, 1, 1], [1, 1, 1, 1], [8, 9, 7, 6]]).train()
    result = generate_completions(
        model, [[1, 5], [1], [4, 1, 3]], max_completion_length=4, eos_token_ids=[1], generation_kwargs={"top_p": 0.9}
    )
    input_ids, attention_mask, kwargs, training = model.seen
    # Sorted by length: [1], [1, 5], [4, 1, 3]
    assert input_ids.tolist() == [[1, 1, 1], [1, 1, 5], [4, 1, 3]]
    assert attention_mask.tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert result == [[[1]], [[7, 1]], [[8, 9, 7, 6]]]
    assert not training and model.training
    assert kwargs["top_p"] == 0.9 and kwargs["top_k"] == 0
    assert cut_at_eos([3, 2, 1], [1, 2]) == [3, 2] and cut_at_eos([], [1]) == []


def test_sampling_follows_its_seed_and_leaves_the_global_state_alone():
    model = tiny.model().train()
    prompts = [[2, 5, 6], [2, 9, 11, 7]]
    state = torch.get_rng_state()
    draw = lambda seed, **k: generate_completions(  # noqa: E731
        model, prompts, 2, max_completion_length=8, eos_token_ids=[1], seed=seed, **k
    )
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert first == draw(3) and first != draw(4)
    assert [len(group) for group in first] == [2, 2] and all(len(c) <= 8 for group in first for c in group)


def test_greedy_rollouts_do_not_depend_on_the_batch():
    model = tiny.model()
    prompts = [[2, 5, 6], [2, 9, 11, 7, 8, 14, 21]]
    together = generate_completions(model, prompts, max_completion_length=8, temperature=0)
    apart = [generate_completions(model, [prompt], max_completion_length=8, temperature=0)[0] for prompt in prompts]
    assert together == apart
    assert together == generate_completions(model, prompts, max_completion_length=8, temperature=0, batch_size=1)


def test_sampling_is_from_the_whole_distribution():
    """transformers' generation config narrows sampling to the top 50 by default; rollouts must not."""
    model = tiny.model()
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    draws = generate_completions(model, [[2, 5, 6]], 64, max_completion_length=1, seed=0)[0]
    assert len({tuple(d) for d in draws}) > 5


def test_engines_are_checked():
    completions = [[[1, 2]], [[3]]]
    assert call_rollouts(lambda prompts, n: completions, [[1], [2]], 1) == (completions, None)
    logprobs = [[[-1.0, -2.0]], [[-3.0]]]
    assert call_rollouts(lambda prompts, n: (completions, logprobs), [[1], [2]], 1) == (completions, logprobs)
    with pytest.raises(ValueError, match="for 2 prompts, expected 1"):
        call_rollouts(lambda prompts, n: completions, [[1]], 1)
    model = tiny.model()
    assert stop_token_ids(model, tiny.tokenizer()) == [1]
    model.generation_config.eos_token_id = [4, 5]
    assert stop_token_ids(model, tiny.tokenizer()) == [1, 4, 5]
