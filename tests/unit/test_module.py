"""The LightningModule: its losses are Hugging Face's own, scoring never runs the head, and frozen stays frozen."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from compressor.data import TextDataModule
from compressor.module import LanguageModel
from compressor.trainer import run_perplexity
from compressor.types import Task
from tests.conftest import tiny_model, tiny_tokenizer, write_documents

KINDS: list[tuple[str, Task]] = [("gpt2", "causal"), ("llama", "causal"), ("bert", "masked")]


def batch_of(task: Task, padded: bool = True) -> dict[str, torch.Tensor]:
    """Three sequences of 12 tokens, the last two shorter."""
    ids = torch.randint(6, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 9:] = 0
        mask[2, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if task == "masked":
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[:, 1::4] = True
        labels = labels.masked_fill(~hidden, -100)
        ids = ids.masked_fill(hidden & (mask == 1), 4)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("kind", "task"), KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_training_loss_is_hugging_faces_own(kind: str, task: Task, padded: bool) -> None:
    model = tiny_model(kind)
    batch = batch_of(task, padded)
    expected = model(**batch).loss
    found = LanguageModel(model, task).training_step(batch, 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_training_steps_lower_the_loss(kind: str, task: Task) -> None:
    module = LanguageModel(tiny_model(kind), task, learning_rate=1e-2)
    module.train()
    optimizer = module.configure_optimizers()
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = module.training_step(batch_of(task), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_the_trainer_can_fit_it(kind: str, task: Task, texts: str) -> None:
    module = LanguageModel(tiny_model(kind), task, learning_rate=1e-2)
    data = TextDataModule(tiny_tokenizer(kind), task=task, data=texts, max_length=40)
    data.setup()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        trainer.fit(module, train_dataloaders=data.train_dataloader())
    moved = [name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_test_steps_count_every_token_once(kind: str, task: Task) -> None:
    """Token-weighted over batches of unlike sizes: equal to the mean over all tokens, not the mean of means."""
    model = tiny_model(kind)
    module = LanguageModel(model, task)
    total = tokens = 0.0
    with torch.no_grad():
        for padded in (True, False, True):
            batch = batch_of(task, padded)
            module.test_step(batch, 0)
            labels = batch["labels"][:, 1:] if task == "causal" else batch["labels"]
            count = int((labels != -100).sum())
            total += float(model(**batch).loss) * count
            tokens += count
    assert int(module.perplexity.tokens) == tokens
    assert float(module.perplexity.compute()) == pytest.approx(math.exp(total / tokens), rel=1e-6)


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_scoring_never_runs_the_head(kind: str, task: Task) -> None:
    model = tiny_model(kind)
    head = model.get_output_embeddings()
    called: list[nn.Module] = []
    for module in [head, *(model.cls.modules() if kind == "bert" else [])]:
        module.register_forward_hook(lambda module, *_: called.append(module))
    seen: list[int] = []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    module = LanguageModel(model, task)
    assert module.predict_step({name: value for name, value in batch_of(task).items() if name != "labels"}, 0) is None
    assert (len(seen), called) == (1, [])
    module(batch_of(task))
    assert called  # the hooks themselves work


def test_the_backbone_sees_the_padding_mask() -> None:
    model = tiny_model("gpt2")
    got: list[dict[str, Any]] = []
    model.base_model.register_forward_pre_hook(lambda _, args, kwargs: got.append(kwargs), with_kwargs=True)
    batch = batch_of("causal")
    LanguageModel(model, "causal").predict_step(batch, 0)
    assert torch.equal(got[0]["attention_mask"], batch["attention_mask"])
    assert torch.equal(got[0]["input_ids"], batch["input_ids"])
    assert got[0]["use_cache"] is False


def test_padding_changes_no_logits_that_count() -> None:
    for kind, task in KINDS:
        module = LanguageModel(tiny_model(kind), task)
        batch = batch_of(task)
        with torch.no_grad():
            together = module(batch)
            for row, length in enumerate((12, 9, 5)):
                alone = module({name: value[row : row + 1, :length] for name, value in batch.items()})
                torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


def test_optimizers_skip_what_is_frozen() -> None:
    model = tiny_model("gpt2")
    module = LanguageModel(model, "causal", learning_rate=0.03)
    everything = {id(parameter) for parameter in model.parameters()}
    for parameter in model.transformer.wte.parameters():
        parameter.requires_grad = False
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad = False
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen
    assert {id(parameter) for parameter in held} == everything - frozen
    assert len(held) == len(everything - frozen)
    assert {group["lr"] for group in optimizer.param_groups} == {0.03}


def test_a_second_run_starts_from_zero(texts: str, tmp_path: Path) -> None:
    """On other text, for counting the same text twice would not show in a mean."""
    write_documents(tmp_path / "other.jsonl", 10, seed=8)

    def data(name: str) -> TextDataModule:
        return TextDataModule(tiny_tokenizer("gpt2"), task="causal", data=name, max_length=40)

    used, fresh = (LanguageModel(tiny_model("gpt2"), "causal") for _ in range(2))
    cpu = torch.device("cpu")
    first = run_perplexity(used, data(texts), cpu, "first").perplexity
    second = run_perplexity(used, data(str(tmp_path / "other.jsonl")), cpu, "second").perplexity
    assert second != pytest.approx(first, rel=1e-3)
    assert second == run_perplexity(fresh, data(str(tmp_path / "other.jsonl")), cpu, "fresh").perplexity


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal"), ("bert", "masked")])
def test_documents_of_several_windows_stay_whole(kind: str, task: Task, texts: str) -> None:
    """Against every window alone, added up by the document it was cut from."""
    data = TextDataModule(tiny_tokenizer(kind), task=task, data=texts, max_length=9, batch_size=4)
    data.setup()
    windows = data.evaluation
    assert len(windows.input_ids) > windows.documents > 1
    model = tiny_model(kind)
    expected, counts = torch.zeros(windows.documents, dtype=torch.float64), torch.zeros(windows.documents).long()
    for (ids, labels), (document, _) in (
        data.test_dataloader().dataset[place, 0] for place in range(len(windows.places))
    ):
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        if task == "causal":
            logits, labels = logits[:-1], labels[1:]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        expected[document] += losses.sum()
        counts[document] += (labels != -100).sum()
    found = run_perplexity(LanguageModel(model, task), data, torch.device("cpu"), "perplexity")
    assert torch.equal(found.tokens, counts)
    torch.testing.assert_close(found.nll, expected, rtol=1e-5, atol=1e-5)
