"""Turn benchmarks/results/*.json into the tables of the documentation, wherever a `<!-- table: NAME -->` stands.

`models` is the support matrix, whose JSON ships with the package.

python benchmarks/tables.py          # rewrite README.md and those in benchmarks/
python benchmarks/tables.py --check  # fail if they do not say what the JSON says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from compressor import assets
from compressor.paired import undecided
from compressor.support import lines, summary

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "MODELS.md")
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(document: dict[str, Any]) -> str:
    """The Markdown of one suite's result."""
    return TABLES[document["suite"]](document)


def quality_table(document: dict[str, Any]) -> str:
    """Rise of perplexity by criterion, scope and repair; the lowest of each column in bold, random included."""
    columns = {name: document["summaries"][name] for name in ("layer", "layer repaired", "global", "global repaired")}
    dense = document["rows"][0]
    cells: dict[str, list[tuple[float, str]]] = {}
    for column in columns:
        differences = columns[column].get("differences")
        for row in _column(document, column):
            if row["kind"] == "rival":
                change, mark = row["perplexity_change"], _undecided(differences, row["name"])
                cells.setdefault(row["name"], []).append((change, f"{change:+.1%}{mark}"))
        random = columns[column]["random"]
        mean, sd = random["mean"] / dense["perplexity"] - 1, random["sd"] / dense["perplexity"]
        cells.setdefault("random", []).append((mean, f"{mean:+.1%} ± {sd:.1%}"))
    best = [min(entry[0] for entry in column) for column in zip(*cells.values(), strict=True)]
    lines = [_line("criterion", "costs per example", *columns, "ranks like `loo`")]
    lines.append(_line(*["---"] * (len(columns) + 3)))
    for name, found in sorted(cells.items(), key=lambda entry: entry[1][-1][0]):
        marked = [f"**{text}**" if value == low else text for (value, text), low in zip(found, best, strict=True)]
        known = document["rank_correlation_with_loo"].get(name) if name not in ("random", "loo") else None
        rank = "" if known is None else f"{known:+.2f}"
        lines.append(_line(f"`{name}`", document["costs_per_example"][name], *marked, rank))
    data, calibration = document["evaluation"], document["calibration"]
    told, portion = [], PORTIONS[document["settings"].get("unit", "head")]
    for scope, where in (("layer", f"as many of every layer{portion}"), ("global", f"model-wide{portion}")):
        gone = _column(document, scope)[0]
        saved = f"{_saved(gone, dense, 'attention')} of the FLOPs of attention, {_saved(gone, dense, 'total')} of all"
        told.append(f"{gone['plan']['removed_heads']} of {gone['plan']['total_heads']} heads {where} ({saved})")
    draws = columns["layer"]["random"]["draws"]
    caption = (
        f"{document['model']} without {' or '.join(told)}: rise of the perplexity on {data['documents']:,} documents "
        f"of {data['name']} ({data['tokens']:,} tokens), dense {dense['perplexity']:.3f}; calibrated and repaired on "
        f"{calibration['documents']:,} documents of {calibration['name']}; random: mean ± standard deviation of "
        f"{draws} draws. FLOPs of one sequence of {dense['costs']['length']} tokens, by the first criterion."
    )
    return "\n".join([*lines, "", caption + _others(document) + _how_sure(columns)])


PORTIONS = {"head": "", "query": ", as many of every group", "group": ", in whole groups"}


def _undecided(differences: dict[str, Any] | None, name: str) -> str:
    """A mark where the interval of the reference's perplexity over this one's contains no change."""
    against = differences["against"] if differences else {}
    return " ≈" if name in against and undecided(against[name]) else ""


def _others(document: dict[str, Any]) -> str:
    """Where rows of another toolkit's come from, and whether the models that it cut itself are the same ones."""
    rows = [row for row in document["rows"] if "own_perplexity" in row and not row["repaired"]]
    if not rows:
        return ""
    apart = max(abs(row["perplexity"] / row["own_perplexity"] - 1) for row in rows)
    return (
        f" `torch-pruning`: heads by the importance and the pruner of version {rows[0]['version']}, removed and "
        f"repaired here; the models that it cut itself have these perplexities up to {apart:.0e}."
    )


