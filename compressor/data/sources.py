"""Where documents come from: a `--data` spec → the records of its splits, each with the place it was read at."""

import difflib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

Record = Mapping[str, object]
Records = Sequence[tuple[str, Record]]  # (place for error messages, record)

EXPECTED = "embedded, gsm8k, a hub dataset owner/name[:config], or a .jsonl, .txt or .parquet file or a folder of them"
_HUB_ID = re.compile(r"(?P<path>[\w-][\w.-]*/[\w.-]+?)(:(?P<config>[\w.-]+))?")
_PATH_SUFFIXES = {".jsonl", ".txt", ".parquet", ".json", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".zip"}


@dataclass(frozen=True)
class Split:
    """One split: the name the log calls it by, and how to read its records."""

    name: str
    read: Callable[[], Records]


@dataclass(frozen=True)
class Source:
    """A resolved spec. `splits` is keyed train / validation / test …; a lone file has the single split "all"."""

    name: str
    splits: Mapping[str, Split]


def resolve(spec: str) -> Source:
    """Find what a `--data` or `--eval-data` spec names; local records are not read yet, a hub dataset is loaded.

    The names "embedded" and "gsm8k" come first (write ./gsm8k for a folder of that name), then existing paths, then
    hub ids.

    Raises:
        DataError: nothing of that name, a file of another kind, or a hub dataset that cannot be had.
    """
    if spec == "embedded":
        from compressor.assets import CORPUS

        return _folder(Path(CORPUS), "embedded")
    if spec == "gsm8k":
        return _hub("openai/gsm8k", "main")
    try:
        path = Path(spec).expanduser()
        exists = bool(spec) and path.exists()
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot look up {spec!r}: {error}") from error
    if exists:
        return _folder(path, path.resolve().name) if path.is_dir() else _file(path)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or path.suffix.lower() in _PATH_SUFFIXES:
        raise DataError(f"no file or folder {spec!r}; expected {EXPECTED}")
    if hub := _HUB_ID.fullmatch(spec):
        return _hub(hub["path"], hub["config"])
    near = difflib.get_close_matches(spec, ["embedded", "gsm8k"], n=1)
    raise DataError(f"unknown data {spec!r}; expected {EXPECTED}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _file(path: Path) -> Source:
    return Source(path.name, {"all": _split(path, path.name)})


def _folder(path: Path, name: str) -> Source:
    splits = {}
    for kind in ("train", "validation", "test"):
        files = sorted(p for p in path.glob(f"{kind}.*") if p.suffix.lower() in _READERS)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise DataError(f"{path} holds {names}; expected one file per split: remove all but one, or name a file")
        if files:
            splits[kind] = _split(files[0], f"{name}/{files[0].name}")
    if not splits:
        raise DataError(
            f"{path} holds no train.*, validation.* or test.* file of kind {', '.join(_READERS)}; name a file"
        )
    return Source(name, splits)


def _split(path: Path, name: str) -> Split:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"cannot read {path}: expected a file of kind {', '.join(_READERS)}; convert it to one of these"
        )

    def read() -> Records:
        try:
            return reader(path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or _first_line(error)}") from error

    return Split(name, read)


def _read_jsonl(path: Path) -> Records:
    records = []
    with path.open(encoding="utf-8-sig") as lines:  # not str.splitlines: that would break at U+2028 inside a string
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                detail = getattr(error, "msg", None) or _first_line(error)
                raise DataError(f"{place} is not valid JSON ({detail}); expected one JSON object per line") from error
            if not isinstance(record, dict):
                raise DataError(f"{place} is a JSON {type(record).__name__}; expected one JSON object per line")
            records.append((place, record))
    return records


def _read_txt(path: Path) -> Records:
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
    return [(f"{path.name} paragraph {n}", {"text": text.strip()}) for n, text in enumerate(paragraphs, start=1)]


def _read_parquet(path: Path) -> Records:
    from datasets import Dataset

    with _quiet(), tempfile.TemporaryDirectory(prefix="compressor-") as cache:  # nothing stays in the user's caches
        try:
            table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # pyarrow's and datasets' errors share no base class
            cause = error.__cause__ or error
            raise DataError(f"{path} is not a readable parquet file ({_first_line(cause)})") from error
        return _rows(table, path.name)


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _hub(path: str, config: str | None) -> Source:
    import datasets

    name = path + (f":{config}" if config else "")
    with _quiet():
        try:
            loaded = datasets.load_dataset(path, config)
        except Exception as error:  # whatever the hub's layers raise: the network's, the cache's, the builder's errors
            raise DataError(
                f"cannot load the hub dataset {name} ({_first_line(error)}); "
                "give a local file or folder instead, or --data embedded"
            ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"the hub dataset {name} came as {type(loaded).__name__}; expected one with splits")
    return Source(name, {key: _hub_split(table, f"{name} {key}") for key, table in loaded.items()})


def _hub_split(table: "Dataset", name: str) -> Split:
    return Split(name, lambda: _rows(table, name))


def _rows(table: "Dataset", name: str) -> Records:
    """Only the columns a document can be made of: the others may be images, and slow."""
    wanted = [column for column in ("question", "answer", "text") if column in table.column_names]
    if not wanted and len(table):
        columns = ", ".join(map(repr, table.column_names[:8]))
        raise DataError(f"{name} has the columns {columns}; expected question and answer, or text")
    rows: list[Record] = table.select_columns(wanted).to_list() if wanted else []
    return [(f"{name} row {number}", row) for number, row in enumerate(rows, start=1)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars, logs and warnings of `datasets` and the hub client, and put all back afterwards."""
    import datasets
    from huggingface_hub import utils as hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = [module for module in (datasets, hub) if not module.are_progress_bars_disabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            for module in bars:
                module.disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for module in bars:
                module.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"
