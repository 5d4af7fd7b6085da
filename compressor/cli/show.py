"""Results on stdout: a table for people or one JSON document for machines, both from the same data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.cli.page import count, new_table, print_json, say, size
from compressor.cli.plans import print_plan
from compressor.cli.scores import print_scores
from compressor.pipeline import BenchRun, PaperRun, PruneRun, RecoverRun, ScoreRun, WholeRun


def scored(result: ScoreRun, as_json: bool) -> None:
    """Print a scoring run."""
    if as_json:
        print_json({**result.document, "directory": str(result.directory)})
        return
    console = Console()
    print_scores(console, result)
    if not result.scores.facts["saturated_layers"]:
        say(console, f"next: compress prune --scores {result.directory} --ratio 0.2 --export")


def pruned(result: PruneRun, as_json: bool) -> None:
    """Print what pruning did."""
    if as_json:
        print_json(prune_document(result))
        return
    console = Console()
    print_plan(console, result)
    if result.checkpoint is not None:
        say(console, f"next: compress bench --against {result.checkpoint}")


def recovered(result: RecoverRun, as_json: bool) -> None:
    """Print what training brought back."""
    if as_json:
        print_json({**result.document, "directory": str(result.directory), "checkpoint": str(result.checkpoint)})
        return
    console = Console()
    recovery = result.document["recovery"]
    data, held_out, perplexity = recovery["data"], recovery["held_out"], recovery["perplexity"]
    say(
        console,
        f"{recovery['objective']}: {recovery['steps']:,} of {recovery['steps_planned']:,} steps in "
        f"{recovery['minutes']:.1f} minutes over {data['documents']:,} documents of {data['name']}; "
        f"ended by {recovery['ended']}, best after step {recovery['best_step']:,}",
    )
    table = new_table("model", "held-out perplexity", "against pruned")
    table.add_row("pruned", f"{perplexity['before']:.3f}", "")
    for name, key in (("recovered", "after"), ("dense", "dense")):
        if key in perplexity:
            table.add_row(name, f"{perplexity[key]:.3f}", f"{perplexity[key] / perplexity['before'] - 1:+.1%}")
    table.caption = f"on {held_out['documents']:,} documents of the training text, which chose the weights"
    console.print(table)
    say(console, f"checkpoint, loaded again and found equal: {result.checkpoint}")
    say(console, f"next: compress bench --against {result.checkpoint}")


def benched(result: BenchRun, as_json: bool) -> None:
    """Print a comparison."""
    if as_json:
        print_json({**result.document, "directory": str(result.directory)})
        return
    _print_bench(Console(), result)


def ran(result: WholeRun, as_json: bool) -> None:
    """Print the three runs of the whole line."""
    if as_json:
        print_json(
            {
                "score": {**result.score.document, "directory": str(result.score.directory)},
                "prune": prune_document(result.prune),
                "bench": result.bench.document,
                "directory": str(result.directory),
            }
        )
        return
    console = Console()
    print_scores(console, result.score)
    console.print()
    print_plan(console, result.prune)
    console.print()
    _print_bench(console, result.bench)


def reproduced(result: PaperRun, as_json: bool) -> None:
    """Print the paper's figures beside ours."""
    if as_json:
        print_json({**result.document, "directory": str(result.directory)})
        return
    console = Console()
    print_scores(console, result.score)
    table = new_table("arXiv 2605.09515", "published", "here", "verdict")
    for claim in result.document["claims"]:
        figures = [f"{claim[name]:.3f}" if claim[name] is not None else "–" for name in ("published", "measured")]
        table.add_row(claim["name"], *figures, claim["verdict"])
    console.print(table)
    for claim in result.document["claims"]:
        if claim["reason"]:
            say(console, f"{claim['name']}: {claim['reason']}")
    say(console, result.document["verdict"])
    say(console, f"measurements: {result.directory}")


def prune_document(result: PruneRun) -> dict[str, Any]:
    """A pruning run as JSON-ready values."""
    places = {"directory": result.directory, "checkpoint": result.checkpoint}
    return {**result.document, **{name: None if place is None else str(place) for name, place in places.items()}}