def _how_sure(columns: dict[str, Any]) -> str:
    """What the mark means, and who beats all random draws; nothing for results that compare nothing."""
    if not all(found.get("differences") for found in columns.values()):
        return ""
    reference = columns["layer"]["differences"]["reference"]
    winners = []
    for column, found in columns.items():
        names = ", ".join(f"`{name}`" for name in sorted(found["random"]["best_draw_beaten_by"])) or "nobody"
        winners.append(f"{column}: {names}")
    return (
        f" ≈: not told apart from `{reference}`, for the 95 % interval of the difference over documents drawn anew "
        f"contains 0. Better than random's best draw are, {'; '.join(winners)}."
    )


def sensitivity_table(document: dict[str, Any]) -> str:
    """Rise of perplexity by calibration text; over seeds the mean with the range, else a 95 % interval."""
    dense, *rows = document["rows"]
    whole = {row["scope"]: row for row in rows if row["role"] == "whole"}
    notes = {"size": "", "whole": ", all", "trained on": ", of the model's training", "other": ""}
    lines = [_line("calibrated and repaired on", "documents", "tokens", "layer", "same heads", "global", "same heads")]
    lines.append(_line(*["---"] * 7))
    texts = dict.fromkeys((row["role"], row["text"]["name"], row["text"]["documents"]) for row in rows)
    for role, name, documents in texts:
        cells, tokens = [], []
        for scope in ("layer", "global"):
            own = [
                row
                for row in rows
                if (row["scope"], row["role"], row["text"]["name"], row["text"]["documents"])
                == (scope, role, name, documents)
            ]
            against = document["differences"][scope]["against"]
            near = role != "whole" and all(undecided(against[row["name"]]) for row in own)
            shared = [_shared(row["plan"], whole[scope]["plan"]) for row in own]
            cells += [_rise(own) + (" ≈" if near else ""), f"{sum(shared) / len(shared):.3g}"]
            tokens = [row["text"]["tokens"] for row in own]
        counted = f"{sum(tokens) / len(tokens):,.0f}"
        lines.append(_line(f"{name}{notes[role]}", f"{documents:,}", counted, *cells))
    evaluation, settings = document["evaluation"], document["settings"]
    gone = {scope: f"{row['plan']['removed_heads']} of {row['plan']['total_heads']}" for scope, row in whole.items()}
    caption = (
        f"{document['model']} without {gone['layer']} heads as many of every layer, or {gone['global']} model-wide, by "
        f"`{settings['criterion']}`, and repaired: rise of the perplexity on the same {evaluation['documents']:,} "
        f"documents of {evaluation['name']} ({evaluation['tokens']:,} tokens), dense {dense['perplexity']:.3f}. In "
        f"brackets a 95 % interval over evaluation documents drawn anew; of smaller sizes the mean of "
        f"{settings['seeds']} draws of documents, with the least and the greatest. Same heads: how many of those that "
        "leave by all of the text leave here too, on average. ≈: no draw is told apart from all of the text."
    )
    return "\n".join([*lines, "", caption])


def _rise(rows: list[dict[str, Any]]) -> str:
    changes = [row["perplexity_change"] for row in rows]
    if len(rows) > 1:
        return f"{sum(changes) / len(changes):+.1%} ({min(changes):+.1%} to {max(changes):+.1%})"
    found = rows[0]["perplexity_change_interval"]
    return f"{changes[0]:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}]"


def _shared(plan: dict[str, Any], other: dict[str, Any]) -> int:
    """Heads that leave by both plans."""
    return sum(len(set(heads) & set(other["heads"].get(layer, ()))) for layer, heads in plan["heads"].items())


