"""The documentation says what the benchmark JSON says, and the JSON says under what conditions."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md", "benchmarks/MODELS.md"])
def test_tables_are_those_of_the_json(tables: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- table:")
    digit = next(i for i in range(text.index("| `gt-fep`", start), len(text)) if text[i].isdigit())
    forged = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert tables.filled(forged) == text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_tell_their_conditions(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"cores", "processor", "torch_threads", "device"} <= document["machine"].keys()
    assert {"python", "torch", "transformers", "lightning-compressor"} <= document["versions"].keys()
    assert document["settings"]
    if document["suite"] == "quality":
        assert document["calibration"]["fingerprint"] != document["evaluation"]["fingerprint"]
        for summary in document["summaries"].values():
            assert summary["random"]["draws"] >= 5


@pytest.mark.parametrize(
    "path", [path for path in RESULTS if path.stem.startswith("quality")], ids=lambda path: path.stem
)
def test_summaries_follow_from_the_rows(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    for column, summary in document["summaries"].items():
        scope, _, repaired = column.partition(" ")
        draws = [
            row["perplexity"]
            for row in document["rows"]
            if row["kind"] == "random" and row["plan"]["scope"] == scope and row["repaired"] == bool(repaired)
        ]
        mean = sum(draws) / len(draws)
        variance = sum((value - mean) ** 2 for value in draws) / (len(draws) - 1)
        assert summary["random"]["mean"] == pytest.approx(mean, rel=1e-12)
        assert summary["random"]["sd"] == pytest.approx(variance**0.5, rel=1e-9)
