"""What pruning decided and did, on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from compressor.cli.page import count, new_table, say, size
from compressor.pipeline import PruneRun

_PORTIONS = {"head": "heads", "query": "heads of every group", "group": "groups"}
_COSTS = {"flops": "FLOPs", "params": "parameters", "latency": "prefill time"}
CAPTIONS = {
    "in resamples": "in resamples: how often each would go if other documents of the kind had been counted",
    "output error": "output error: behind a layer, earlier ones' included, as a share of its output: as cut → repaired",
}


def print_plan(console: Console, result: PruneRun) -> None:
    """Print a pruning run."""
    plan, document = result.plan, result.document
    say(console, _headline(result))
    if plan.total and (plan.heads or "heads" in plan.structures):
        console.print(_head_table(result))
    if plan.channels_per_layer:
        console.print(_channel_table(result))
    if plan.predicted is not None and "target" not in document:
        kind = plan.target[0] if plan.target else "flops"
        say(console, f"{_COSTS[kind]} left: {plan.predicted:.2%} predicted")
    if "target" in document:
        for line in _target_lines(document["target"]):
            say(console, line)
    if "costs" in document:
        console.print(_cost_table(document["costs"]["dense"], document["costs"]["pruned"]))
    if result.directory is not None:
        say(console, f"plan: {result.directory}")
    if result.checkpoint is not None:
        say(console, f"checkpoint, loaded again and found equal: {result.checkpoint}")


def _headline(result: PruneRun) -> str:
    plan = result.plan
    parts = []
    if "heads" in plan.structures:
        parts.append(f"{plan.removed} of {plan.total} heads ({plan.removed / max(1, plan.total):.1%})")
    if "channels" in plan.structures:
        share = plan.removed_channels / max(1, plan.total_channels)
        parts.append(f"{plan.removed_channels:,} of {plan.total_channels:,} channels ({share:.1%})")
    line = f"{plan.criterion}: {' and '.join(parts)} go; "
    if "given" in result.document:
        return line + f"the plan is that of {result.document['given']}{', edited' if plan.edited else ''}"
    line += f"in {plan.rounds} rounds; " if plan.rounds > 1 else ""
    rule = "in every layer" if plan.scope == "layer" else "over the whole model"
    if plan.target is not None:
        kind, share = plan.target
        evenly = "as many in every layer" if plan.scope == "layer" else "from wherever it costs the least"
        return line + f"the rule is {share:.1%} of the {_COSTS[kind]} left, {evenly}"
    names = [_PORTIONS[plan.unit]] if "heads" in plan.structures else []
    names += ["channels"] if "channels" in plan.structures else []
    return line + f"the rule is {' and '.join(f'⌈{plan.ratio:g} · {name}⌉' for name in names)} {rule}"


def _head_table(result: PruneRun) -> Table:
    plan = result.plan
    shares = result.document["removed_in_resamples"]
    repairs = _repairs(result, "heads")
    more = [name for name, told in (("in resamples", shares), ("output error", repairs)) if told]
    table = new_table("layer", "heads", "left", "removed", *more)
    for layer, before in enumerate(plan.heads_per_layer):
        gone = plan.heads.get(layer, ())
        sure = [", ".join(f"{shares[layer][head]:.0%}" for head in gone) or "–"] if shares else []
        mended = [_mended(repairs.get(layer))] if repairs else []
        cells = (str(before), str(before - len(gone)), ", ".join(map(str, gone)) or "–")
        table.add_row(str(layer), *cells, *sure, *mended)
    table.caption = "\n".join(CAPTIONS[name] for name in more) or None
    return table


def _channel_table(result: PruneRun) -> Table:
    plan = result.plan
    repairs = _repairs(result, "channels")
    table = new_table("MLP", "channels", "left", "removed", *(["output error"] if repairs else []))
    for layer, before in enumerate(plan.channels_per_layer):
        gone = len(plan.channels.get(layer, ()))
        mended = [_mended(repairs.get(layer))] if repairs else []
        table.add_row(str(layer), f"{before:,}", f"{before - gone:,}", f"{gone:,}" if gone else "–", *mended)
    table.caption = CAPTIONS["output error"] if repairs else None
    return table


def _repairs(result: PruneRun, structure: str) -> dict[int, dict[str, Any]]:
    done = result.document.get("repair") or ()
    return {entry["layer"]: entry for entry in done if entry["structure"] == structure}


def _mended(repair: dict[str, Any] | None) -> str:
    return "–" if repair is None else f"{repair['before']:.1%} → {repair['after']:.1%}"


def _target_lines(target: dict[str, Any]) -> list[str]:
    how = "timed" if target["kind"] == "latency" else "counted"
    shares = [("asked", target["target"]), ("predicted", target["predicted"]), (how, target["found"])]
    told = ", ".join(f"{share:.2%} {name}" for name, share in shares if share is not None)
    if "timed" in target:
        told += f" [{target['timed']['share']['min']:.1%}, {target['timed']['share']['max']:.1%}]"
    lines = [f"{_COSTS[target['kind']]} left: {told}"]
    if target["missed"]:
        lines.append(f"the target was missed: {target['found']:.2%} is left, {target['target']:.2%} was asked for")
    return lines


def _cost_table(dense: dict[str, Any], pruned: dict[str, Any]) -> Table:
    table = new_table("cost", "dense", "pruned", "change")
    rows = [("parameters", dense["parameters"], pruned["parameters"], count)]
    rows += [
        (f"MACs, {part.replace('_', ' ')}", dense["macs"][part], pruned["macs"][part], count)
        for part in ("total", "attention", "mlp", "lm_head")
    ]
    rows.append(("peak memory of a forward pass", dense["peak_memory_bytes"], pruned["peak_memory_bytes"], size))
    if dense["kv_cache_bytes_per_token"] is not None:
        rows.append(("KV cache per token", dense["kv_cache_bytes_per_token"], pruned["kv_cache_bytes_per_token"], size))
    for name, before, after, form in rows:
        table.add_row(name, form(before), form(after), f"{after / before - 1:+.1%}" if before else "")
    table.caption = f"one sequence of {dense['length']} tokens; a MAC is one multiply-add"
    return table