def _column(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of one scope, as cut or repaired."""
    scope, _, repaired = name.partition(" ")
    return [
        row
        for row in document["rows"]
        if row["plan"] is not None and (row["plan"]["scope"], row["repaired"]) == (scope, bool(repaired))
    ]


def budgets_table(document: dict[str, Any]) -> str:
    """Rise of perplexity at a target of FLOPs, by way of pruning and by rival."""
    lines = [_line("model", "heads", "channels", "FLOPs", "parameters", "perplexity", "95 % interval")]
    lines.append(_line(*["---"] * 7))
    dense = document["rows"][0]
    for row in document["rows"][1:]:
        if row["kind"] == "random":
            continue
        plan, found = row.get("plan"), row["perplexity_change_interval"]
        counts = ["", ""] if plan is None else [f"−{plan['removed_heads']}", f"−{plan['removed_channels']:,}"]
        parameters = row["costs"]["parameters"] / dense["costs"]["parameters"] - 1
        name = f"`loss-game`, {row['name']}" if row["kind"] == "pruned" else f"`{row['name']}`, repaired"
        cells = [_saved(row, dense, "total"), f"{parameters:+.1%}", f"{row['perplexity_change']:+.2%}"]
        lines.append(_line(name, *counts, *cells, f"{found['low']:+.2%} … {found['high']:+.2%}"))
    random, base = document["random"], dense["perplexity"]
    mean = f"{random['mean'] / base - 1:+.1%} ± {random['sd'] / base:.1%}, {random['min'] / base - 1:+.1%} the lowest"
    lines.append(_line(f"random, repaired, {random['draws']} draws", "", "", "", "", mean, ""))
    data, calibration, recovery = document["data"], document["calibration"], document["recovery"]
    caption = (
        f"{document['model']} with at most {document['target_flops']:.0%} of its FLOPs left: rise of the perplexity on "
        f"{data['documents']:,} documents of {data['name']} ({data['tokens']:,} tokens), dense {base:.3f}; calibrated "
        f"and repaired on {calibration['documents']:,} documents of {calibration['name']}"
    )
    if recovery is not None:
        caption += (
            f"; recovered for {recovery['minutes']:.1f} minutes on {recovery['text']} "
            f"({recovery['steps']} steps, {document['machine']['torch_threads']} threads)"
        )
    return "\n".join([*lines, "", caption + "."])


def pairs_table(document: dict[str, Any]) -> str:
    """Rise of perplexity by how heads were chosen from the loss game, for both scopes; the lowest in bold."""
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for row in document["rows"][1:]:
        scope, _, way = row["name"].partition(", ")
        found = document["differences"][scope]["against"].get(row["name"])
        mark = " ≈" if found is not None and undecided(found) else ""
        change = row["perplexity_change"]
        cells.setdefault(way, {})[scope] = (change, f"{change:+.2%}{mark}")
    best = {scope: min(found[scope][0] for found in cells.values()) for scope in ("layer", "global")}
    lines = [_line("heads chosen by", "layer", "global"), _line(*["---"] * 3)]
    for way, found in cells.items():
        marked = [f"**{text}**" if value == best[scope] else text for scope, (value, text) in found.items()]
        lines.append(_line(way, *marked))
    data, calibration, dense = document["evaluation"], document["calibration"], document["rows"][0]
    caption = (
        f"{document['model']} without {document['settings']['ratio']:.0%} of its heads, repaired: rise of the "
        f"perplexity on {data['documents']:,} documents of {data['name']}, dense {dense['perplexity']:.3f}; calibrated "
        f"on {calibration['documents']:,} documents of {calibration['name']}, by slopes from as many passes over them; "
        "≈: not told apart from the single rises of one pass."
    )
    return "\n".join([*lines, "", caption])


def speed_table(document: dict[str, Any]) -> str:
    """Tokens per second, and what the saved FLOPs alone would promise."""
    lines = [_line("model", "FLOPs", "promised", "prefill tokens/s", "speed-up", "decode tokens/s", "speed-up")]
    lines.append(_line(*["---"] * 7))
    dense = document["rows"][0]
    for row in document["rows"]:
        ratio = row["costs"]["macs"]["total"] / dense["costs"]["macs"]["total"]
        cells = []
        for phase in ("prefill", "decode"):
            measured = row["throughput"][phase]
            speed, gain = measured["tokens_per_second"], measured["speedup"]
            cells += [f"{speed['median']:,.0f} [{speed['min']:,.0f}, {speed['max']:,.0f}]"]
            cells += ["" if row is dense else f"{gain['median']:.2f} [{gain['min']:.2f}, {gain['max']:.2f}]"]
        promise = ("", "") if row is dense else (f"{ratio - 1:+.1%}", f"{1 / ratio:.2f}")
        lines.append(_line(row["name"], *promise, *cells))
    settings, machine = document["settings"], document["machine"]
    caption = (
        f"{document['model']}: median [minimum, maximum] of {settings['repeats']} interleaved repeats; batch "
        f"{settings['batch_size']}, prompt {settings['prompt_length']}, {settings['new_tokens']} new tokens; "
        f"{machine['processor']}, {machine['torch_threads']} threads, torch {document['versions']['torch']}."
    )
    return "\n".join([*lines, "", caption])


def models_table(document: dict[str, Any]) -> str:
    """The support matrix, a line for each model type and layout."""
    rows = lines(document["rows"])
    table = [_line(*rows[0]), _line(*["---"] * len(rows[0]))]
    table += [_line(*(cell.replace("|", "\\|") for cell in row.values())) for row in rows]
    settings, versions = document["settings"], document["versions"]
    caption = (
        f"{summary(document['rows'])}. transformers {versions['transformers']}, torch {versions['torch']}, seed "
        f"{settings['seed']}, tolerance {settings['tolerance']:g} of the largest logit."
    )
    return "\n".join([*table, "", caption])


def scoring_table(document: dict[str, Any]) -> str:
    """What a scoring epoch costs beside the model."""
    names = {
        "model": "`model(**batch)`",
        "backbone": "without its head",
        "scoring": "scoring epoch: symbols, pairs, φ",
        "naive": "the same from whole attention matrices and `np.unique`",
    }
    lines = [_line("epoch", "seconds", "÷ model", "÷ backbone", "MiB"), _line(*["---"] * 5)]
    for row in document["rows"]:
        cells = [_spread(row[name]) for name in ("seconds", "to_model", "to_backbone")]
        lines.append(_line(names[row["name"]], *cells, f"{row['memory_bytes'] / 2**20:,.0f}"))
    settings, machine = document["settings"], document["machine"]
    histograms = document["histogram_bytes"] / 2**20
    caption = (
        f"{document['model']}: median [minimum, maximum] of {settings['repeats']} interleaved repeats of "
        f"{settings['batches']} batches of {settings['batch_size']} × {settings['tokens']} tokens; live tensors at "
        f"most beyond parameters and, in the scoring epoch, {histograms:,.0f} MiB of histograms; "
        f"{machine['processor']}, {machine['torch_threads']} threads, torch {document['versions']['torch']}."
    )
    return "\n".join([*lines, "", caption])


def game_table(document: dict[str, Any]) -> str:
    """Processor time of counting and playing on bare arrays."""
    coalitions, shapley, epoch = document["coalitions"], document["shapley"], document["epoch"]
    settings, machine = document["settings"], document["machine"]
    work = f"{coalitions['count']} pairs and triples of {coalitions['heads']} heads"
    lines = [_line("work", "by", "CPU seconds", "÷ ours"), _line(*["---"] * 4)]
    for name, seconds in coalitions["seconds"].items():
        ratio = coalitions["to_compressor"].get(name, 1.0)
        lines.append(_line(work, name, _spread(seconds), _spread(ratio) if isinstance(ratio, dict) else f"{ratio:.0f}"))
    work = f"exact Shapley values of {shapley['heads']} heads"
    lines.append(_line(work, "compressor", _spread(shapley["seconds"]), ""))
    share = epoch["counting_to_forward"]
    caption = (
        f"{settings['observations']:,} observations of {settings['alphabet']} symbols; median [minimum, maximum] of "
        f"{settings['repeats']} interleaved repeats (infomeasure {settings['infomeasure']}: one), one thread; "
        f"{machine['processor']}, numpy {settings['numpy']}. Counting all pairs of {epoch['layers']} layers of "
        f"{epoch['heads']} heads takes {share['median']:.1%} [{share['min']:.1%}, {share['max']:.1%}] of the forward "
        "pass of TinyLlama's shape over as many tokens, extrapolated from single layers."
    )
    return "\n".join([*lines, "", caption])


TABLES = {
    "quality": quality_table,
    "speed": speed_table,
    "budgets": budgets_table,
    "pairs": pairs_table,
    "models": models_table,
    "scoring": scoring_table,
    "game": game_table,
    "sensitivity": sensitivity_table,
}


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}, {values['max']:.2f}]"


def _saved(row: dict[str, Any], dense: dict[str, Any], share: str) -> str:
    return f"{row['costs']['macs'][share] / dense['costs']['macs'][share] - 1:+.1%}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(text: str) -> str:
    """A document with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        path = assets.MODELS if match[2] == "models" else RESULTS / f"{match[2]}.json"
        if not path.is_file():
            return f"{match[1]}Not run yet.\n{match[3]}"
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{table(result)}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Rewrite or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if filled(text) == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(filled(text), encoding="utf-8")
    if check and stale:
        sys.exit(f"not what the JSON says: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
