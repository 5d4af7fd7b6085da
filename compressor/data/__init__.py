"""Texts in, padded batches out: documents from anywhere, windows of tokens, and the Lightning module over both."""

from compressor.data.documents import Corpus, Part, choose, fingerprint, hold_out, load_documents
from compressor.data.module import TextDataModule
from compressor.data.windows import Batch, Frame, Windows, make_windows

__all__ = [
    "Batch",
    "Corpus",
    "Frame",
    "Part",
    "TextDataModule",
    "Windows",
    "choose",
    "fingerprint",
    "hold_out",
    "load_documents",
    "make_windows",
]
