"""Perplexity against torchmetrics, against the models' own loss, and at the edges of float."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.text import Perplexity
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from compressor.errors import DataError
from compressor.measure import TokenPerplexity, sums
from compressor.measure.memory import _LiveStorages


def batch(sequences: int = 4, length: int = 700, vocabulary: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(sequences, length, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (sequences, length), generator=generator)
    labels[torch.rand(sequences, length, generator=generator) < 0.3] = -100
    return logits, labels


def test_agrees_with_torchmetrics() -> None:
    logits, labels = batch()
    reference, metric = Perplexity(ignore_index=-100), TokenPerplexity()
    for part in range(4):
        reference.update(logits[part : part + 1], labels[part : part + 1])
        metric.update(logits[part : part + 1], labels[part : part + 1])
    assert metric.tokens == int((labels != -100).sum())
    torch.testing.assert_close(metric.compute().float(), reference.compute(), rtol=1e-5, atol=0)


def test_agrees_with_the_loss_of_a_causal_model() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(50, (3, 20))
    labels = ids.clone()
    labels[1, 12:] = -100
    with torch.no_grad():
        output = model.eval()(input_ids=ids, labels=labels)
    metric = TokenPerplexity()
    metric.update(output.logits[:, :-1], labels[:, 1:])
    assert metric.nll.item() == pytest.approx(output.loss.item(), rel=1e-6)
    assert metric.compute().item() == pytest.approx(math.exp(output.loss.item()), rel=1e-6)


def test_agrees_with_the_loss_of_a_masked_model() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    labels = torch.full((3, 20), -100)
    labels[:, ::5] = torch.randint(50, (3, 4))
    with torch.no_grad():
        output = BertForMaskedLM(config).eval()(input_ids=torch.randint(50, (3, 20)), labels=labels)
    metric = TokenPerplexity()
    metric.update(output.logits, labels)
    assert metric.nll.item() == pytest.approx(output.loss.item(), rel=1e-6)
    assert metric.tokens == 12


def test_batches_and_processes_may_be_cut_anywhere() -> None:
    logits, labels = batch()
    whole = TokenPerplexity()
    whole.update(logits, labels)
    for cut in (1, 2, 3):
        parts = TokenPerplexity()
        parts.update(logits[:cut], labels[:cut])
        parts.update(logits[cut:, :333], labels[cut:, :333])
        parts.update(logits[cut:, 333:], labels[cut:, 333:])
        assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)

    other = TokenPerplexity()
    other.update(logits[:1, :5], labels[:1, :5])
    gathered = {id(whole.nll_sum): [whole.nll_sum, other.nll_sum]}
    gathered[id(whole.token_count)] = [whole.token_count, other.token_count]
    nll = whole.nll_sum + other.nll_sum
    tokens = whole.tokens + other.tokens
    whole.sync(dist_sync_fn=lambda state, group: gathered.get(id(state), [state]), distributed_available=lambda: True)
    assert whole.tokens == tokens
    assert whole.nll.item() == pytest.approx((nll / tokens).item(), rel=1e-15)


def test_documents_are_told_apart_and_stay_whole() -> None:
    """Whatever the order of their windows and the cut into batches; checked against a sum for each document alone."""
    logits, labels = batch(sequences=5)
    documents = torch.tensor([7, 2, 7, 2, 0])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), labels, reduction="none")
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 0, 1]):
        metric = TokenPerplexity()
        for part in (order[:2], order[2:]):
            metric.update(logits[part], labels[part], documents[part])
        found = metric.by_document()
        for place, document in enumerate((0, 2, 7)):
            own = documents == document
            assert found.nll[place].item() == pytest.approx(losses[own].sum().item(), rel=1e-6)
            assert found.tokens[place].item() == int((labels[own] != -100).sum())
        assert found.perplexity == pytest.approx(metric.compute().item(), rel=1e-12)
        nn.ModuleList([metric]).to(torch.bfloat16)
        assert metric.by_document().perplexity == found.perplexity


def test_documents_of_two_processes_are_gathered() -> None:
    logits, labels = batch()
    parts = [TokenPerplexity(), TokenPerplexity()]
    parts[0].update(logits[:1], labels[:1], torch.tensor([3]))
    parts[1].update(logits[1:], labels[1:], torch.tensor([1, 3, 1]))
    whole = TokenPerplexity()
    whole.update(logits, labels, torch.tensor([3, 1, 3, 1]))
    other = parts[1]
    names = iter(("nll_sum", "token_count", "sequence_nll", "sequence_tokens", "sequence_documents"))  # as added

    def gathered(state: torch.Tensor, group: object) -> list[torch.Tensor]:
        theirs = getattr(other, next(names))
        return [state, torch.cat(theirs) if isinstance(theirs, list) else theirs]

    parts[0].sync(dist_sync_fn=gathered, distributed_available=lambda: True)
    found, expected = parts[0].by_document(), whole.by_document()
    torch.testing.assert_close(found.nll, expected.nll)
    assert torch.equal(found.tokens, expected.tokens)


def test_refuses_documents_that_nobody_named() -> None:
    logits, labels = batch()
    metric = TokenPerplexity()
    metric.update(logits, labels)
    with pytest.raises(DataError, match="no token of a known document"):
        metric.by_document()
    with pytest.raises(ValueError, match=r"documents \(3,\) for labels \(4, 700\)"):
        metric.update(logits, labels, torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_exact(dtype: torch.dtype) -> None:
    logits = torch.full((1, 2, 3), -1e4, dtype=dtype)
    logits[:, :, 1] = 1e4
    height = 2 * logits[0, 0, 1].item()
    sure, wrong = TokenPerplexity(), TokenPerplexity()
    sure.update(logits, torch.tensor([[1, 1]]))
    assert sure.compute().item() == 1
    wrong.update(logits, torch.tensor([[2, 1]]))
    assert wrong.nll.item() == height / 2
    assert wrong.compute().item() == math.inf


def test_half_precision_logits_are_read_in_float32() -> None:
    logits, labels = batch()
    half, wide = TokenPerplexity(), TokenPerplexity()
    half.update(logits.bfloat16(), labels)
    wide.update(logits.bfloat16().double().float(), labels)
    assert half.compute().item() == wide.compute().item()


def test_what_is_ignored_cannot_spoil_the_sum() -> None:
    logits, labels = batch()
    clean, spoilt = TokenPerplexity(), TokenPerplexity()
    clean.update(logits, labels)
    spoilt.update(logits.masked_fill((labels == -100).unsqueeze(-1), math.nan), labels)
    assert spoilt.compute().item() == clean.compute().item()


@pytest.mark.parametrize("labels", [None, torch.full((4, 700), -100)])
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_refuses_zero_tokens(labels: torch.Tensor | None) -> None:
    metric = TokenPerplexity()
    if labels is not None:
        metric.update(batch()[0], labels)
    with pytest.raises(DataError, match="no token"):
        metric.compute()


def test_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"\(4, 700, 37\) and labels \(4, 699\)"):
        TokenPerplexity().update(batch()[0], batch()[1][:, 1:])


def test_sums_keep_their_precision_when_the_model_changes_its_own() -> None:
    logits, labels = batch()
    metric = TokenPerplexity()
    metric.update(logits, labels)
    before = metric.nll.item()
    nn.ModuleList([metric]).to(torch.bfloat16).half()
    assert metric.nll_sum.dtype == torch.float64
    assert metric.nll.item() == before
    metric.reset()
    assert (metric.nll_sum.dtype, metric.token_count.dtype) == (torch.float64, torch.int64)


def test_never_waits_for_the_device_and_does_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_WITHOUT_FLOAT64", {"meta"})
    metric = TokenPerplexity().to("meta")
    logits, labels = batch()
    metric.update(logits.to("meta"), labels.to("meta"))  # a meta tensor has no value to wait for
    assert metric.nll_sum.dtype == torch.float32
    assert metric.token_count.dtype == torch.int64


def test_no_float32_copy_of_all_logits() -> None:
    logits, labels = batch(sequences=2, length=4096, vocabulary=64)
    logits = logits.bfloat16()
    metric = TokenPerplexity()
    storages = _LiveStorages([logits, labels])
    before = storages.live
    with storages:
        metric.update(logits[:, :-1], labels[:, 1:])
    assert storages.peak - before < 3 * 512 * 64 * 4 + 2**15
