"""Records → documents: which texts calibrate, which evaluate, and that no text does both."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compressor.data.sources import Record, Records, Source, Split, resolve
from compressor.errors import DataError

Part = Literal["question", "answer", "both"]

# Key of the division of data that has no test split. Not the run's seed: the same file is always divided the same way.
HOLDOUT_KEY = "compressor held-out fifth"
STOPPING_KEY = "compressor held-out tenth"  # of the documents of a training, to stop it by
STOPPING_MOST = 200  # more would tell little more, and every evaluation reads them all


@dataclass(frozen=True)
class Corpus:
    """The documents of a run, in their files' order; `calibration` and `evaluation` have no text in common.

    `overlap` counts the documents dropped from calibration because the same text occurs in evaluation.
    """

    name: str
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    calibration_name: str
    evaluation_name: str
    overlap: int


def load_documents(data: str, part: Part, eval_data: str | None = None) -> Corpus:
    """Read the documents that a `--data` spec (and an `--eval-data` spec) names.

    `data` calibrates with its train split and evaluates with its test split, else its validation split. Data of a
    single split is divided by `hold_out`. With `eval_data`, its test split, else its validation split, else its only
    one is the evaluation set, and a single split of `data` calibrates whole.

    Args:
        data: "embedded", "gsm8k", a hub dataset owner/name[:config], a .jsonl, .txt or .parquet file, or a folder
            with train.* and test.* (or validation.*) files of those kinds.
        part: which part of question-and-answer records to use; records of plain text only have "both".
        eval_data: a spec of the same kinds.

    Raises:
        DataError: data that cannot be found or read, or that leaves nothing to calibrate on or to evaluate with.
    """
    if part not in get_args(Part):
        raise DataError(f"part is {part!r}; expected one of {', '.join(get_args(Part))}")
    source = resolve(data)
    train = _calibration_split(source)
    evaluating = resolve(eval_data) if eval_data is not None else source
    test = _evaluation_split(evaluating)
    calibration = _documents(train, part)
    names = train.name, test.name
    if test is train:
        calibration, evaluation = hold_out(calibration)
        names = f"{train.name} (all but the held-out fifth)", f"{train.name} (the held-out fifth)"
    else:
        evaluation = _documents(test, part)
    evaluated = set(evaluation)
    kept = tuple(text for text in calibration if text not in evaluated)
    if not kept:
        raise DataError(
            f"nothing left to calibrate on: every document of {train.name} is in the evaluation set {names[1]}; "
            "give more documents, or other ones with --eval-data"
        )
    return Corpus(source.name, kept, evaluation, *names, overlap=len(calibration) - len(kept))


def hold_out(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide texts into (the rest, the held-out fifth), at least one held out, both in the order given.

    Held out are the texts of the smallest SHA-256 under `HOLDOUT_KEY`: a random fifth that depends on nothing but the
    texts themselves, not on their order, the run's seed or a library's random stream.
    """
    return _draw(texts, max(1, len(texts) // 5), HOLDOUT_KEY)


def hold_out_to_stop(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide the texts of a training into (those to learn from, those to stop by), in the manner of `hold_out`.

    Held out are a tenth, `STOPPING_MOST` at most. A text that occurs twice is on one side only.
    """
    rest, held = _draw(texts, max(1, min(len(texts) // 10, STOPPING_MOST)), STOPPING_KEY)
    kept = set(held)
    return tuple(text for text in rest if text not in kept), held


def _draw(texts: Sequence[str], count: int, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(The rest, `count` texts of the smallest SHA-256 under `key`)."""

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{key}\n{texts[index]}".encode()).digest()

    held = set(sorted(range(len(texts)), key=rank)[:count])
    rest = tuple(text for index, text in enumerate(texts) if index not in held)
    return rest, tuple(texts[index] for index in sorted(held))


def choose(texts: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Choose `count` texts at random, all if 0 or too few, in the order given; a larger choice holds every smaller."""
    order = list(range(len(texts)))
    random.Random(str(seed)).shuffle(order)
    return tuple(texts[index] for index in sorted(order[: count or None]))


def short_hash(text: str) -> str:
    """Twelve hex digits of a text's sha256: enough to find out whether two runs share a document."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 (hex) of the texts in order, each preceded by its length in UTF-8 bytes (8 bytes, big-endian)."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


def _calibration_split(source: Source) -> Split:
    if "train" in source.splits:
        return source.splits["train"]
    return _only_split(source, "a train split")


def _evaluation_split(source: Source) -> Split:
    for kind in ("test", "validation"):
        if kind in source.splits:
            return source.splits[kind]
    return _only_split(source, "a test or validation split")


def _only_split(source: Source, expected: str) -> Split:
    if len(source.splits) != 1:
        found = ", ".join(source.splits) or "none"
        raise DataError(f"{source.name} has the splits {found}; expected {expected}, or a single split to divide")
    return next(iter(source.splits.values()))


def _documents(split: Split, part: Part) -> tuple[str, ...]:
    texts = tuple(_texts(split.read(), part, split.name))
    if not texts:
        raise DataError(f"{split.name} holds no text; expected at least one document that is not empty")
    return texts


def _texts(records: Records, part: Part, name: str) -> Iterable[str]:
    """Yield the text of every record that has one; the first record decides the form of all."""
    if not records:
        return
    fields = records[0][1]
    if "question" in fields and "answer" in fields:
        wanted = ["question", "answer"] if part == "both" else [part]
    elif "text" in fields:
        wanted = ["text"]
        if part != "both":
            raise DataError(f"{name} holds plain text, which has no {part}; leave --part at both")
    else:
        found = ", ".join(map(repr, list(fields)[:8])) or "no fields"
        raise DataError(f"{records[0][0]} has {found}; expected the fields question and answer, or text")
    form = "Question: {}\nAnswer: {}" if len(wanted) == 2 else "{}"
    for place, record in records:
        values = [_text(place, record, field) for field in wanted]
        if all(value.strip() for value in values):
            yield form.format(*values)


def _text(place: str, record: Record, field: str) -> str:
    if field not in record:
        raise DataError(f"{place} has no field {field!r}, unlike the first record; add it or remove the record")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is of type {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {field!r} holds half a surrogate pair, which is no text; repair it") from error
    return value
