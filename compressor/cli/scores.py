"""A scoring run on stdout: φ by layer and head, and how far the numbers can be believed."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.cli.page import new_table, say
from compressor.pipeline import ScoreRun

MATRIX_WIDTH = 12  # heads whose scores fit a line of a terminal


def print_scores(console: Console, result: ScoreRun) -> None:
    """Print a scoring run for people."""
    facts, layers = result.document["facts"], result.document["layers"]
    say(console, f"φ of {facts['model']} by layer and head, in nats; symbol: {facts['settings']['symbol']}")
    console.print(_head_table([layer["phi"] for layer in layers], "φ"))
    rises = [[1000 * rise for rise in layer["values"].get("loss-game", [])] for layer in layers]
    if any(rises):
        say(console, "loss-game: rise of the loss without each head, in thousandths of a nat per token")
        console.print(_head_table(rises, "rise"))
    _print_channels(console, result.document["mlps"])
    console.print(_trust_table(layers))
    for layer in layers:
        for order, found in layer["dividends"].items():
            say(console, _dividends_line(layer["layer"], int(order), found))
    for coalition in facts["coalitions"]:
        heads = " + ".join(f"{layer}.{head}" for layer, head in coalition["heads"])
        say(
            console,
            f"coalition {heads}: dividend {coalition['dividend']:+.3f}, entropy {coalition['entropy']:.3f} "
            f"(coverage {coalition['coverage']:.1%})",
        )
    for index in facts["saturated_layers"][:1]:
        observations = layers[index]["observations"]
        ceiling = f"ln {observations:,} = {math.log(observations):.4f}"
        say(console, f"saturated: {ceiling} is the estimator's ceiling, not a finding")
    if "stability" in facts and (checks := facts["stability"]["checks"]):
        verdict = "is stable" if facts["stability"]["stable"] else "still changes"
        say(
            console,
            f"the choice of heads by {facts['stability']['criterion']} {verdict} after {checks[-1]['documents']} "
            "documents",
        )
    say(console, f"scores: {result.directory}")


def _dividends_line(layer: int, order: int, found: dict[str, Any]) -> str:
    kind = "triple dividends" if order == 3 else f"dividends of order {order}"
    line = (
        f"{kind} of layer {layer}: {found['negative']} negative, {found['positive']} positive, mean {found['mean']:.2f}"
    )
    if order > 3:
        return f"{line} (signs untested)"
    line += f"; coverage {found['least_coverage']:.1%} at least"
    if not found["tested"]:
        return f"{line} (signs untested: --shuffles 99 tests them)"
    for name, verdict in found["tested"].items():
        where = "" if name == "shuffled" else " within positions"
        line += (
            f"; shuffled{where}: {verdict['negative']} negative, {verdict['undecided']} undecided, "
            f"{verdict['positive']} positive"
        )
    return line


def _head_table(values: list[list[float]], name: str) -> Table:
    """A value of every head where they fit a line, else the range and the lowest of each layer."""
    width = max(map(len, values))
    heads = [str(head) for head in range(width)] if width <= MATRIX_WIDTH else ["lowest heads", f"{name} from", "to"]
    table = new_table("layer", *heads)
    for index, layer in enumerate(values):
        ranked = sorted(range(len(layer)), key=layer.__getitem__)
        if width <= MATRIX_WIDTH:
            cells = [Text(f"{value:.1f}", "bold red" if head in ranked[:1] else "") for head, value in enumerate(layer)]
            cells += [Text("")] * (width - len(cells))
        else:
            cells = [Text(", ".join(map(str, ranked[:5])))]
            cells += [Text(f"{layer[head]:.2f}") for head in (ranked[:1] + ranked[-1:])]
        table.add_row(str(index), *cells)
    return table


def _print_channels(console: Console, mlps: list[dict[str, Any]]) -> None:
    """How the values of channels spread in each MLP, by the first value there is that is a rise of the loss."""
    known = {name: spread for mlp in mlps for name, spread in mlp["values"].items()}
    rises = [name for name, spread in known.items() if "negligible" in spread]
    if not known:
        return
    name = "loss-game" if "loss-game" in rises else next(iter(rises or known))
    unit = ", in nats per token" if rises else ""
    say(console, f"{name} of the hidden channels of MLPs{unit}")
    below = [f"below {known[name]['negligible']['below']:g}"] if rises else []
    table = new_table("MLP", "channels", "least", "median", "most", *below)
    for mlp in mlps:
        spread = mlp["values"].get(name)
        cells = [] if spread is None else [f"{spread[key]:.1e}" for key in ("least", "median", "most")]
        cells += [f"{spread['negligible']['share']:.0%}"] if spread is not None and below else []
        table.add_row(str(mlp["mlp"]), f"{mlp['channels']:,}", *cells)
    console.print(table)


def _trust_table(layers: list[dict[str, Any]]) -> Table:
    """How far φ can be believed, layer by layer; in red, hardly."""
    table = new_table("layer", "φ ±", "mean pair", "observations", "of ln N", "heads seen", "pairs seen")
    for layer in layers:
        if not layer["phi"]:
            table.add_row(str(layer["layer"]), *[""] * 6)
            continue
        pair = layer["mean_pair_dividend"]
        ceiling = max(layer["entropy_over_ceiling"]) if layer["entropy_over_ceiling"] else None
        table.add_row(
            str(layer["layer"]),
            _widest(layer["phi_interval"]),
            "" if pair is None else f"{pair:.2f}",
            f"{layer['observations']:,}",
            Text("" if ceiling is None else f"{ceiling:.0%}", "bold red" if layer["saturated"] else ""),
            f"{min(layer['coverage']):.1%}",
            Text(f"{layer['least_pair_coverage']:.1%}", "" if layer["believed"] else "bold red"),
        )
    table.caption = (
        "φ ±: half of the widest 95% interval over resampled documents; of ln N: the highest entropy over\n"
        "its ceiling; seen: share of the least known distribution that the observations cover"
    )
    return table


def _widest(interval: dict[str, Any] | None) -> str:
    if not interval or not interval["low"]:
        return ""
    return f"{max(high - low for low, high in zip(interval['low'], interval['high'], strict=True)) / 2:.2f}"
