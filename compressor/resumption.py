"""What is to be recovered: a checkpoint, by the settings given, or what was interrupted, by those it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor.config import Recipe, resolve
from compressor.console import log
from compressor.contenders import as_recorded, record_of
from compressor.errors import ArtefactError, RecipeError
from compressor.runs import CHECKPOINT, RUNS, check_output, newest_run, runs_of
from compressor.training import StateFiles, check_peft, read_state
from compressor.training.state import STATE

SUFFIX = ".resume"  # of the directory that an interrupted recovery leaves beside its output


@dataclass(frozen=True)
class Request:
    """What is to be recovered, and how. `target` is where the result goes, None for the next free directory."""

    recipe: Recipe
    folder: Path
    record: dict[str, Any]
    target: Path | None
    resume: bool


def request_of(
    checkpoint: str | Path | None,
    resume: bool,
    config: str | Path | None,
    output_dir: str | Path | None,
    force: bool,
    settings: Mapping[str, Any],
) -> Request:
    """Find the checkpoint, and settle every setting; those of an interrupted recovery are as they were.

    Raises:
        CompressorError: there is no such checkpoint, nothing to resume, or a setting that cannot be used.
    """
    recipe = resolve(config, settings)
    check_output(output_dir, force)
    target = None if output_dir is None else Path(output_dir)
    if resume:
        target, facts = _interrupted(target, recipe.model)
        folder = Path(facts["checkpoint"])
        if checkpoint is not None and _checkpoint(checkpoint, None).resolve() != folder.resolve():
            raise RecipeError(f"--resume goes on with {folder}; got {checkpoint}: leave --checkpoint out")
        recipe = _as_begun(resolve(None, facts["recipe"]), resolve(config, {}), settings)
    else:
        folder = _checkpoint(checkpoint, recipe.model)
    if recipe.lora is not None:
        check_peft()
    record = record_of(folder)
    if record is None:
        raise ArtefactError(
            f"{folder} does not say what it was pruned from; expected a checkpoint of `compress prune --export`"
        )
    recipe = replace(as_recorded(recipe, record), task=recipe.task or record["base"].get("task"))
    return Request(recipe, folder, record, target, resume)


def state_directory(request: Request, target: Path, force: bool) -> Path:
    """Where the state of a recovery is kept that will write to `target`.

    Raises:
        ArtefactError: an interrupted recovery is kept there, and was not asked to be resumed.
    """
    directory = target.with_name(target.name + SUFFIX)
    if directory.exists() and not request.resume:
        if not force:
            raise ArtefactError(
                f"{directory} keeps an interrupted recovery; go on with --resume, or --force to start anew"
            )
        StateFiles(directory, {}).discard()
    return directory


def _checkpoint(given: str | Path | None, model: str | None) -> Path:
    if given is None:
        newest = newest_run("prune", model, holding=CHECKPOINT)
        if newest is None:
            raise ArtefactError("there is nothing to recover; give --checkpoint, or `compress prune --export` first")
        log.info(f"recovering the newest pruned checkpoint, {newest / CHECKPOINT}")
        return newest / CHECKPOINT
    folder = Path(given)
    return folder / CHECKPOINT if (folder / CHECKPOINT).is_dir() else folder


def _interrupted(target: Path | None, model: str | None) -> tuple[Path, dict[str, Any]]:
    """Where an interrupted recovery was going to write to, and its facts; the newest one if no target is named."""
    if target is not None:
        found = [target.with_name(target.name + SUFFIX)]
    else:
        places = (RUNS if model is None else runs_of(model)).glob(f"**/*{SUFFIX}/{STATE}")
        found = [file.parent for file in sorted(places, key=lambda file: file.stat().st_mtime_ns)]
    document = read_state(found[-1]) if found else None
    if document is not None and not isinstance(document["facts"].get("recipe"), dict):
        raise ArtefactError(f"{found[-1]} is not the state of a recovery; remove it and start anew")
    if document is None:
        place = f"beside {target}" if target is not None else f"under {RUNS}"
        raise ArtefactError(f"there is no interrupted recovery {place}; leave --resume out to start one")
    return found[-1].with_name(found[-1].name.removesuffix(SUFFIX)), document["facts"]


def _as_begun(begun: Recipe, config: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe an interrupted recovery was begun with; what was given again has to agree with it."""
    defaults = Recipe()
    given = {name: value for name, value in asdict(config).items() if value != getattr(defaults, name)}
    given |= {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if getattr(begun, name) != value:
            raise RecipeError(
                f"{name} is {value!r}, but the interrupted recovery was begun with {getattr(begun, name)!r}; "
                "leave it out, or start anew without --resume"
            )
    return begun
