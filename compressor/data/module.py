"""The LightningDataModule over documents and windows: it holds what the Trainer asks for, and nothing else."""

from functools import partial

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from compressor.data.documents import Part, choose, load_documents
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


class TextDataModule(LightningDataModule):
    """Documents for calibrating (score, repair, recover) and, never the same ones, for evaluating.

    Batches are dicts of `input_ids`, `attention_mask` and `labels`, each int64 [batch, tokens], padded on the right,
    the longest windows first, and `places` [batch, 2], a window's document and how many of its windows came before, and
    `real` [real tokens], where the tokens are in the flattened batch.
    The labels are unshifted, -100 where nothing is to be predicted:

    - causal: the ids themselves, -100 at padding;
    - masked, evaluation and training: 15 % of a window's content tokens, which `input_ids` hides behind the mask
      token; which ones depends on the seed and the window (and, training, on the epoch), not on the batch;
    - masked, calibration: -100 everywhere; the ids are the text's own.

    After `setup()`, `calibration` and `evaluation` are the `Windows`. The tokenizer is never changed.

    Args:
        tokenizer: the model's.
        task: "causal" or "masked".
        data: what to calibrate on, and to evaluate with unless `eval_data` says otherwise; see `load_documents`.
        eval_data: a separate evaluation set, of the same kinds.
        part: which part of question-and-answer records to use.
        samples: how many calibration documents to choose at random, at most; 0 for all.
        eval_samples: the same for evaluation.
        batch_size: windows per batch.
        max_length: the model's context in tokens, special ones included; longer documents are split.
        seed: of the choice of documents, of the masks and of the order in training, or wherever it is `shuffled`.
        shuffled: calibrate in a random order, so that what was seen halfway is a fair sample, not the longest windows.

    Raises:
        DataError: on construction, for numbers out of range; in `setup`, for data that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Task,
        data: str = "gsm8k",
        eval_data: str | None = None,
        part: Part = "both",
        samples: int = 500,
        eval_samples: int = 200,
        batch_size: int = 8,
        max_length: int,
        seed: int = 0,
        shuffled: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("samples", samples, 0),
            ("eval_samples", eval_samples, 0),
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 1),
        ):
            if value < least:
                raise DataError(f"{name} is {value}; expected {least} or more")
        if task == "masked" and tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, which a masked LM needs; use the model's own tokenizer")
        self.tokenizer = tokenizer
        self.task: Task = task
        self.data = data
        self.eval_data = eval_data
        self.part: Part = part
        self.samples = samples
        self.eval_samples = eval_samples
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.shuffled = shuffled
        self.overlap = 0
        self._windows: tuple[Windows, Windows] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, choose and tokenise the documents, once whatever the stage."""
        if self._windows is not None:
            return
        corpus = load_documents(self.data, self.part, self.eval_data)
        calibration = choose(corpus.calibration, self.samples, self.seed)
        evaluation = choose(corpus.evaluation, self.eval_samples, self.seed)
        self.overlap = corpus.overlap
        self._windows = (
            make_windows(corpus.calibration_name, calibration, self.tokenizer, self.task, self.max_length),
            make_windows(corpus.evaluation_name, evaluation, self.tokenizer, self.task, self.max_length),
        )

    @property
    def calibration(self) -> Windows:
        """The calibration windows, once set up."""
        return self._ready()[0]

    @property
    def evaluation(self) -> Windows:
        """The evaluation windows, once set up."""
        return self._ready()[1]

    def describe(self) -> tuple[str, str]:
        """Two lines for the log: what calibrates and what evaluates."""
        dropped = f"; {self.overlap:,} more left out, being in the evaluation set too" if self.overlap else ""
        return (
            f"calibration: {self.calibration.describe()}{dropped}",
            f"evaluation: {self.evaluation.describe()}",
        )

    def predict_dataloader(self) -> DataLoader[PlacedExample]:
        """Calibration windows as they are, for scoring; longest first, or in buckets of a random order."""
        labels: Labels = "next" if self.task == "causal" else "none"
        if self.shuffled:
            sampler = ShuffledBuckets(self.calibration.input_ids, self.batch_size, self.seed)
            return self._loader(self.calibration, labels, sampler)
        return self._ordered(self.calibration, labels)

    def loss_dataloader(self) -> DataLoader[PlacedExample]:
        """Calibration windows with labels, for asking what the loss says; longest first, masked for a masked LM."""
        return self._ordered(self.calibration, "next" if self.task == "causal" else "masked")

    def test_dataloader(self) -> DataLoader[PlacedExample]:
        """Evaluation windows; longest first, masked for a masked LM."""
        return self._ordered(self.evaluation, "next" if self.task == "causal" else "masked")

    def val_dataloader(self) -> DataLoader[PlacedExample]:
        """Serve the evaluation windows, the batches of `test_dataloader`."""
        return self.test_dataloader()

    def train_dataloader(self) -> DataLoader[PlacedExample]:
        """Calibration windows for fine-tuning: the buckets of `predict_dataloader` in a new order in every epoch."""
        sampler = ShuffledBuckets(self.calibration.input_ids, self.batch_size, self.seed)
        return self._loader(self.calibration, "next" if self.task == "causal" else "masked", sampler)

    def _ordered(self, windows: Windows, labels: Labels) -> DataLoader[PlacedExample]:
        # A plain list has no set_epoch: Lightning must not change the evaluation's masks while it fits.
        return self._loader(windows, labels, [(index, 0) for index in longest_first(windows.input_ids)])

    def _loader(
        self, windows: Windows, labels: Labels, sampler: Sampler[Draw] | list[Draw]
    ) -> DataLoader[PlacedExample]:
        return DataLoader(
            Examples(windows, self.tokenizer, labels, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate, pad_id=padding_id(self.tokenizer)),
        )

    def _ready(self) -> tuple[Windows, Windows]:
        if self._windows is None:
            raise RuntimeError("the data module is not set up; call setup() first")
        return self._windows