def _print_bench(console: Console, result: BenchRun) -> None:
    document = result.document
    dense = document["rows"][0]
    kind = "perplexity" if document["task"] == "causal" else "pseudo-perplexity"
    text = document["data"]
    share = "" if document["task"] == "causal" else ", 15 % of them masked"
    say(console, f"{kind} on {text['documents']:,} documents of {text['name']} ({text['tokens']:,} tokens{share})")
    table = new_table("model", "heads", kind, "change", "parameters", "MACs", "attention")
    for row in document["rows"]:
        if row["kind"] != "random":
            table.add_row(*_quality(row, dense))
    if document["random"] is not None:
        draws = [row for row in document["rows"] if row["kind"] == "random"]
        table.add_row(*_random_quality(document["random"], draws, dense))
    table.caption = f"MACs: multiply-adds of {dense['costs']['length']} tokens, and of attention alone"
    console.print(table)
    console.print(_interval_table(document))
    console.print(_time_table(document))
    for row in document["rows"]:
        if row["throughput"] is not None:
            say(console, _memory_line(row))
    say(console, document["verdict"])
    say(console, f"measurements: {result.directory}")


def _quality(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    heads, perplexity = str(sum(row["costs"]["heads"])), f"{row['perplexity']:.3f}"
    figures, base = _figures(row), _figures(dense)
    if row is dense:
        return [row["name"], heads, perplexity, "", *(count(figure) for figure in figures)]
    changes = (f"{figure / reference - 1:+.1%}" for figure, reference in zip(figures, base, strict=True))
    return [row["name"], heads, perplexity, f"{row['perplexity_change']:+.1%}", *changes]


def _random_quality(random: dict[str, Any], draws: list[dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    base = dense["perplexity"]
    means = [sum(values) / len(draws) for values in zip(*(_figures(row) for row in draws), strict=True)]
    changes = (f"{mean / reference - 1:+.1%}" for mean, reference in zip(means, _figures(dense), strict=True))
    spread = f"{random['mean']:.3f} ± {random['sd']:.3f}"
    change = f"{random['mean'] / base - 1:+.1%}"
    return [f"random × {random['draws']}", str(sum(draws[0]["costs"]["heads"])), spread, change, *changes]


def _interval_table(document: dict[str, Any]) -> Table:
    """How sure the changes of perplexity are, and those of the reference against every other model."""
    rows = [row for row in document["rows"] if row["kind"] in ("pruned", "rival")]
    differences = document["differences"]
    against = differences["against"] if differences else {}
    named = [differences["reference"]] if against.keys() & {row["name"] for row in rows} else []
    table = new_table("perplexity", "over dense", *(f"{name} over it" for name in named))
    for row in rows:
        change = {"low": None, **(row["perplexity_change_interval"] or {}), "change": row["perplexity_change"]}
        compared = [_with_interval(against.get(row["name"]))] if named else []
        table.add_row(row["name"], _with_interval(change), *compared)
    table.caption = Text(f"in brackets: 95 % intervals, the {document['data']['documents']:,} documents drawn anew")
    return table


def _with_interval(found: dict[str, Any] | None) -> Text:
    """A relative change like "+3.1% [+2.0%, +4.2%]"; a single document gives no interval."""
    if found is None:
        return Text("–")
    between = "" if found["low"] is None else f" [{found['low']:+.1%}, {found['high']:+.1%}]"
    return Text(f"{found['change']:+.1%}{between}")


def _figures(row: dict[str, Any]) -> tuple[float, float, float]:
    costs = row["costs"]
    return costs["parameters"], costs["macs"]["total"], costs["macs"]["attention"]


def _time_table(document: dict[str, Any]) -> Table:
    settings = document["settings"]
    table = new_table("timed", "prefill tokens/s", "gain", "decode tokens/s", "gain")
    table.caption = Text(
        f"median [min, max]; repeats: {settings['repeats']}, interleaved; batch {settings['batch_size']}\n"
        f"prompt {settings['prompt_length']} tokens, {settings['new_tokens']} decoded"
    )
    for row in document["rows"]:
        if row["throughput"] is not None:
            cells = [
                _speed(row["throughput"].get(phase), row is document["rows"][0]) for phase in ("prefill", "decode")
            ]
            table.add_row(row["name"], *(cell for pair in cells for cell in pair))
    return table


def _memory_line(row: dict[str, Any]) -> str:
    cache = row["costs"]["kv_cache_bytes_per_token"]
    kept = "no KV cache" if cache is None else f"KV cache {size(cache)} a token"
    return f"{row['name']}: peak memory {size(row['costs']['peak_memory_bytes'])}, {kept}"


def _speed(phase: dict[str, Any] | None, reference: bool) -> tuple[Text, Text]:
    if phase is None:
        return Text("–"), Text("")
    speed = phase["tokens_per_second"]
    gain = "" if reference else f"{phase['speedup']['median']:.2f}×"
    return Text(f"{speed['median']:,.0f} [{speed['min']:,.0f}, {speed['max']:,.0f}]"), Text(gain)
