"""Slimmer checkpoints, each checked by loading it again."""

from compressor.export.huggingface import RECORD, write_checkpoint

__all__ = ["RECORD", "write_checkpoint"]
