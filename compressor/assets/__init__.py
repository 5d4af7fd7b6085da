"""The model and the corpus that ship with the package, so that a first run needs no network; see `build`."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
CORPUS: Path = Path(__file__).parent / "corpus"
