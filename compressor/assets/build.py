"""Makes what this package ships: ``python -m compressor.assets.build corpus``, then ``... model``.

The corpus is the same bytes on every machine. The model is seeded and trained on one thread, so the number of cores
does not matter; another processor or another PyTorch may still round differently, and ``training.json`` says which
versions and which corpus it came from.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compressor.assets import CORPUS, MODEL
from compressor.assets.problems import draw_problems
from compressor.errors import DataError

SEED = 0
TRAIN_DOCUMENTS, TEST_DOCUMENTS = 4000, 500
END = "<|endoftext|>"
VOCABULARY, POSITIONS, LAYERS, HEADS, WIDTH = 512, 256, 4, 8, 128
EPOCHS, BATCH, WARMUP, DROPOUT = 13, 8, 200, 0.0
RATE, LAST_RATE, WEIGHT_DECAY, CLIP = 2e-3, 1e-4, 0.1, 1.0
IGNORE = -100  # a target that is padding


def build_corpus(target: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` in GSM8K's form; no question occurs twice, in one file or across."""
    problems = draw_problems(SEED, TRAIN_DOCUMENTS + TEST_DOCUMENTS)
    parts = {"train": problems[:TRAIN_DOCUMENTS], "test": problems[TRAIN_DOCUMENTS:]}

    def fill(folder: Path) -> None:
        for name, part in parts.items():
            lines = "".join(json.dumps(problem) + "\n" for problem in part)
            (folder / f"{name}.jsonl").write_bytes(lines.encode())

    _publish(fill, target)


def build_model(corpus: Path, target: Path, epochs: int = EPOCHS) -> None:
    """Train a tokenizer and a small GPT-2 on the corpus; write both and ``training.json``.

    Raises:
        DataError: a file of the corpus is missing.

    """
    train, test = _texts(corpus / "train.jsonl"), _texts(corpus / "test.jsonl")
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = _train_tokenizer(train)
    seen, unseen = _encode(tokenizer, train), _encode(tokenizer, test)
    model = GPT2LMHeadModel(_config())
    steps = _train(model, seen, epochs)
    perplexities = {"train": _perplexity(model, seen), "test": _perplexity(model, unseen)}

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
        hashed = [corpus / "train.jsonl", corpus / "test.jsonl", folder / "model.safetensors"]
        record = {
            "settings": _settings(epochs),
            "seed": SEED,
            "steps": steps,
            "parameters": model.num_parameters(),
            "perplexity": {name: round(value, 4) for name, value in perplexities.items()},
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hashed},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    _publish(fill, target)


def _publish(fill: Callable[[Path], None], target: Path) -> None:
    """Let ``fill`` write a new directory beside ``target``, then put it in ``target``'s place by renaming."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
        fresh = Path(work) / "fresh"
        fresh.mkdir()
        fill(fresh)
        if target.exists():
            target.rename(Path(work) / "old")
        fresh.rename(target)


def _texts(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing; run `python -m compressor.assets.build corpus` first")
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [f"{END}Question: {document['question']}\nAnswer: {document['answer']}" for document in documents]


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that keeps every digit a token of its own, so numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.removeprefix(END) for text in texts), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=POSITIONS
    )


def _config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _settings(epochs: int) -> dict[str, float]:
    return {
        "train_documents": TRAIN_DOCUMENTS,
        "test_documents": TEST_DOCUMENTS,
        "epochs": epochs,
        "batch_documents": BATCH,
        "warmup_steps": WARMUP,
        "learning_rate": RATE,
        "last_learning_rate": LAST_RATE,
        "weight_decay": WEIGHT_DECAY,
        "gradient_clip": CLIP,
        "dropout": DROPOUT,
        "threads": 1,
    }


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each document, cut at the model's last position."""
    return [tokenizer.encode(text, truncation=True, max_length=POSITIONS) for text in texts]


def _batches(documents: list[list[int]], shuffle: random.Random | None = None) -> Iterator[Tensor]:
    """Batches ``[documents, tokens]`` of documents of like length, the short ones filled up with `IGNORE`.

    Each document occurs once. With ``shuffle``, documents meet in new batches and batches come in a new order.
    """
    order = sorted(documents, key=len)
    if shuffle:
        order.sort(key=lambda document: len(document) + shuffle.uniform(-8, 8))
    starts = list(range(0, len(order), BATCH))
    if shuffle:
        shuffle.shuffle(starts)
    for start in starts:
        rows = [torch.tensor(document) for document in order[start : start + BATCH]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def _loss(model: GPT2LMHeadModel, batch: Tensor) -> tuple[Tensor, int]:
    """Sum of the nats over the batch's predicted tokens, and how many those are."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(input_ids=inputs.clamp(min=0), attention_mask=inputs != IGNORE, use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, int((targets != IGNORE).sum())


def _train(model: GPT2LMHeadModel, documents: list[list[int]], epochs: int) -> int:
    """AdamW with a linear warmup and a cosine down to `LAST_RATE`; the number of steps taken."""
    steps, step = epochs * math.ceil(len(documents) / BATCH), 0
    shuffle = random.Random(SEED)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    model.train()
    for epoch in range(epochs):
        nats, count = 0.0, 0
        for batch in _batches(documents, shuffle):
            step += 1
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = (LAST_RATE + (RATE - LAST_RATE) * cosine) * min(1.0, step / WARMUP)
            loss, tokens = _loss(model, batch)
            optimizer.zero_grad()
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            nats, count = nats + loss.item(), count + tokens
        print(f"epoch {epoch + 1} of {epochs}: {nats / count:.4f} nats a token", flush=True)
    return step


@torch.no_grad()
def _perplexity(model: GPT2LMHeadModel, documents: list[list[int]]) -> float:
    """``exp`` of the mean nats per predicted token, over all tokens of all documents."""
    model.train(False)
    sums = [_loss(model, batch) for batch in _batches(documents)]
    return math.exp(sum(float(nats) for nats, _ in sums) / sum(count for _, count in sums))


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m compressor.assets.build", description="Make the shipped assets.")
    parser.add_argument("what", choices=["corpus", "model"], help="the corpus (seconds) or the model (minutes)")
    if parser.parse_args().what == "corpus":
        build_corpus(CORPUS)
    else:
        build_model(CORPUS, MODEL)


if __name__ == "__main__":
    main()
