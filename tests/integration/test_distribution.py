"""The wheel and the sdist: what is in them, and that the main job runs from an installation away from the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, snapshot

pytestmark = pytest.mark.slow

LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
ASSETS = {
    "compressor/assets/model/config.json",
    "compressor/assets/model/model.safetensors",
    "compressor/assets/model/tokenizer.json",
    "compressor/assets/corpus/train.jsonl",
    "compressor/assets/corpus/test.jsonl",
}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from a copy of the tree; the wheel by way of the sdist, as an index would have it."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (wheel,), (sdist,) = ((folder / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="session")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(distributions[0])], check=True, capture_output=True)
    return target


def sources() -> set[str]:
    """Where every file of the package lies once it is installed."""
    folders = {"compressor": "compressor", "callbacks": "compressor/callbacks", "configs": "compressor/configs"}
    return {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_the_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == sources()
    assert package >= ASSETS
    assert {"compressor/py.typed", "compressor/callbacks/__init__.py", "compressor/configs/__init__.py"} <= package
    assert any(name.startswith("compressor/configs/") and name.endswith(".yaml") for name in package)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in package} == {"compressor"}  # no global `callbacks` leaks


def test_the_metadata(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        (entries,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = wheel.read(metadata).decode()
        assert "compress = compressor.__main__:main" in wheel.read(entries).decode()
    assert "\nName: lightning-compressor\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Dist: torch" in text
    assert "# compressor" in text  # the README


def test_the_sdist_holds_what_a_build_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {
        name.replace("compressor/callbacks/", "callbacks/").replace("compressor/configs/", "configs/")
        for name in sources()
    }
    assert expected <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("runs/", "build/", "dist/")) or name.endswith(".pyc")]


def test_the_main_job_runs_away_from_the_checkout(installed: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    where = "import compressor as a, compressor.callbacks as b; print(a.__file__); print(b.__file__)"
    variables = {**environment, "PYTHONPATH": str(installed)}
    settings = {"cwd": tmp_path, "env": variables, "capture_output": True, "text": True, "check": False}
    found = subprocess.run([sys.executable, "-c", where], **settings).stdout.split()  # type: ignore[call-overload]
    assert len(found) == 2
    assert all(Path(file).is_relative_to(installed) for file in found)
    words = ["run", "--samples", "20", "--eval-samples", "5", "--repeats", "1", "--random-seeds", "2", "--json"]
    done = subprocess.run([sys.executable, "-m", "compressor", *words], **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    document = json.loads(done.stdout)
    assert document["score"]["facts"]["model"] == "embedded"
    checkpoint = tmp_path / document["prune"]["checkpoint"]
    assert (checkpoint / "model.safetensors").is_file()
    assert {name.partition("/")[0] for name in snapshot(tmp_path)} == {"runs"}
    reopen = (
        f"import compressor, sys; m = compressor.load({str(checkpoint)!r}); print(len(compressor.attention_layers(m)))"
    )
    opened = subprocess.run([sys.executable, "-c", reopen], **settings)  # type: ignore[call-overload]
    assert int(opened.stdout) == len(document["prune"]["plan"]["heads_per_layer"])


def test_a_users_mistake_away_from_the_checkout(installed: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Without --quiet, in a process of its own: one line, whatever the libraries might have to say."""
    variables = {**environment, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "compressor", "score", "--model", "nobody/nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert snapshot(tmp_path) == {}
