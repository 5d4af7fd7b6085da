"""The text of a training: documents to learn from, others to stop by, and its batches from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from compressor.data.documents import Part, choose, hold_out_to_stop, load_documents, short_hash
from compressor.data.windows import (
    Draw,
    Examples,
    Labels,
    PlacedExample,
    ShuffledBuckets,
    Windows,
    collate,
    longest_first,
    make_windows,
    padding_id,
)
from compressor.errors import DataError
from compressor.types import Task


@dataclass(frozen=True, eq=False)
class TrainingText:
    """The windows of a training; no document is in both, and none of either is in the evaluation set.

    `overlap` counts the documents that were left out because they are in the evaluation set.
    """

    train: Windows
    held_out: Windows
    overlap: int

    def describe(self) -> tuple[str, str]:
        """Two lines for the log: what is learnt from, and what decides when to stop."""
        dropped = f"; {self.overlap:,} more left out, being in the evaluation set too" if self.overlap else ""
        return f"training: {self.train.describe()}{dropped}", f"held out to stop by: {self.held_out.describe()}"


class StepBatches(Sampler[list[Draw]]):
    """The batches of a whole training, one for each step, from step `start` on.

    They are those of `ShuffledBuckets`, epoch after epoch: what a step gets depends on nothing but its number and
    the seed.
    """

    def __init__(self, windows: Sequence[Tensor], batch_size: int, seed: int, epochs: int, start: int = 0) -> None:
        self.buckets = ShuffledBuckets(windows, batch_size, seed)
        self.batch_size = batch_size
        self.per_epoch = -(-len(windows) // batch_size)
        self.steps = epochs * self.per_epoch
        self.start = start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        first, skipped = divmod(self.start, self.per_epoch)
        for epoch in range(first, self.steps // self.per_epoch):
            self.buckets.set_epoch(epoch)
            draws = list(self.buckets)
            for place in range(skipped, self.per_epoch):
                yield draws[place * self.batch_size : (place + 1) * self.batch_size]
            skipped = 0


def load_training_text(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data: str,
    eval_data: str | None,
    part: Part,
    samples: int,
    max_length: int,
    seed: int,
) -> TrainingText:
    """Read the calibration documents that `load_documents` finds, and hold a fixed tenth of them out to stop by.

    Args:
        tokenizer: the model's.
        task: "causal" or "masked".
        data, eval_data, part: as for `load_documents`; no evaluation document is among the documents of a training.
        samples: how many documents to choose at random, at most; 0 for all.
        max_length: tokens of a window, special ones included.
        seed: of the choice.

    Raises:
        DataError: data that cannot be used, or too little of it.
    """
    corpus = load_documents(data, part, eval_data)
    learnt, held = hold_out_to_stop(choose(corpus.calibration, samples, seed))
    if not learnt:
        raise DataError(
            f"{corpus.calibration_name} has one document to train on; expected two or more, one of them to stop by"
        )
    train, held_out = (
        make_windows(corpus.calibration_name, texts, tokenizer, task, max_length) for texts in (learnt, held)
    )
    return TrainingText(train, held_out, corpus.overlap)


def evaluation_hashes(data: str, eval_data: str | None, part: Part) -> frozenset[str]:
    """`short_hash` of every document that reports on `data` are made from.

    Raises:
        DataError: it cannot be read.
    """
    return frozenset(map(short_hash, load_documents(data, part, eval_data).evaluation))


def training_batches(
    windows: Windows, tokenizer: PreTrainedTokenizerBase, task: Task, batches: StepBatches
) -> DataLoader[PlacedExample]:
    """The batches of the steps of a training; a masked LM gets new masks in every epoch."""
    return DataLoader(
        Examples(windows, tokenizer, _labels(task), batches.buckets.seed),
        batch_sampler=batches,
        collate_fn=partial(collate, pad_id=padding_id(tokenizer)),
    )


def held_out_batches(
    windows: Windows, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int, seed: int
) -> DataLoader[PlacedExample]:
    """The windows to stop by, longest first, under masks that stay the same."""
    return DataLoader(
        Examples(windows, tokenizer, _labels(task), seed),
        batch_size=batch_size,
        sampler=[(index, 0) for index in longest_first(windows.input_ids)],
        collate_fn=partial(collate, pad_id=padding_id(tokenizer)),
    )


def _labels(task: Task) -> Labels:
    return "next" if task == "causal" else "masked"
