"""The house itself: packages, the direction of imports, docstrings, lazy imports, no trace of a machine."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import compressor
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = {"compressor.callbacks": ROOT / "callbacks", "compressor.configs": ROOT / "configs"}
HEAVY = {"torch", "transformers", "lightning", "datasets", "torchmetrics", "fvcore", "numpy", "safetensors"}


def modules() -> dict[str, Path]:
    """Every module of the package by the name it is imported by."""
    found = {}
    linked = tuple(ROOT / "compressor" / name for name in ("callbacks", "configs"))  # as a copy of the tree may have it
    for name, folder in {"compressor": ROOT / "compressor", **MAPPED}.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            if any(path.is_relative_to(folder) for folder in linked):
                continue
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, lazy: bool = True) -> set[str]:
    """What a module imports, also inside functions unless `lazy` is false; not what only type checkers see."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*home, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def below(package: str) -> Iterator[str]:
    return (name for name in MODULES if name == package or name.startswith(f"{package}."))


def touches(name: str, *targets: str) -> set[str]:
    return {
        used for used in imports(name) if any(used == target or used.startswith(f"{target}.") for target in targets)
    }


# --- packages -------------------------------------------------------------------------------------------------------


def test_the_package_list_is_the_tree() -> None:
    """A subpackage missing from the list would work here and be missing from the wheel."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(set(listed)) == len(listed)
    in_tree = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(listed) == in_tree
    orphans = {str(path.relative_to(ROOT)) for path in MODULES.values() if not (path.parent / "__init__.py").is_file()}
    assert not orphans


def test_the_mapping_points_at_folders() -> None:
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {"compressor": "compressor", "compressor.callbacks": "callbacks", "compressor.configs": "configs"}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in mapping.values())


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packages = {"compressor": ROOT / "compressor", "compressor.assets": ROOT / "compressor" / "assets", **MAPPED}
    packaged = {
        path
        for name, globs in patterns.items()
        for glob in globs
        for path in packages[name].glob(glob)
        if path.is_file()
    }
    data = {
        path
        for folder in (ROOT / "compressor", *MAPPED.values())
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert data <= packaged
    assert ROOT / "compressor" / "py.typed" in packaged
    names = {path.name for path in packaged}
    assert {"model.safetensors", "config.json", "tokenizer.json", "train.jsonl", "test.jsonl", "models.json"} <= names


def test_every_module_can_be_imported() -> None:
    for name in MODULES:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_the_installed_package_has_the_same_modules() -> None:
    found = {module.name for module in pkgutil.walk_packages(compressor.__path__, "compressor.")}
    expected = {name for name in MODULES if not name.startswith(tuple(MAPPED)) and name != "compressor"}
    assert expected <= found


def test_imports_are_declared() -> None:
    listed = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["recover"]]
    declared = {re.split(r"[<>=!\[; ]", line)[0] for line in listed}
    distributions = {"yaml": "pyyaml"}
    for name in MODULES:
        for used in imports(name):
            top = used.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "compressor":
                known = distributions.get(top, top)
                with_others = {"tokenizers", "huggingface_hub", "pyarrow", "triton"}  # Triton with CUDA's torch only
                assert known in declared | with_others, (name, top)


# --- directions -----------------------------------------------------------------------------------------------------


def test_the_import_reader_of_this_test_reads() -> None:
    assert "compressor.pipeline" in imports("compressor.cli.app")
    assert "compressor.pipeline" not in imports("compressor.cli.app", lazy=False)
    assert "compressor.artefact" in imports("compressor.pipeline")
    assert "torch" in imports("compressor.game.values")
    assert len(MODULES) > 30


@pytest.mark.parametrize("name", list(below("compressor.game")))
def test_the_game_imports_no_model_code_and_does_no_io(name: str) -> None:
    ours = {used for used in imports(name) if used.startswith("compressor")}
    assert all(used.startswith("compressor.game") for used in ours)
    others = {used.partition(".")[0] for used in imports(name) if not used.startswith("compressor")}
    allowed = {"torch", "torchmetrics", "numpy"}
    assert others - allowed <= set(sys.stdlib_module_names)
    assert not others & {"os", "pathlib", "io", "json", "shutil", "tempfile", "logging"}


@pytest.mark.parametrize("name", [*below("compressor.attention"), *below("compressor.mlp")])
def test_attention_and_mlp_know_nothing_of_scores(name: str) -> None:
    stations = ("game", "criteria", "budget", "callbacks", "pipeline", "artefact", "data", "measure", "module")
    assert not touches(name, *(f"compressor.{station}" for station in (*stations, "trainer", "cli", "export")))
    text = MODULES[name].read_text(encoding="utf-8")
    assert "UnitScores" not in text
    assert "LayerScores" not in text


@pytest.mark.parametrize("name", list(below("compressor.attention")))
def test_attention_knows_nothing_of_mlps(name: str) -> None:
    assert not touches(name, "compressor.mlp")


@pytest.mark.parametrize("name", list(below("compressor.cli")))
def test_the_command_line_holds_no_logic(name: str) -> None:
    ours = {used for used in imports(name) if used.startswith("compressor")}
    allowed = ("pipeline", "support", "files", "errors", "console", "cli")
    assert all(used.split(".")[1:2] in ([], *([name] for name in allowed)) for used in ours), ours
    if not name.endswith("show"):  # which formats tensors
        others = {used.partition(".")[0] for used in imports(name) if not used.startswith("compressor")}
        assert others - {"typer", "rich"} <= set(sys.stdlib_module_names)


def test_only_the_command_line_and_the_public_names_import_the_pipeline() -> None:
    users = {name for name in MODULES if touches(name, "compressor.pipeline")}
    assert users
    assert all(name == "compressor" or name.startswith("compressor.cli") for name in users), users
    text = MODULES["compressor"].read_text(encoding="utf-8")
    assert "compressor.pipeline" in text  # by name, on first use


def test_nothing_imports_the_command_line_but_main() -> None:
    users = {name for name in MODULES if touches(name, "compressor.cli") and not name.startswith("compressor.cli")}
    assert users == {"compressor.__main__"}


@pytest.mark.parametrize(
    ("station", "forbidden"),
    [
        (
            "measure",
            ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "data", "export", "module", "config"),
        ),
        ("data", ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "measure", "export", "attention")),
        ("criteria", ("pipeline", "cli", "attention", "callbacks", "data", "measure", "loading", "export", "budget")),
        ("budget", ("pipeline", "cli", "attention", "callbacks", "data", "measure", "loading", "export", "criteria")),
        ("callbacks", ("pipeline", "cli", "criteria", "budget", "export", "loading")),
        ("export", ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "data")),
        ("module", ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "export", "config")),
        (
            "loading",
            ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "data", "export", "module", "config"),
        ),
        ("training", ("pipeline", "cli", "criteria", "budget", "callbacks", "game", "data", "export", "config")),
        ("types", ("",)),
        ("errors", ("",)),
    ],
)
def test_stations_look_one_way_only(station: str, forbidden: tuple[str, ...]) -> None:
    for name in below(f"compressor.{station}"):
        assert not touches(name, *(f"compressor.{other}".rstrip(".") for other in forbidden)), name


def test_algorithms_take_no_recipe() -> None:
    """Config objects stay with the verbs."""
    users = {name for name in MODULES if touches(name, "compressor.config")}
    verbs = (
        "pipeline",
        "preparation",
        "planning",
        "pruning",
        "given",
        "scoring",
        "comparison",
        "contenders",
        "recovery",
        "reproduction",
        "resumption",
        "runs",
    )
    assert users <= {f"compressor.{name}" for name in verbs} | {"compressor"}


# --- lazy imports ---------------------------------------------------------------------------------------------------


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)


@pytest.mark.parametrize("words", ["--help", "--version", "score --help", "run --help", "models llama"])
def test_help_waits_for_nothing_heavy(tmp_path: Path, words: str) -> None:
    program = (
        "import sys\nfrom compressor.__main__ import main\n"
        f"sys.argv = ['compress', *{words.split()!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}), 'compressor.pipeline' in sys.modules)"
    )
    assert run_python(program, tmp_path).stdout.strip().endswith("HEAVY [] False")


def test_importing_the_package_waits_for_nothing_heavy(tmp_path: Path) -> None:
    program = f"import sys, compressor\nprint(sorted(set(sys.modules) & {HEAVY!r}))"
    assert run_python(program, tmp_path).stdout.strip() == "[]"


def test_help_answers_in_well_under_a_second(tmp_path: Path) -> None:
    """The best of three; half a second of our own beside the interpreter's start."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "compressor", "--help"], capture_output=True, check=True, cwd=tmp_path)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


