"""A plan that was given, as a pruning run wrote it or by hand: read, and held against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compressor.attention import attention_layers
from compressor.attention.trial import check_plan
from compressor.budget import COSTS, SCOPES, STRUCTURES, UNITS
from compressor.config import Recipe
from compressor.contenders import check_same_model
from compressor.errors import ArtefactError, PlanError, RecipeError
from compressor.files import read_json
from compressor.measure.latency import LatencyTable
from compressor.mlp import mlp_layers
from compressor.preparation import TEXT_SETTINGS
from compressor.pruning import Decision, base_of, load_as_stored
from compressor.types import PruningPlan, Scores

DECIDING = (
    *("criterion", "ratio", "target_flops", "target_params", "target_latency", "structures"),
    *("align", "rounds", "deployable", "scope", "unit", "allow_empty"),
)


def read_plan(path: Path) -> dict[str, Any]:
    """A document with a plan, as `compress prune` prints or writes it, edited or not.

    Raises:
        ArtefactError: it cannot be read.
        PlanError: it holds no plan.
    """
    document = read_json(path)
    plan = document.get("plan")
    if not isinstance(plan, dict) or not plan.keys() & {"heads", "channels"}:
        raise PlanError(f"{path} holds no plan; expected what `compress prune --dry-run --json` prints")
    for name in ("heads", "channels"):
        layers = plan.get(name, {})
        fine = isinstance(layers, dict) and all(
            index.isascii() and index.isdecimal() and isinstance(gone, list) for index, gone in layers.items()
        )
        if not fine:
            raise PlanError(
                f"{name} of the plan in {path} are no lists by layer; expected something like {{'0': [1, 2]}}"
            )
    known = {"base": _is_base, "scores": _is_scored, "latency_table": _is_table}
    wrong = [name for name, fits in known.items() if name in document and not fits(document[name])]
    if wrong:
        raise _damaged(wrong[0], path)
    return document


def _damaged(name: str, path: Path) -> PlanError:
    return PlanError(
        f"{name} in {path} is missing or damaged; write the plan again with `compress prune --dry-run --json`"
    )


def _is_base(written: object) -> bool:
    texts = written.get("scored", []) if isinstance(written, dict) else None
    return isinstance(texts, list) and all(map(_is_text, texts))


def _is_text(written: object) -> bool:
    """Whether this can be `data` of a scoring run."""
    hashes = written.get("hashes", []) if isinstance(written, dict) else None
    return isinstance(hashes, list) and all(isinstance(one, str) for one in hashes)


def _is_scored(written: object) -> bool:
    """Whether this tells a text to repair on, or nothing at all."""
    if not isinstance(written, dict) or not written:
        return written == {}
    data, settings = written.get("data"), written.get("settings")
    return (
        isinstance(settings, dict)
        and settings.keys() >= set(TEXT_SETTINGS)
        and _is_text(data)
        and isinstance(data, dict)
        and "fingerprint" in data
        and "seed" in written
    )


def _is_table(written: object) -> bool:
    try:
        points = LatencyTable.of(written).points  # type: ignore[arg-type]  # then it raises
        return bool(points) and all(of[0][1] > 0 for of in points.values())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False


def refuse_rules(settings: Mapping[str, Any]) -> None:
    """Refuse settings that say what to remove, beside a plan that says so.

    Raises:
        RecipeError: there is one.
    """
    given = [name for name in DECIDING if settings.get(name) is not None]
    if given:
        raise RecipeError(f"a plan says what leaves, and so does {given[0]}; give one of them")


def follow(given: Mapping[str, Any], path: Path, evidence: Scores | None, directory: Path, recipe: Recipe) -> Decision:
    """Take a plan as it is, after a look at whether it fits the model.

    Args:
        given: what `read_plan` read, at `path`.
        evidence: scores of the model in `directory`, whose text is for the repair; None for the text that the document
            names, or else the recipe.
        recipe: how to load.

    Raises:
        PlanError: the plan does not fit the model.
        ArtefactError: it is one for another model.
    """
    loaded = load_as_stored(recipe)
    identity = given.get("base", {}).get("identity", loaded.identity)
    if identity != loaded.identity:
        raise ArtefactError(
            f"the plan in {path} is for another model than {loaded.name}, or its weights have changed since; prune the "
            "model by its own scores, or take identity out of the plan"
        )
    if evidence is not None:
        check_same_model(loaded, evidence, directory)
    plan = _checked(given["plan"], path, loaded.model)
    priced = given.get("latency_table", {}).get("points", {}).keys()
    by_clock = plan.target is not None and plan.target[0] == "latency" and not plan.edited
    if by_clock and not set(plan.structures) <= priced:  # rivals are held to the same seconds
        raise _damaged("latency_table", path)
    base = base_of(recipe, loaded.identity, loaded.task)
    chosen_on = [given.get("scores", {}).get("data")] if evidence is not None else []
    for text in (*given.get("base", {}).get("scored", ()), *chosen_on):
        if text and text not in base["scored"] and (evidence is None or text != evidence.facts["data"]):
            base["scored"] = [text, *base["scored"]]
    document: dict[str, Any] = {
        "plan": plan.to_dict(),
        "given": path.name,
        "removed_in_resamples": None,
        "base": base,
    }
    if "latency_table" in given:
        document["latency_table"] = given["latency_table"]
    scored = given.get("scores") if evidence is None else evidence.facts
    if scored:
        document["scores"] = {name: scored[name] for name in ("data", "settings", "seed")}
    return Decision(plan, document, loaded, scored or None)


def _checked(written: Mapping[str, Any], path: Path, model: PreTrainedModel) -> PruningPlan:
    """The plan of a document, for a model."""
    empty = written.get("allow_empty", False) is True
    counts = [layer.num_heads for layer in attention_layers(model)]
    heads = check_plan(counts, {int(index): gone for index, gone in written.get("heads", {}).items()}, empty)
    channels: dict[int, tuple[int, ...]] = {}
    widths: list[int] = []
    if written.get("channels") or written.get("channels_per_layer"):
        widths = [mlp.num_channels for mlp in mlp_layers(model)]
        named = {int(index): gone for index, gone in written.get("channels", {}).items()}
        channels = check_plan(widths, named, empty, "channel")
    for name, found in (("heads_per_layer", counts), ("channels_per_layer", widths)):
        if written.get(name, found) not in (found, []):
            raise PlanError(f"the plan in {path} is for {name} {written[name]}; the model has {found}")
    if not heads and not channels:
        raise PlanError(f"the plan in {path} removes nothing; name heads or channels")
    ratio, target, align = written.get("ratio"), written.get("target"), written.get("align", 8)
    structures, rounds, predicted = written.get("structures", []), written.get("rounds", 1), written.get("predicted")
    wrong = {
        "ratio": ratio is not None and not _is_share(ratio),
        "target": target is not None and not _is_target(target),
        "align": type(align) is not int or align < 1,
        "scope": written.get("scope", "layer") not in SCOPES,
        "unit": written.get("unit", "head") not in UNITS,
        "seed": type(written.get("seed")) not in (int, type(None)),
        "rounds": type(rounds) is not int or rounds < 1,
        "predicted": predicted is not None and type(predicted) not in (int, float),
        "structures": not isinstance(structures, list) or not all(name in STRUCTURES for name in structures),
    }
    if any(wrong.values()):
        name = next(name for name in wrong if wrong[name])
        raise PlanError(f"{name} of the plan in {path} is {written[name]!r}, which no run of ours writes; mend it")
    named_ones = {*structures, *(["heads"] if heads else []), *(["channels"] if channels else [])}
    plan = PruningPlan(
        heads=heads,
        criterion=str(written.get("criterion", "by hand")),
        ratio=ratio,
        scope=str(written.get("scope", "layer")),
        heads_per_layer=tuple(counts),
        allow_empty=empty,
        seed=written.get("seed"),
        unit=str(written.get("unit", "head")),
        channels=channels,
        channels_per_layer=tuple(widths),
        target=next(iter(target.items())) if target else None,
        structures=tuple(name for name in STRUCTURES if name in named_ones),
        align=align,
        predicted=predicted,
        rounds=rounds,
        edited=written.get("edited") is True,
    )
    unruled = plan.ratio is None and plan.target is None
    whole = written.get("fingerprint") == plan.fingerprint
    if "fingerprint" not in written:  # older versions wrote none, and by hand nobody counts
        whole = "heads_per_layer" in written and written.get("removed_heads") == plan.removed
    edited = plan.edited or unruled or not whole
    return replace(plan, edited=edited, predicted=None if edited else plan.predicted)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 1


def _is_target(value: object) -> bool:
    return (
        isinstance(value, dict) and len(value) == 1 and set(value) <= set(COSTS) and all(map(_is_share, value.values()))
    )
