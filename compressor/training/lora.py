"""Low-rank adapters (Hu et al. 2021) on the linear maps of a model, trained in their place and merged afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import ModelError, RecipeError

EXTRA = "recover"  # the optional dependency that brings peft


@dataclass(frozen=True)
class AdaptedModel:
    """A model whose linear maps carry adapters; nothing else of it is trained."""

    model: PreTrainedModel
    tuner: Any  # peft's

    def merge(self) -> None:
        """Add the adapters to the weights and take them away: the model is an ordinary one again, in place."""
        with _quiet_peft():
            self.tuner.merge_and_unload()
        vars(self.model).pop("peft_config", None)
        self.model.requires_grad_(True)


def check_peft() -> None:
    """Refuse adapters where peft is missing.

    Raises:
        RecipeError: it is.
    """
    try:
        with _quiet_peft():
            import peft  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"lora needs peft, which is not installed; pip install 'lightning-compressor[{EXTRA}]', or leave it out"
        ) from error


def adapt(model: PreTrainedModel, rank: int, seed: int) -> AdaptedModel:
    """Put an adapter of `rank` on every linear map but the language-model head, in place.

    The first factor is drawn by `seed`, the second is zero: at first the model computes what it did.

    Raises:
        RecipeError: peft is not installed.
        ModelError: there is no linear map that an adapter fits on.
    """
    check_peft()
    from peft import LoraConfig, LoraModel

    names = adaptable(model)
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear maps that adapters fit on; leave lora out")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=names)
    with _quiet_peft(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    return AdaptedModel(model, tuner.to(model.device))


def adaptable(model: PreTrainedModel) -> list[str]:
    """Names of the linear maps that adapters fit on."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # its weight is often that of the input embeddings as well
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and module.weight.numel()
        and not {"kept_outputs", "kept_arguments"} & vars(module).keys()  # an adapter would see other shapes
    ]


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hold back peft's advice: it sets what `Conv1D` needs by itself, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
