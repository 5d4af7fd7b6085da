"""The support matrix: what became of every language model class of transformers without some heads or channels.

`benchmarks/models.py` makes it, from tiny random instances; this module only reads it, without torch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from compressor import assets
from compressor.errors import ModelError
from compressor.files import did_you_mean, read_json

STATUSES = {
    "supported": "supported",
    "refused": "not",
    "no heads": "without heads",
    "not constructible": "not constructible",
    "fault": "at fault",
}


def support_matrix(name: str | None = None) -> dict[str, Any]:
    """The matrix, or the part of it that is about one model type or class.

    Args:
        name: a model type such as "llama", as in `config.json`, or a class such as "LlamaForCausalLM".

    Returns:
        JSON-ready values: `rows`, one for each class and variant, and the `settings`, `versions` and `machine` of the
        sweep.

    Raises:
        ModelError: transformers registers no language model of that name.
    """
    document = read_json(assets.MODELS)
    if name is None:
        return document
    names = {row["class"]: row["class"] for row in document["rows"]}
    names |= {kind: kind for row in document["rows"] for kind in row["model_types"]}
    if name not in names:
        raise ModelError(f"{name!r} is no model type with a causal or masked language model{did_you_mean(name, names)}")
    return document | {"rows": [row for row in document["rows"] if name in (row["class"], *row["model_types"])]}


def lines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows in words, causal and masked classes of a model type as one where they do not differ."""
    merged: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = {
            "model type": ", ".join(row["model_types"]) + (f" ({row['variant']})" if row["variant"] else ""),
            "task": row["task"],
            "heads": row.get("heads", ""),
            "scoring": row.get("scoring", "").removeprefix("attention "),
            "parity": f"{row['parity']:.0e}".replace("0e+00", "0") if "parity" in row else "",
            "units": " ".join(row.get("units", ())),
            "channels": row.get("mlps", ""),
            "why not": why_not(row),
        }
        same = merged.setdefault(tuple(value for name, value in line.items() if name not in ("task", "parity")), line)
        if same is not line:
            same["task"] = "both"
            same["parity"] = max(same["parity"], line["parity"], key=lambda text: float(text or 0))
    return sorted(merged.values(), key=lambda line: line["model type"].lower())


def why_not(row: dict[str, Any]) -> str:
    """What a class lacks, and the reasons."""
    reasons: dict[str, list[str]] = {}
    for unit, reason in row.get("unreached", {}).items() if row["status"] == "supported" else ():
        reasons.setdefault(reason, []).append(unit)
    found = [str(row["reason"])] if row["status"] != "supported" else []
    found += [f"not by {' or '.join(units)}: {reason}" for reason, units in reasons.items()]
    if "why_not_scored" in row:
        found.append(f"not scored: {row['why_not_scored']}")
    if "why_not_reloaded" in row:
        found.append(f"not loaded again: {row['why_not_reloaded']}")
    if row.get("channels", "pass") != "pass":
        found.append(f"no channels: {row['channels']}")
    return "; ".join(found)


def summary(rows: list[dict[str, Any]]) -> str:
    """How many classes there are of each kind, by their heads; further layouts of a class are not counted."""
    plain = [row for row in rows if not row["variant"]]
    counts = Counter(row["status"] for row in plain)
    without = sum(row.get("channels") == "pass" for row in plain)
    parts = [f"{counts[status]} {words}" for status, words in STATUSES.items() if counts[status]]
    noun = "class" if counts.total() == 1 else "classes"
    return f"{counts.total()} {noun}: {', '.join(parts)}; MLP channels can go in {without}"
