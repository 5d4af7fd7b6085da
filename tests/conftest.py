"""What the tests share: no network, tiny random models saved with tiny tokenizers, and the command line in-process."""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything imports the hub client or torch: lookups fail at once, and no cache of this machine is seen.
_CACHE = tempfile.mkdtemp(prefix="compressor-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_CACHE)
os.environ.pop("COMPRESSOR_DEBUG", None)
os.environ.pop("FORCE_COLOR", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{number}" for number in range(60)]
CONTEXT = 48


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, framed as GPT-2, BERT or Llama would."""
    special, template, names = {
        "gpt2": (["<|end|>"], None, {"bos_token": "<|end|>", "eos_token": "<|end|>"}),
        "bert": (
            ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
            "[CLS] $A [SEP]",
            {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        ),
        "llama": (["<s>", "</s>"], "<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}),
    }[kind]
    vocabulary = {token: index for index, token in enumerate(["[UNK]", *special, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    if template:
        backend.post_processor = TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in special if token in template]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=CONTEXT, **names)


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers: four heads each; six heads on two key/value heads for Llama."""
    torch.manual_seed(seed)
    vocabulary = len(tiny_tokenizer(kind))
    if kind == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=CONTEXT,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=1,
                eos_token_id=1,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=0.2,
            )
        )
    elif kind == "bert":
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=CONTEXT,
                pad_token_id=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.2,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=None,
                initializer_range=0.2,
            )
        )
    with torch.no_grad():  # stock initialisation leaves biases at zero, where a lost or swapped one would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model.eval()


def save_tiny(kind: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model and its tokenizer."""
    tiny_model(kind, seed).to(dtype).save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    return folder


def write_documents(path: Path, count: int, seed: int, longest: int = 30) -> Path:
    """Write texts of words as JSON lines."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, longest))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: contents of files, None for directories."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny models: gpt2, bert, llama, and `other`, a GPT-2 of other weights."""
    folder = tmp_path_factory.mktemp("models")
    found = {kind: str(save_tiny(kind, folder / kind)) for kind in ("gpt2", "bert", "llama")}
    return {**found, "other": str(save_tiny("gpt2", folder / "other", seed=1))}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with train.jsonl and test.jsonl; no document fits the others' batches without padding."""
    folder = tmp_path_factory.mktemp("texts")
    write_documents(folder / "train.jsonl", 24, seed=1)
    write_documents(folder / "test.jsonl", 12, seed=2)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def compress(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The command line, run in this process through the same `main` as the installed command."""
    from compressor import console
    from compressor.__main__ import main

    before = console.log.handlers, console.log.propagate, console.log.level

    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    yield call
    console.log.handlers, console.log.propagate = before[:2]
    console.log.setLevel(before[2])
