"""Recipes: defaults < YAML < flags, merged into one validated set of settings that can be saved beside a result."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import RecipeError
from compressor.files import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Every setting of every verb; a verb reads those it needs. `None` leaves the choice to what else is known.

    Without `model`, scoring takes the embedded model, pruning the one that was scored, and recovering and benching the
    one that was pruned.
    """

    # the model
    model: str | None = None
    revision: str | None = None
    task: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    # the text
    data: str | None = None
    eval_data: str | None = None
    part: str = "both"
    samples: int = 500
    eval_samples: int = 200
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0
    # scoring
    symbol: str = "key"
    triple_layers: list[int] | None = None
    order: int = 3
    values: list[str] | None = None
    coalitions: list[str] | None = None
    estimator: str = "plug-in"
    bootstrap: int = 100
    shuffles: int = 0
    memory_budget: float | None = None
    until_stable: bool = False
    # pruning
    criterion: str = "loss-game"
    ratio: float | None = None
    target_flops: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    structures: list[str] | None = None
    align: int = 8
    rounds: int = 1
    deployable: bool = False
    scope: str | None = None
    unit: str = "head"
    allow_empty: bool = False
    repair: bool = True
    # recovery
    objective: str = "distill"
    hidden_weight: float = 0.0
    learning_rate: float | None = None
    epochs: int = 3
    max_minutes: float = 10.0
    eval_every: int = 50
    train_samples: int = 0
    lora: int | None = None
    # measuring
    random_seeds: int = 5
    repeats: int = 5
    prompt_length: int = 128
    new_tokens: int = 32

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind, numbers out of range and words that are not in the list."""
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, hints[field.name]):
                raise RecipeError(f"{field.name} is {value!r}; expected {_kind(hints[field.name])}")
        if self.model == "":
            raise RecipeError("model is ''; expected a model directory, a hub id or 'embedded'")
        self._settle_budget()
        least = {
            "order": 2,
            "bootstrap": 0,
            "shuffles": 0,
            "samples": 0,
            "eval_samples": 0,
            "train_samples": 0,
            "epochs": 1,
            "eval_every": 1,
            "lora": 1,
            "seed": 0,
            "batch_size": 1,
            "max_length": 2,
            "random_seeds": 2,
            "repeats": 1,
            "prompt_length": 1,
            "new_tokens": 1,
            "align": 1,
            "rounds": 1,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise RecipeError(f"{name} is {value}; expected {minimum} or more")
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            raise RecipeError(f"memory_budget is {self.memory_budget:g}; expected GiB, more than 0")
        for name in ("hidden_weight", "max_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} is {getattr(self, name):g}; expected a number, 0 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise RecipeError(f"learning_rate is {self.learning_rate:g}; expected a number, more than 0")
        if self.objective == "loss" and self.hidden_weight:
            raise RecipeError(
                f"hidden_weight is {self.hidden_weight:g}, but objective 'loss' knows no dense model; leave out one"
            )
        if self.seed >= 1 << 32:
            raise RecipeError(f"seed is {self.seed}; expected less than 2³² = {1 << 32}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise RecipeError(f"{name} is {value!r}{did_you_mean(value, choices)}; expected {' or '.join(choices)}")

    def _settle_budget(self) -> None:
        """Check what says how much leaves, and fill in what was left open: a ratio, where nothing was said."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} both say how much is to leave; give one")
        for name in given:
            what = "a share of heads" if name == "ratio" else "the share of the dense model's that is to be left,"
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name):g}; expected {what} between 0 and 1, both excluded")
        if self.deployable and self.scope == "global":
            raise RecipeError("deployable means as many in every layer, and scope is 'global'; leave out one")
        for name in self.structures or ():
            if name not in STRUCTURES:
                hint = did_you_mean(name, STRUCTURES)
                raise RecipeError(f"structures names {name!r}{hint}; expected heads, channels or heads,channels")
        if self.structures is not None and len(set(self.structures)) != (len(self.structures) or -1):
            raise RecipeError("structures is empty or names one twice; expected heads, channels or heads,channels")
        if not given:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)

    @property
    def target(self) -> tuple[str, float] | None:
        """(kind, share of the dense model's to be left), the kind "flops", "params" or "latency"; None for a ratio."""
        for name in BUDGETS[1:]:
            if (share := getattr(self, name)) is not None:
                return name.removeprefix("target_"), share
        return None

    @property
    def scope_in_force(self) -> str:
        """The `scope`, where none is given the one that goes with the budget."""
        return self.scope or ("layer" if self.deployable or self.target is None else "global")

    @property
    def unit_in_force(self) -> str:
        """The `unit`; what is deployable takes as many heads of every group, the same where no keys are shared."""
        return "query" if self.deployable and self.unit == "head" else self.unit

    @property
    def calibration_data(self) -> str:
        """The `data` spec in force: the embedded model goes with the embedded corpus, any other with GSM8K."""
        return self.data or ("embedded" if self.model == "embedded" else "gsm8k")

    def to_yaml(self) -> str:
        """The recipe in the form that `resolve` reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


BUDGETS = ("ratio", "target_flops", "target_params", "target_latency")
DEFAULT_RATIO = 0.2
STRUCTURES = ("heads", "channels")
CHOICES = {
    "task": ("causal", "masked"),
    "part": ("question", "answer", "both"),
    "symbol": ("key", "offset", "sequence"),
    "scope": ("layer", "global"),
    "unit": ("head", "query", "group"),
    "objective": ("distill", "loss"),
}


def resolve(config: str | Path | None, settings: Mapping[str, Any]) -> Recipe:
    """Merge a YAML recipe with settings that override it; settings that are None are not there.

    Raises:
        RecipeError: an unreadable file, an unknown key, or a value that cannot be used.
    """
    values = dict(_read(Path(config)) if config is not None else {})
    given = {name: value for name, value in settings.items() if value is not None}
    if given.keys() & set(BUDGETS):
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    values.update(given)
    known = [field.name for field in fields(Recipe)]
    for name in values:
        if name not in known:
            raise RecipeError(f"unknown setting {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}")
    return Recipe(**values)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists() and path.name == str(path):
        path = Path(str(resources.files("compressor.configs"))) / path.name
    if not path.is_file():
        shipped = sorted(file.name for file in resources.files("compressor.configs").iterdir() if ".yaml" in file.name)
        raise RecipeError(
            f"there is no recipe {path.name}; give a YAML file, or a shipped recipe: {', '.join(shipped)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} holds a {type(values).__name__}; expected `setting: value` lines")
    return values


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _kind(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_kind(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list of whole numbers" if typing.get_args(hint) == (int,) else "a list of words"
    return names[hint]
