"""What ships with the package: a model and a corpus for a first run without network (see `build`), and a table."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
CORPUS: Path = Path(__file__).parent / "corpus"
MODELS: Path = Path(__file__).parent / "models.json"  # benchmarks/models.py makes it