# --- public names and docstrings ------------------------------------------------------------------------------------


def test_public_names_resolve() -> None:
    assert set(compressor.__all__) == set(compressor._HOMES)
    for name in compressor.__all__:
        assert getattr(compressor, name) is getattr(importlib.import_module(compressor._HOMES[name]), name)
    promised = {
        "attention_layers",
        "prune_heads",
        "mlp_layers",
        "prune_channels",
        "score",
        "prune",
        "bench",
        "run",
        "load",
        "CompressorError",
    }
    assert promised <= set(compressor.__all__)
    missing = "no_such_name"
    with pytest.raises(AttributeError, match=missing):
        getattr(compressor, missing)


def test_every_name_in_every_all_resolves() -> None:
    for name in MODULES:
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            assert hasattr(module, public), f"{name}.{public}"


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            bare.append(name)

        def look(node: ast.AST, inside: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    if child.name.startswith("_"):
                        continue
                    if not ast.get_docstring(child):
                        bare.append(f"{inside}.{child.name}")
                    if isinstance(child, ast.ClassDef):
                        look(child, f"{inside}.{child.name}")

        look(tree, name)
    assert not bare


def test_the_verbs_of_the_command_line_are_python_functions() -> None:
    for verb in ("score", "prune", "recover", "bench", "run"):
        function = getattr(compressor, verb)
        assert inspect.isfunction(function)
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds  # by name only: the order is nobody's promise


# --- traces of a machine --------------------------------------------------------------------------------------------


def tracked_files() -> list[Path]:
    """The repository's files: git's where it is there, else all but what a build leaves."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    names = [name for name in os.fsdecode(listed.stdout).split("\0") if name]
    if listed.returncode == 0 and names:
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    left_out = {".git", "__pycache__", "build", "dist", ".venv", "runs"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part in left_out or part.endswith(("cache", ".egg-info")) for part in path.parts)
    ]


def test_no_file_names_a_path_of_this_machine() -> None:
    places = "|".join(["work", "root", "home/[a-z]"])
    pattern = re.compile(rb"(?<![\w.~/}$-])/(?:" + places.encode() + rb")(?![\w-])")
    assert pattern.search(b"see " + b"/".join([b"", b"root", b"x"]))
    assert not pattern.search(b"../shared a/root b.root/ /rooted")
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            continue  # floats may spell anything
        found += [f"{path.relative_to(ROOT)}: {match[0]!r}" for match in pattern.finditer(content)]
    assert not found


def test_no_stray_files_in_the_tree() -> None:
    names = [path.name for path in tracked_files()]
    stray = [name for name in names if name.endswith((".pyc", ".orig", ".rej", ".swp", "~")) or "zz_try" in name]
    assert not stray


def test_small_files() -> None:
    """100–250 lines a file: above 400 something wants to be two."""
    long = {name: lines for name, path in MODULES.items() if (lines := path.read_text().count("\n")) > 400}
    assert set(long) <= {"compressor.assets.problems"}, long  # a list of sentences
