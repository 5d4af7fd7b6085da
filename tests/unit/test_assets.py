"""The shipped corpus is right and rebuilds to the same bytes; the shipped model belongs to it and reads it well."""

import ast
import hashlib
import json
import math
import operator
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.assets import CORPUS, MODEL
from compressor.assets.build import build_corpus, build_model
from compressor.errors import DataError

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ANNOTATION = re.compile(r"([\d+*/-]+)=\$?<<([^=>]+)=(\d+)>>(\d+)")


def read(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (CORPUS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def value(node: ast.AST) -> Fraction:
    """Exact value of a tree of whole numbers and the four operations; anything else is a KeyError or TypeError."""
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise TypeError(ast.dump(node))


def test_corpus_rebuilds_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "stale").touch()
    build_corpus(tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == ["test.jsonl", "train.jsonl"]
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "corpus" / name).read_bytes() == (CORPUS / name).read_bytes()


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split: str) -> None:
    for problem in read(split):
        assert list(problem) == ["question", "answer"]
        assert problem["question"].endswith("?")
        *steps, last = problem["answer"].split("\n")
        assert 2 <= len(steps) <= 4
        results = []
        for step in steps:
            ((shown, annotated, result, repeated),) = ANNOTATION.findall(step)
            assert shown == annotated
            assert value(ast.parse(annotated, mode="eval")) == int(result) == int(repeated)
            results.append(result)
        assert last == f"#### {results[-1]}"


def test_every_number_of_a_step_was_given_or_worked_out() -> None:
    constants = {"2", "3", "4", "5", "12", "60", "100"}  # half, three times, legs, a fifth, a dozen, an hour, percent
    for problem in read("train"):
        known = constants | set(re.findall(r"\d+", problem["question"]))
        for _, annotated, result, _ in ANNOTATION.findall(problem["answer"]):
            assert set(re.findall(r"\d+", annotated)) <= known, problem
            known.add(result)


def test_no_question_occurs_twice() -> None:
    questions = [problem["question"] for split in ("train", "test") for problem in read(split)]
    assert len(questions) == len(set(questions)) == 4500


def test_training_record_matches_the_files() -> None:
    record = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    files = [CORPUS / "train.jsonl", CORPUS / "test.jsonl", MODEL / "model.safetensors"]
    assert record["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_assets_stay_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 4_000_000
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) <= 1_600_000


def test_files_name_no_machine() -> None:
    for path in [*MODEL.glob("*.json"), *CORPUS.iterdir()]:
        assert not re.search(r"/(root|home|tmp|work|Users)/", path.read_text(encoding="utf-8")), path


def test_paths_come_without_heavy_imports() -> None:
    code = "import sys, compressor.assets; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=MODEL.parents[2], check=False).returncode == 0


def test_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl is missing; run"):
        build_model(tmp_path, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def documents(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    texts = [f"<|endoftext|>Question: {p['question']}\nAnswer: {p['answer']}" for p in read("test")[:50]]
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]


@torch.no_grad()
def perplexity(model: PreTrainedModel, documents: list[torch.Tensor]) -> float:
    """One document at a time, with the loss Transformers itself works out."""
    nats, count = 0.0, 0
    for ids in documents:
        predicted = ids.shape[1] - 1
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        nats, count = nats + float(loss) * predicted, count + predicted
    return math.exp(nats / count)


def test_tokenizer(tokenizer: PreTrainedTokenizerBase, documents: list[torch.Tensor]) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.bos_token_id, len(tokenizer), tokenizer.model_max_length) == (0, 512, 256)
    for text in ("Ada pays $12*3=$<<12*3=36>>36.\n#### 36", "Grüße, 日本 ☂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("407") == ["4", "0", "7"]
    assert all(ids.shape[1] <= 256 and ids[0, 0] == 0 for ids in documents)


def test_model_reads_unseen_documents_well(model: PreTrainedModel, documents: list[torch.Tensor]) -> None:
    recorded = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["perplexity"]
    found = perplexity(model, documents)
    assert found < 5
    assert found == pytest.approx(recorded["test"], rel=0.1)
    assert recorded["test"] < 1.1 * recorded["train"]


def test_heads_matter_and_differ(model: PreTrainedModel, documents: list[torch.Tensor]) -> None:
    few, whole = documents[:12], perplexity(model, documents[:12])
    harms = []
    for head in range(8):

        def silence(_: torch.nn.Module, args: tuple[torch.Tensor], head: int = head) -> tuple[torch.Tensor]:
            kept = args[0].clone()
            kept[..., head * 16 : head * 16 + 16] = 0
            return (kept,)

        hook = model.transformer.h[2].attn.c_proj.register_forward_pre_hook(silence)
        harms.append(perplexity(model, few) / whole - 1)
        hook.remove()
    assert max(harms) > 0.2
    assert min(harms) < 0.02
