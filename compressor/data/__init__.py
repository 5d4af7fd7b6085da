"""Texts in, padded batches out: documents from anywhere, windows of tokens, and the Lightning module over both."""

from compressor.data.documents import Corpus, Part, choose, fingerprint, hold_out, load_documents
from compressor.data.module import TextDataModule
from compressor.data.training import (
    StepBatches,
    TrainingText,
    evaluation_hashes,
    held_out_batches,
    load_training_text,
    training_batches,
)
from compressor.data.windows import Batch, Frame, Windows, make_windows

__all__ = [
    "Batch",
    "Corpus",
    "Frame",
    "Part",
    "StepBatches",
    "TextDataModule",
    "TrainingText",
    "Windows",
    "choose",
    "evaluation_hashes",
    "fingerprint",
    "held_out_batches",
    "hold_out",
    "load_documents",
    "load_training_text",
    "make_windows",
    "training_batches",
]
