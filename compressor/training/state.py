"""An unfinished training on disk: safetensors and JSON beside the result that it will become.

`state.json` names the files that belong together and is replaced last, so that whatever stops the process leaves a
state that can be gone on from. No file is a pickle.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.errors import ArtefactError
from compressor.files import read_json, to_json

STATE = "state.json"
_WEIGHT, _OPTIMISER, _RANDOM = "weight.", "optimiser.", "random."


@dataclass(frozen=True)
class Standing:
    """How far a training is: steps done, seconds spent, the held-out perplexities found (step, value), why it ended."""

    step: int = 0
    seconds: float = 0.0
    history: tuple[tuple[int, float | None], ...] = ()  # None: not a finite number
    ended: str = ""  # not yet

    @property
    def before(self) -> float:
        """Held-out perplexity before the first step."""
        value = self.history[0][1]
        assert value is not None  # a training does not start from there
        return value

    @property
    def best(self) -> tuple[int, float]:
        """(step, perplexity) of the lowest so far, the earliest of equals."""
        finite = [(value, step) for step, value in self.history if value is not None]
        value, step = min(finite)
        return step, value


@dataclass(frozen=True)
class StateFiles:
    """Where a training keeps its state, and the `facts` (JSON-ready) that tell it from every other."""

    directory: Path
    facts: Mapping[str, Any]

    def save(self, standing: Standing, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Write where a training stands; its weights also as the best ones, if they are.

        Raises:
            ArtefactError: the disk refuses.
        """
        tensors = {f"{_WEIGHT}{name}": value for name, value in trained.items()}
        best, now = standing.best[0], f"step-{standing.step}.safetensors"
        names = {"tensors": now, "best": f"best-{best}.safetensors"}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if best == standing.step:
                _save(tensors, self.directory / names["best"])
            _save({**tensors, **_moments(trained, optimiser), **_random_states()}, self.directory / now)
            document = {**asdict(standing), **names, "facts": dict(self.facts)}
            partial = self.directory / f".{STATE}"
            partial.write_text(to_json(document), encoding="utf-8")
            partial.replace(self.directory / STATE)
            for file in self.directory.iterdir():
                if file.name not in (STATE, *names.values()):
                    file.unlink()
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"cannot write {self.directory}: {' '.join(str(error).split())}") from error

    def standing(self) -> Standing:
        """Where the training stands that was written last; at the beginning if there is none."""
        document = read_state(self.directory)
        if document is None:
            return Standing()
        history = tuple((step, value) for step, value in document["history"])
        return Standing(document["step"], document["seconds"], history, document["ended"])

    def restore(self, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Put weights, the optimiser's moments and the random streams back where they were.

        Raises:
            ArtefactError: the state is damaged, or of other weights.
        """
        tensors = self._read("tensors")
        _put_weights(tensors, trained, self.directory)
        for name, parameter in trained.items():
            moments = {key: tensors[key] for key in tensors if key.startswith(f"{_OPTIMISER}{name}|")}
            for key, value in moments.items():
                device = "cpu" if value.ndim == 0 else parameter.device  # AdamW keeps its count of steps on the CPU
                optimiser.state[parameter][key.rpartition("|")[2]] = value.to(device)
        torch.set_rng_state(tensors[f"{_RANDOM}cpu"])
        if f"{_RANDOM}cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors[f"{_RANDOM}cuda"])

    def restore_best(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Put the best weights into the parameters.

        Raises:
            ArtefactError: the state is damaged, or of other weights.
        """
        _put_weights(self._read("best"), trained, self.directory)

    def discard(self) -> None:
        """Remove the state: the training is over."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, which: str) -> dict[str, torch.Tensor]:
        document = read_state(self.directory)
        assert document is not None
        try:
            return load_file(self.directory / document[which])
        except (OSError, SafetensorError) as error:
            raise _damaged(self.directory) from error


def read_state(directory: Path) -> dict[str, Any] | None:
    """What `state.json` of an unfinished training says, or None where there is none.

    Raises:
        ArtefactError: it is damaged.
    """
    if not (directory / STATE).is_file():
        return None
    document = read_json(directory / STATE)
    wanted = {"step": int, "seconds": float, "history": list, "ended": str}
    wanted |= {"tensors": str, "best": str, "facts": dict}
    if not all(isinstance(document.get(name), kind) for name, kind in wanted.items()):
        raise _damaged(directory)
    return document


def _damaged(directory: Path) -> ArtefactError:
    return ArtefactError(f"the unfinished training in {directory} is damaged; remove it and start anew")


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _moments(trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{_OPTIMISER}{name}|{key}": value
        for name, parameter in trained.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _random_states() -> dict[str, torch.Tensor]:
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


@torch.no_grad()
def _put_weights(tensors: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter], directory: Path) -> None:
    stored = {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name.startswith(_WEIGHT)}
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in trained.items()}:
        raise _damaged(directory)
    for name, value in stored.items():
        trained[name].copy_(value)
