"""What is loaded by name: fp32 whatever the checkpoint's dtype, and a tokenizer or a word about it."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.cli.__main__ import main  # noqa: E402
from sdft_kernels.distill import SDFTConfig, SDFTTrainer  # noqa: E402
from sdft_kernels.distill.loading import load_model, load_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bf16 checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("bf16")
    tiny.model().bfloat16().save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    assert json.loads((path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    return path


def config(path, **options):
    return SDFTConfig(
        output_dir=str(path), use_cpu=True, per_device_train_batch_size=2, max_steps=5, learning_rate=1e-5,
        rollouts="dataset", num_loss_tokens_to_skip=0, report_to=[], save_strategy="no", disable_tqdm=True,
        teacher_model_kind="ema", **options,
    )  # fmt: skip


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


def moved(model):
    """Share of the weights that are not what the checkpoint has."""
    pairs = list(zip(model.parameters(), tiny.model().bfloat16().parameters(), strict=True))
    changed = sum(int((a.detach() != b.to(a.dtype)).sum()) for a, b in pairs)
    return changed / sum(a.numel() for a, _ in pairs)


def test_a_bf16_checkpoint_trains_in_fp32(folder, tmp_path):
    made = SDFTTrainer(str(folder / "model"), config(tmp_path), tiny.rows())
    assert dtypes(made.model) == {torch.float32}
    made.train()
    assert moved(made.model) > 0.99
    # The control: what the checkpoint's own dtype, when asked for, makes of the same steps.
    for dtype in ("bfloat16", "auto", torch.bfloat16):
        made = SDFTTrainer(str(folder / "model"), config(tmp_path, model_init_kwargs={"dtype": dtype}), tiny.rows())
        assert dtypes(made.model) == {torch.bfloat16}
    made.train()
    assert moved(made.model) < 0.5


def test_the_command_line_and_the_helper_load_fp32(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(2)))
    for extra, expected in (((), "float32"), (("--dtype", "bfloat16"), "bfloat16")):
        out = tmp_path / expected
        arguments = ["--model", str(folder / "model"), "--data", str(data), "--output", str(out), "--cpu"]
        options = ["--rollouts", "dataset", "--max-steps", "1", "--skip-first-tokens", "0", *extra]
        assert main(["train", *arguments, *options]) == 0
        assert json.loads((out / "config.json").read_text())["dtype"] == expected
    assert dtypes(load_model(str(folder / "model"), {"torch_dtype": torch.bfloat16})) == {torch.bfloat16}


def test_without_a_tokenizer_the_error_names_the_argument(folder, tmp_path):
    fix = "pass the model's tokenizer as processing_class"
    in_memory = tiny.model()
    with pytest.raises(ValueError, match=f"made in memory.*{fix}"):
        SDFTTrainer(in_memory, config(tmp_path), tiny.rows())
    in_memory.save_pretrained(tmp_path / "alone")
    saved = load_model(str(tmp_path / "alone"))
    for model in (saved, str(tmp_path / "alone")):
        with pytest.raises(ValueError, match=rf"(?s)no tokenizer could be loaded from '.*alone'.*{fix}"):
            SDFTTrainer(model, config(tmp_path), tiny.rows())
    made = SDFTTrainer(load_model(str(folder / "model")), config(tmp_path), tiny.rows())  # the control
    assert made.processing_class.chat_template == tiny.TEMPLATE


def test_a_tokenizer_of_no_tokens_is_none(tmp_path):
    """transformers 5 makes one, which encodes every text as nothing, where a folder has only a model of some kinds."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=30, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from .*; do this"):
        load_tokenizer(str(tmp_path), "do this")
