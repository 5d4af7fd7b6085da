"""A name → a model, its tokenizer and the facts that identify it. Safetensors only; remote code only when asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from compressor import assets
from compressor.attention.record import dense_config, is_pruned, rebuild, tell_stored
from compressor.context import max_positions
from compressor.errors import ModelError, RecipeError
from compressor.files import hash_files, is_directory, is_file
from compressor.types import Task

EMBEDDED = "embedded"
UNLIMITED = 1 << 30  # tokenizers write a far greater number where there is no limit
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_NAMES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}
_CLASSES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "masked": MODEL_FOR_MASKED_LM_MAPPING}
_AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, and where it came from.

    `identity` has `sha256` (of a local directory's config and weights), or `hub` and `revision` (its name and commit
    there): two models with equal identities are the same model.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    identity: dict[str, str]
    choice: str  # of dtype and device, with the reasons

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, special ones included."""
        limits = (max_positions(self.model) or UNLIMITED, self.tokenizer.model_max_length or UNLIMITED)
        return int(min(*limits, UNLIMITED))


def load(
    path: str | Path,
    *,
    task: Task | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal or masked language model, dense or pruned, in evaluation mode.

    Args:
        path: a local directory (also one that `compress prune --export` wrote), a hub id, or "embedded".
        task: "causal" or "masked"; chosen from the config by default.
        revision: branch, tag or commit on the hub.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" …
        dtype: "auto" (as stored, but float32 for 16-bit weights on a CPU), "stored", or one of `DTYPES`.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: there is no such model, or it is not one of the task.
        RecipeError: an unknown device or dtype.
    """
    return _open(str(path), task, revision, device, dtype, trust_remote_code)[0]


def load_model(
    path: str,
    *,
    task: Task | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model as `load` does, together with its tokenizer and identity.

    Raises:
        ModelError: also when the model has no tokenizer.
    """
    model, chosen, choice = _open(path, task, revision, device, dtype, trust_remote_code)
    source = _resolve(path)
    with _quiet_transformers():
        tokenizer = _tokenizer(source, path, model.config, revision, trust_remote_code)
    return LoadedModel(path, model, tokenizer, chosen, identify(source, revision), choice)


def identify(source: str, revision: str | None = None) -> dict[str, str]:
    """What tells a model from every other: its hub commit, or the hash of its local config and weights."""
    folder = Path(source)
    if folder.is_dir():
        return {"sha256": hash_files([folder / "config.json", *folder.glob("*.safetensors")])}
    # The config no longer says which commit it came from; the path of the cached file does.
    commit = extract_commit_hash(cached_file(source, "config.json", revision=revision), None)
    return {"hub": source, "revision": str(commit)}


def choose_task(config: PreTrainedConfig, task: str | None, name: str) -> Task:
    """The task a config was made for, or the one asked for if the model can do it.

    Raises:
        ModelError: the model is neither a causal nor a masked language model, or not of the task asked for.
    """
    kind = config.model_type
    able = [task for task in get_args(Task) if kind in _NAMES[task] or _named_class(config, task)]
    able += [candidate for candidate in get_args(Task) if f"AutoModelFor{candidate.title()}LM" in _auto_map(config)]
    if "masked" in able and "causal" in able and not getattr(config, "is_decoder", False):
        # An encoder with a causal head attached would see the future and report perplexities too good to be true.
        architectures = " ".join(config.architectures or ())
        able = ["masked"] if "Masked" in architectures or not _decodes(architectures) else able
    if task is not None and task not in get_args(Task):
        raise RecipeError(f"task is {task!r}; expected one of {', '.join(get_args(Task))}")
    if not able:
        raise ModelError(f"{name} is a {kind!r} model; expected a causal or masked language model")
    if task is not None and task not in able:
        raise ModelError(f"{name} is a {kind!r} model and does no {task} language modelling; use --task {able[0]}")
    return cast(Task, task or able[0])


def choose_device(device: str) -> tuple[torch.device, str]:
    """The device to use, and why.

    Raises:
        RecipeError: there is no such device here.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return (found, "the accelerator at hand") if found else (torch.device("cpu"), "no accelerator at hand")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen).cpu()  # the meta device holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"device {device!r} cannot be used here; expected auto, cpu, cuda, cuda:1, mps …") from error
    return chosen, "as asked"


def choose_dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to use, and why.

    Raises:
        RecipeError: an unknown name.
    """
    if dtype not in ("auto", "stored", *DTYPES):
        raise RecipeError(f"dtype is {dtype!r}; expected auto, stored, {', '.join(DTYPES)}")
    if dtype in DTYPES:
        return DTYPES[dtype], "as asked"
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if dtype == "auto" and device.type == "cpu" and stored in (torch.float16, torch.bfloat16):
        return torch.float32, f"{str(stored).removeprefix('torch.')} is slow and coarse on a CPU"
    return stored, "as stored"


def _resolve(name: str) -> str:
    """The directory or hub id behind a name."""
    if name == EMBEDDED:
        return str(assets.MODEL)
    if not name:
        raise ModelError("the model has no name; expected a model directory, a hub id or 'embedded'")
    if is_directory(name):
        folder = Path(name).expanduser()
        if (folder / "checkpoint" / "config.json").is_file():  # what `compress prune --export` wrote
            return str(folder / "checkpoint")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json; expected a directory that save_pretrained wrote")
        return str(folder)
    if is_file(name):
        raise ModelError(f"{name} is a file; expected a model directory, a hub id or 'embedded'")
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no directory {name}; expected a model directory, a hub id or 'embedded'")
    return name


def _open(
    name: str, task: Task | None, revision: str | None, device: str, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, Task, str]:
    """The model, its task, and what was chosen for it and why."""
    source = _resolve(name)
    target, why_device = choose_device(device)
    with _quiet_transformers():
        config, pruned = _config(source, name, revision, trust_remote_code)
        chosen = choose_task(config, task, name)
        number, why_dtype = choose_dtype(dtype, config, target)
        model = _weights(source, name, config, pruned, chosen, revision, number, trust_remote_code)
    nn.Module.to(model, target)
    nn.Module.eval(model)
    choice = f"{str(number).removeprefix('torch.')} ({why_dtype}) on {target} ({why_device})"
    return model, chosen, choice


def _config(
    source: str, name: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The config of the model; for a pruned one that of the dense model, and the config as it is stored."""
    try:
        stored, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not is_pruned(stored):
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code), None
        return CONFIG_MAPPING[stored["model_type"]].from_dict(dense_config(stored)), stored
    except ModelError as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from error
    except Exception as error:  # a damaged config can trip over anything
        raise ModelError(_explain(name, source, error)) from error


def _weights(
    source: str,
    name: str,
    config: PreTrainedConfig,
    pruned: dict[str, Any] | None,
    task: Task,
    revision: str | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    known = type(config) in _CLASSES[task]
    stock = cast(type[PreTrainedModel], _CLASSES[task][type(config)]) if known else _named_class(config, task)
    # Text models of larger ones are in no table of transformers; their configs name their classes all the same.
    loader: Any = _AUTO[task] if known or stock is None else stock
    if pruned is not None:
        assert stock is not None
        loader = _pruned_class(stock, pruned)
    try:
        model, report = loader.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **({"trust_remote_code": trust_remote_code} if loader is _AUTO[task] else {}),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(_explain(name, source, error)) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of {name} lack {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which "
            f"{task} language modelling needs; is it a checkpoint of another task?"
        )
    if pruned is not None:
        model.__class__ = stock
        tell_stored(model, pruned)
    return cast(PreTrainedModel, model)


def _named_class(config: PreTrainedConfig, task: Task) -> type[PreTrainedModel] | None:
    """The class that a config names as its own, if it is one of transformers' for the task."""
    names = [name for name in config.architectures or () if name in _NAMES[task].values()]
    return cast(type[PreTrainedModel], getattr(transformers, names[0])) if names else None


def _pruned_class(stock: type[PreTrainedModel], stored: dict[str, Any]) -> type[PreTrainedModel]:
    """A class whose instances are born pruned, so that `from_pretrained` finds the slim shapes it is to fill."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        stock.__init__(self, config, *args, **kwargs)
        rebuild(self, stored)

    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})


def _tokenizer(
    source: str, name: str, config: PreTrainedConfig, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizer backends raise whatever they like
        raise ModelError(f"{name} has no tokenizer that can be loaded ({_first_line(error)})") from error
    if not len(tokenizer):
        raise ModelError(f"{name} has no tokenizer: no tokenizer files are beside the model")
    return cast(PreTrainedTokenizerBase, tokenizer)


def _explain(name: str, source: str, error: BaseException) -> str:
    text = str(error)
    if "connect to" in text or "offline" in text.lower() or "cached files" in text:
        return (
            f"model {name!r} is neither a local directory nor in the hub's cache, and the hub cannot be reached; "
            f"give a model directory, or --model {EMBEDDED}"
        )
    if "is not a valid model identifier" in text or "not a local folder" in text:
        return f"model {name!r} is neither a local directory nor on the hub; check the name, or give a directory"
    if "trust_remote_code" in text:
        return f"model {name!r} brings code of its own; --trust-remote-code runs it, if you trust where it comes from"
    if "safetensors" in text and Path(source).is_dir():
        return f"{name} has no model.safetensors; pickled weights are not loaded (save it with save_pretrained first)"
    return f"model {name!r} cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _auto_map(config: PreTrainedConfig) -> dict[str, Any]:
    return getattr(config, "auto_map", None) or {}


def _decodes(architectures: str) -> bool:
    return "CausalLM" in architectures or "LMHead" in architectures


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and advice to itself while a model loads; what matters is raised."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
