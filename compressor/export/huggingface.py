"""A pruned model as a Hugging Face directory: weights, tokenizer, configs, and a record of what was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.export.verify import largest_deviation
from compressor.files import to_json
from compressor.loading import LoadedModel

RECORD = "pruning.json"


def write_checkpoint(loaded: LoadedModel, record: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Write a checkpoint that `compressor.load` reopens, reopen it, and compare its logits with the model in memory.

    `config.json` carries the removed heads under `pruned_heads`, the removed channels of MLPs under `pruned_channels`.
    Where no stock class has these shapes, loading the directory with one fails rather than giving another model.

    Returns:
        The record as written to `pruning.json`, with the verdict under `verified`.

    Raises:
        ArtefactError: the reloaded model's logits differ.
    """
    directory.mkdir()
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    deviation = largest_deviation(loaded.model, directory, loaded.task)
    written = {**record, "verified": {"reloaded_with": "compressor.load", "largest_logit_deviation": deviation}}
    (directory / RECORD).write_text(to_json(written), encoding="utf-8")
    return written
