"""Where results go: one directory per run, with its recipe and a record of when and on what it ran."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from compressor.config import Recipe
from compressor.environment import machine, versions
from compressor.files import RUN_FILE, check_target, is_directory, next_directory, read_run, staged_directory, to_json
from compressor.loading import choose_device

RUNS = Path("runs")
CHECKPOINT = "checkpoint"  # of the run that made it, the subdirectory


@contextmanager
def result_directory(
    verb: str, recipe: Recipe, output_dir: str | Path | None, force: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield (a directory to write to, where it will be); what was written appears there whole, or not at all.

    `output_dir` is `runs/<model>/<verb>` by default, or the first of `…-2`, `…-3` that is free.
    """
    assert recipe.model is not None
    target = Path(output_dir) if output_dir is not None else next_directory(runs_of(recipe.model), verb)
    started = datetime.now(UTC)
    clock = time.perf_counter()
    with staged_directory(target, force) as staged:
        yield staged, target
        (staged / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        facts = {
            "verb": verb,
            "model": recipe.model,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
            "finished": time.time_ns(),
            "machine": machine(choose_device(recipe.device)[0]),
            "versions": versions(),
        }
        (staged / RUN_FILE).write_text(to_json(facts), encoding="utf-8")


def check_output(output_dir: str | Path | None, force: bool) -> None:
    """Refuse an unusable output directory before any work is done for it."""
    if output_dir is not None:
        check_target(Path(output_dir), force)


def newest_run(verb: str | tuple[str, ...], model: str | None, holding: str = "") -> Path | None:
    """The newest finished run of a verb under `runs/`, of `model` if one is named, with a subdirectory `holding`.

    Of several verbs, the newest run of any.
    """
    verbs = (verb,) if isinstance(verb, str) else verb
    found = []
    for file in RUNS.glob(f"**/{RUN_FILE}"):
        if any(part.startswith(".") for part in file.parts):
            continue  # unfinished work
        facts = read_run(file.parent)
        if facts and facts["verb"] in verbs and model in (None, facts["model"]) and (file.parent / holding).is_dir():
            found.append((facts["finished"], file.parent))
    return max(found)[1] if found else None


def runs_of(model: str) -> Path:
    """The directory under `runs/` that results on a model go to."""
    return RUNS / _slug(model)


def _slug(model: str) -> str:
    name = Path(model).resolve().name if is_directory(model) else model.rstrip("/")
    slug = "".join(letter if letter.isalnum() or letter in "-_." else "--" for letter in name)
    return slug.lstrip(".")[:100] or "model"
