"""The support matrix: every language model class of transformers, tiny and random, pruned and compared with itself.

    python benchmarks/models.py              # all classes; writes compressor/assets/models.json
    python benchmarks/models.py llama bert   # some model types or classes, as JSON on stdout

A class counts as supported if there is a unit of removal (any heads; as many from every group; whole groups) with which
the pruned model gives the logits of the full model whose heads are silenced just before the output projection: on
batches padded on the right and on the left, with and without a cache, and after save and load. Heads that stay must
look where they looked, every number that counts heads must agree, and one training step must run. Of the channels of
MLPs the same is asked.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from aftermath import check_books, check_reload, check_training
from channels import examine_channels
from parity import (
    TOLERANCE,
    Mismatch,
    compare_cached,
    compare_logits,
    compare_matrices,
    compare_symbols,
    effects,
    symbols,
)
from plans import draw_plan, units_of
from tiny_models import Entry, Unbuildable, build, entries, inputs, variants
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from compressor.attention import AttentionLayer, attention_layers, prune_heads
from compressor.console import log, show_logs, track
from compressor.environment import machine, versions
from compressor.errors import CompressorError
from compressor.files import did_you_mean, to_json

TARGET = Path(__file__).parent.parent / "compressor" / "assets" / "models.json"
NAMES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}
SEEN = 100 * TOLERANCE  # silencing heads has to move the logits by this much, or parity would say little
Row = dict[str, Any]


def check(entry: Entry, seed: int = 0) -> Row:
    """What can be said of one class."""
    types = sorted(name for name, found in NAMES[entry.task].items() if found == entry.class_name)
    row: Row = {
        "model_type": entry.model_type,
        "model_types": [entry.model_type, *(name for name in types if name != entry.model_type)],
        "class": entry.class_name,
        "task": entry.task,
        "variant": entry.variant,
        "status": "fault",
    }
    try:
        row |= examine(entry, seed)
    except Unbuildable as reason:
        row |= {"status": "not constructible", "reason": sentence(str(reason))}
    except Exception as error:
        row |= {"reason": fault(entry, error)}
    return row


def examine(entry: Entry, seed: int) -> Row:
    """The row of a class that can be built."""
    model = build(entry, seed)
    row: Row = {"dtype": str(model.dtype).removeprefix("torch.")}
    row |= examine_heads(entry, model, seed)
    name = f"{seed} {entry.class_name} {entry.variant}"
    return row | examine_channels(model, entry.task, name, SEEN, lambda error: fault(entry, error))


def examine_heads(entry: Entry, model: Any, seed: int) -> Row:
    """What can be said of the heads of one class."""
    row: Row = {}
    try:
        layers = attention_layers(model)
    except CompressorError as reason:
        if "has no attention heads" in str(reason):
            return row | {"status": "no heads", "reason": "has no attention heads"}
        return row | {"status": "refused", "reason": sentence(str(reason))}
    row |= {"heads": heads_found(layers), **scoring(entry, model, layers)}
    tried = {unit: try_unit(entry, model, layers, unit, seed, row["scoring"] != "none") for unit in units_of(layers)}
    reached = [unit for unit in tried if "why" not in tried[unit]]
    row["units"] = reached
    row["unreached"] = {unit: tried[unit]["why"] for unit in tried if unit not in reached}
    if not reached:
        reason = min(row["unreached"].values(), key=lambda text: not text.startswith("fault"))
        return row | {"status": "fault" if reason.startswith("fault") else "refused", "reason": reason}
    best = [tried[unit] for unit in reached]
    return row | {
        "status": "supported",
        "parity": rounded(max(found["parity"] for found in best)),
        "effect": rounded(min(found["effect"] for found in best)),
        "cached": "yes" if all(found["cached"] for found in best) else "none",
        "training": "yes" if all(found["training"] for found in best) else "none",
        "reload": "none" if (lost := next((found["lost"] for found in best if found["lost"]), "")) else "yes",
        **({"why_not_reloaded": sentence(lost)} if lost else {}),
    }


def try_unit(entry: Entry, model: Any, layers: Sequence[AttentionLayer], unit: str, seed: int, scored: bool) -> Row:
    """What removing heads by one unit comes to; the reason under "why" if it does not work."""
    plan = draw_plan(layers, unit, f"{seed} {entry.class_name} {entry.variant} {unit}")
    if not plan:
        return {"why": "no layer has more than one head to lose"}
    try:
        pruned = prune_heads(copy.deepcopy(model), plan)
    except CompressorError as reason:
        return {"why": sentence(str(reason), layers)}
    except Exception as error:
        return {"why": fault(entry, error)}
    try:
        row = compare(entry, model, pruned, layers, plan, scored)
        if unit == "head":
            alike = {index: heads[:1] for index, heads in plan.items()}  # which a config can tell in one number
            check_books(model, prune_heads(copy.deepcopy(model), alike), layers, alike)
        return row
    except Mismatch as reason:
        return {"why": f"fault: {reason}"}
    except Exception as error:
        return {"why": fault(entry, error)}


def compare(
    entry: Entry, model: Any, pruned: Any, layers: Sequence[AttentionLayer], plan: dict[int, list[int]], scored: bool
) -> Row:
    """Put every question to a pruned model.

    Raises:
        Mismatch: an answer is wrong.
    """
    worst, moved, cached = 0.0, [], []
    for padding in ("right", "left"):
        given = inputs(model, padding=padding)
        moved += effects(model, layers, plan, given)
        worst = max(worst, compare_logits(model, pruned, layers, plan, given))
        cached.append(compare_cached(model, pruned, layers, plan, given))
        if scored:
            compare_symbols(model, pruned, layers, plan, given)
    if min(moved) < SEEN:
        raise Mismatch(f"silencing the heads of a layer moves the logits by {min(moved):.0e} only")
    check_books(model, pruned, layers, plan)
    lost = check_reload(pruned, model, entry.task, inputs(model))
    return {
        "lost": lost,
        "parity": max(worst, *(found or 0.0 for found in cached)),
        "effect": min(moved),
        "cached": None not in cached,
        "training": check_training(pruned, model, layers, inputs(model)),
    }


def scoring(entry: Entry, model: Any, layers: Sequence[AttentionLayer]) -> Row:
    """How the heads' symbols are read, and whether attention matrices of the class's own say the same."""
    given = inputs(model)
    try:
        symbols(model, layers, given)
        told = compare_matrices(model, layers, given)
    except (Mismatch, CompressorError) as reason:
        return {"scoring": "none", "why_not_scored": sentence(str(reason), layers)}
    except Exception as error:
        return {"scoring": "none", "why_not_scored": fault(entry, error)}
    way = "interface" if all(layer.interface for layer in layers) else "attention matrices"
    return {"scoring": way, "own_matrices": "same symbols" if told else "none"}


def heads_found(layers: Sequence[AttentionLayer]) -> str:
    """Like "2 × 6 over 2": layers × heads over groups."""
    kinds = []
    for layer in layers:
        groups = len(layer.groups)
        kind = f"{layer.num_heads}" + (f" over {groups}" if groups < layer.num_heads else "")
        kinds.append(kind + (f" ({layer.uses} times)" if layer.uses > 1 else ""))
    return ", ".join(f"{len(list(same))} × {kind}" for kind, same in groupby(kinds))


def sentence(reason: str, layers: Sequence[AttentionLayer] = ()) -> str:
    """A reason without what is true of the tiny model alone: names and numbers of layers, sizes."""
    text = " ".join(reason.split())
    for name in sorted({name for layer in layers for name in (layer.name, layer.block)}, key=len, reverse=True):
        text = text.replace(f" ({name})", "").replace(name, "a layer") if name else text
    text = re.sub(r"^the plan .*, whose code", "its code", text)
    text = re.sub(r"wants as many in each;.*", "wants as many heads in every group", text)
    text = re.sub(r"(cannot run without them|does not work as before without them).*", r"\1", text)
    text = re.sub(r"\bits \d+ heads", "its heads", text)
    return re.sub(r"\b[\w]+(\.[\w]+)*\.\d+(\.[\w]+)*(?= )", "its attention", text)


def fault(entry: Entry, error: Exception) -> str:
    """A line for something that should not have happened; its traceback goes to the log."""
    log.warning(f"{entry.class_name} {entry.variant}: {traceback.format_exc()}")
    return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rounded(value: float) -> float:
    """One digit: the rest is chance."""
    return float(f"{value:.0e}")


def chosen(names: Sequence[str]) -> list[Entry]:
    """All classes and variants, or those of some model types or classes."""
    known = [*entries(), *variants()]
    if not names:
        return known
    for name in names:
        if not any(name in (entry.model_type, entry.class_name) for entry in known):
            sys.exit(f"unknown model type {name!r}{did_you_mean(name, [entry.model_type for entry in known])}")
    return [entry for entry in known if {entry.model_type, entry.class_name} & set(names)]


def quiet() -> None:
    """One thread for every process, and no advice from transformers."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    show_logs(quiet=False)


def sweep(candidates: Sequence[Entry], jobs: int) -> list[Row]:
    """A row for each class, in their order."""
    with multiprocessing.get_context("spawn").Pool(jobs, quiet) as pool, track("classes", len(candidates)) as done:
        rows = []
        for row in pool.imap(check, candidates):
            rows.append(row)
            done()
    return rows


def main() -> None:
    """Try the classes and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types or classes; by default all, and only that is written")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    quiet()
    start = time.perf_counter()
    rows = sweep(chosen(args.names), args.jobs)
    document = {
        "suite": "models",
        "rows": rows,
        "settings": {"seed": 0, "tolerance": TOLERANCE, "padding": ["right", "left"], "batch": [2, 9]},
        "machine": machine(),
        "versions": versions(),
    }
    if args.names:
        print(to_json(document["rows"]), end="")
    else:
        TARGET.write_text(to_json(document), encoding="utf-8")
    log.info(f"{len(rows)} classes in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
