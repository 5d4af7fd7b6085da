"""The data station: specs, documents, the wall between calibration and evaluation, windows, masks, batches."""

import hashlib
import json
import logging
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from compressor.data import TextDataModule, Windows, choose, fingerprint, hold_out, load_documents, make_windows
from compressor.errors import DataError

WORDS = [f"w{number}" for number in range(60)]
QA = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(6)]


def build_tokenizer(special: list[str], template: str | None, **names: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["[UNK]", *special, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    if template:
        backend.post_processor = TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in special if token in template]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=8, **names)


def bert_like() -> PreTrainedTokenizerFast:
    return build_tokenizer(
        ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
        "[CLS] $A [SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def gpt2_like() -> PreTrainedTokenizerFast:
    return build_tokenizer(["<|end|>"], None, bos_token="<|end|>", eos_token="<|end|>")


def llama_like() -> PreTrainedTokenizerFast:
    return build_tokenizer(["<s>", "</s>"], "<s> $A", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bert": (bert_like(), "masked"), "gpt2": (gpt2_like(), "causal"), "llama": (llama_like(), "causal")}
FRAMES = {"bert": ([2], [3]), "gpt2": ([1], []), "llama": ([1], [])}


def words(*lengths: int) -> list[str]:
    """One text per length, in words that are tokens; different texts wherever they can be."""
    return [" ".join(WORDS[(7 * text + at) % 60] for at in range(length)) for text, length in enumerate(lengths)]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    return write_jsonl(path, [{"text": text} for text in texts])


def refused(data: str, part: Any = "both", eval_data: str | None = None) -> str:
    """The message of the DataError that loading raises: always a single line."""
    with pytest.raises(DataError) as caught:
        load_documents(data, part, eval_data)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", QA[:4])
    write_jsonl(tmp_path / "test.jsonl", QA[4:])
    return tmp_path


# --- where documents come from -------------------------------------------------------------------------------------


def test_a_folder_gives_its_splits_in_the_files_order(folder: Path) -> None:
    corpus = load_documents(str(folder), "both")
    assert corpus.calibration == tuple(f"Question: q{n}\nAnswer: a{n}" for n in range(4))
    assert corpus.evaluation == tuple(f"Question: q{n}\nAnswer: a{n}" for n in (4, 5))
    assert (corpus.calibration_name, corpus.evaluation_name) == (
        f"{folder.name}/train.jsonl",
        f"{folder.name}/test.jsonl",
    )
    assert corpus.overlap == 0


def test_the_part_is_the_bare_field(folder: Path) -> None:
    assert load_documents(str(folder), "question").calibration == ("q0", "q1", "q2", "q3")
    assert load_documents(str(folder), "answer").evaluation == ("a4", "a5")


def test_validation_serves_where_there_is_no_test_split(folder: Path) -> None:
    (folder / "test.jsonl").rename(folder / "validation.jsonl")
    assert load_documents(str(folder), "answer").evaluation == ("a4", "a5")
    write_jsonl(folder / "test.jsonl", QA[5:])
    assert load_documents(str(folder), "answer").evaluation == ("a5",)


def test_a_folder_of_one_split_is_divided(folder: Path) -> None:
    (folder / "test.jsonl").unlink()
    corpus = load_documents(str(folder), "answer")
    assert sorted(corpus.calibration + corpus.evaluation) == ["a0", "a1", "a2", "a3"]
    assert len(corpus.evaluation) == 1


def test_the_embedded_corpus_is_a_folder_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = ModuleType("compressor.assets")
    assets.CORPUS = folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compressor.assets", assets)
    corpus = load_documents("embedded", "question")
    assert (corpus.calibration[0], corpus.evaluation[0]) == ("q0", "q4")
    assert corpus.calibration_name == "embedded/train.jsonl"


def test_a_text_file_is_one_document_per_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\ufeffone\nstill one\n\n \t\n\ntwo\n\n  \n", encoding="utf-8")
    corpus = load_documents(str(path), "both")
    assert sorted(corpus.calibration + corpus.evaluation) == ["one\nstill one", "two"]


def test_a_parquet_file_is_read_quietly_and_leaves_nothing_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.parquet"
    table = pyarrow.table({"image": [[1]] * 5, "text": words(1, 2, 3, 4, 5)})
    pyarrow.parquet.write_table(table, path)
    corpus = load_documents(str(path), "both")
    assert sorted(corpus.calibration + corpus.evaluation) == sorted(words(1, 2, 3, 4, 5))
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


def test_jsonl_lines_end_at_newlines_only_and_blank_ones_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one\u2028still one"}\r\n\n{"text": "two"}\n   \n{"text": "three"}', encoding="utf-8")
    corpus = load_documents(str(path), "both")
    assert set(corpus.calibration + corpus.evaluation) == {"one\u2028still one", "two", "three"}


def test_a_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_documents(f"~/{folder.name}", "answer").evaluation == ("a4", "a5")


# --- the hub -------------------------------------------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Replace the hub by these splits; the list returned collects what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("gsm8k", ("openai/gsm8k", "main")),
        ("openai/gsm8k:socratic", ("openai/gsm8k", "socratic")),
        ("some-one/some.set_2", ("some-one/some.set_2", None)),
    ],
)
def test_a_hub_id_is_loaded_with_its_config(
    spec: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(monkeypatch, train=QA[:3], test=QA[3:])
    corpus = load_documents(spec, "answer")
    assert asked == [arguments]
    assert corpus.calibration == ("a0", "a1", "a2")
    assert corpus.evaluation == ("a3", "a4", "a5")


def test_a_hub_set_of_one_split_is_divided_and_columns_not_needed_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(monkeypatch, train=[{"text": text, "label": 1} for text in words(1, 2, 3, 4, 5, 6)])
    corpus = load_documents("some/set", "both")
    assert (len(corpus.calibration), len(corpus.evaluation)) == (5, 1)


def test_hub_data_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=QA, extra=QA)
    assert "has the splits train, extra; expected a test or validation split" in refused("some/set")
    hub(monkeypatch, test=QA, validation=QA)
    assert "expected a train split" in refused("some/set")
    hub(monkeypatch, train=[{"label": 1}])
    assert "some/set train has the columns 'label'; expected question and answer, or text" in refused("some/set")
    hub(monkeypatch, train=[{"text": "one"}, {"text": None}])
    assert "some/set train row 2: 'text' is of type NoneType" in refused("some/set")


def test_without_the_hub_the_message_says_what_else_would_do(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)
    message = refused("gsm8k")
    assert "openai/gsm8k:main" in message
    assert message.endswith("give a local file or folder instead, or --data embedded")
    assert capfd.readouterr() == ("", "")
    assert [logger.level for logger in loggers] == [logging.INFO] * 2
    assert not datasets.are_progress_bars_disabled()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nope.jsonl", "./nope", "/nope", "~/nope", "a/b/c", "a/nope.txt", "a/nope.CSV"])
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(
    spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = hub(monkeypatch, train=QA)
    assert f"no file or folder {spec!r}" in refused(spec)
    assert not asked


def test_an_unknown_name_is_refused_with_what_was_meant() -> None:
    assert refused("gsm8").endswith("did you mean 'gsm8k'?")
    assert "unknown data ''; expected embedded, gsm8k" in refused("")
    assert "cannot look up" in refused("a" * 5000)


@pytest.mark.parametrize("name", ["some.json", "some.csv", "some", "some.jsonl.gz"])
def test_other_kinds_of_file_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert "expected a file of kind .jsonl, .txt, .parquet" in refused(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.jsonl", b'{"text": "one"}\n\n{"text": "two"\n', "bad.jsonl line 3 is not valid JSON"),
        ("list.jsonl", b'{"text": "one"}\n["two"]\n', "list.jsonl line 2 is a JSON list"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl line 1 is not valid JSON"),
        ("empty.jsonl", b"\n \n", "empty.jsonl holds no text"),
        ("blank.jsonl", b'{"text": " "}\n{"text": ""}\n', "blank.jsonl holds no text"),
        ("number.jsonl", b'{"text": "one"}\n{"text": 2}\n', "number.jsonl line 2: 'text' is of type int"),
        ("null.jsonl", b'{"text": null}\n', "null.jsonl line 1: 'text' is of type NoneType"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "half.jsonl line 1: 'text' holds half a surrogate pair"),
        ("missing.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', "missing.jsonl line 2 has no field 'text'"),
        ("fields.jsonl", b'{"a": 1, "b": 2}\n', "fields.jsonl line 1 has 'a', 'b'; expected the fields question"),
        ("none.jsonl", b"{}\n", "none.jsonl line 1 has no fields"),
        ("lonely.jsonl", b'{"question": "one"}\n', "lonely.jsonl line 1 has 'question'"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text (byte 0)"),
        ("empty.txt", b" \n\n", "empty.txt holds no text"),
        ("bad.parquet", b"PAR1 no parquet", "is not a readable parquet file"),
        ("empty.parquet", b"", "is not a readable parquet file"),
        ("one.txt", b"one\n", "nothing left to calibrate on"),
        ("same.txt", b"one\n\n" * 9, "nothing left to calibrate on"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_place(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refused(str(tmp_path / name))


def test_a_record_must_have_the_field_the_first_one_has(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", [*QA, {"question": "q"}])
    assert "train.jsonl line 7 has no field 'answer'" in refused(str(folder))
    assert load_documents(str(folder), "question").calibration == ("q0", "q1", "q2", "q3", "q")


def test_folders_without_or_with_too_many_splits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\none\n")
    assert "holds no train.*, validation.* or test.* file" in refused(str(tmp_path))
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "train.jsonl").write_text("{}")
    assert "holds train.jsonl and train.txt; expected one file per split" in refused(str(tmp_path))


def test_a_directory_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").mkdir()
    assert "cannot read" in refused(str(tmp_path))


def test_plain_text_has_no_question(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "some.jsonl", words(1, 2))
    assert "some.jsonl holds plain text, which has no question" in refused(path, "question")
    assert "part is 'all'; expected one of question, answer, both" in refused(path, "all")


def test_records_with_an_empty_part_are_skipped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [QA[0], {"question": "q", "answer": " \n"}, QA[1]])
    write_jsonl(tmp_path / "test.jsonl", QA[2:])
    assert load_documents(str(tmp_path), "both").calibration == tuple(f"Question: q{n}\nAnswer: a{n}" for n in (0, 1))
    assert load_documents(str(tmp_path), "question").calibration == ("q0", "q", "q1")


# --- the wall between calibration and evaluation -------------------------------------------------------------------


def test_a_lone_file_always_holds_out_the_same_fifth_whatever_the_order() -> None:
    texts = [f"document {number}" for number in range(23)]
    calibration, evaluation = hold_out(texts)
    assert len(evaluation) == 4
    assert sorted(calibration + evaluation) == sorted(texts)
    keyed = sorted(texts, key=lambda text: hashlib.sha256(b"compressor held-out fifth\n" + text.encode()).hexdigest())
    assert set(evaluation) == set(keyed[:4])
    assert list(evaluation) == [text for text in texts if text in evaluation]
    assert set(hold_out(texts[::-1])[1]) == set(evaluation)
    assert len(hold_out(texts[:3])[1]) == 1


def test_evaluation_documents_are_dropped_from_calibration_and_counted(tmp_path: Path) -> None:
    write_texts(tmp_path / "train.jsonl", ["one", "two", "three", "two"])
    write_texts(tmp_path / "test.jsonl", ["two", "four", "one "])
    corpus = load_documents(str(tmp_path), "both")
    assert corpus.calibration == ("one", "three")
    assert corpus.evaluation == ("two", "four", "one ")
    assert corpus.overlap == 2


def test_a_text_twice_in_a_lone_file_is_never_on_both_sides(tmp_path: Path) -> None:
    corpus = load_documents(write_texts(tmp_path / "some.jsonl", ["one", "two", "three", "four", "five"] * 2), "both")
    assert not set(corpus.calibration) & set(corpus.evaluation)
    assert corpus.calibration
    assert corpus.evaluation


def test_with_evaluation_data_a_lone_file_calibrates_whole(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "some.jsonl", words(1, 2, 3))
    other = write_texts(tmp_path / "other.jsonl", words(4, 5, 6)[1:])
    corpus = load_documents(data, "both", other)
    assert corpus.calibration == tuple(words(1, 2, 3))
    assert corpus.evaluation == tuple(words(4, 5, 6)[1:])
    assert (corpus.calibration_name, corpus.evaluation_name) == ("some.jsonl", "other.jsonl")
    assert "nothing left to calibrate on: every document of some.jsonl is in the evaluation set some.jsonl" in refused(
        data, eval_data=data
    )


def test_evaluation_data_with_splits_gives_its_evaluation_split(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "some.jsonl", [{"question": "x", "answer": "y"}, QA[5]])
    corpus = load_documents(data, "answer", str(folder))
    assert (corpus.calibration, corpus.evaluation, corpus.overlap) == (("y",), ("a4", "a5"), 1)
    (folder / "test.jsonl").unlink()
    assert load_documents(data, "answer", str(folder)).evaluation == ("a0", "a1", "a2", "a3")


def test_a_test_split_that_is_not_used_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "test.jsonl").write_text("{damaged")
    corpus = load_documents(str(folder), "answer", write_jsonl(tmp_path / "other.jsonl", QA[:1]))
    assert corpus.calibration == ("a1", "a2", "a3")
    assert "test.jsonl line 1" in refused(str(folder))


# --- choosing and naming -------------------------------------------------------------------------------------------


def test_a_choice_is_seeded_keeps_the_order_and_grows_by_addition() -> None:
    texts = [str(number) for number in range(50)]
    few, more = choose(texts, 10, 3), choose(texts, 20, 3)
    assert (len(few), len(more)) == (10, 20)
    assert list(few) == sorted(few, key=int)
    assert set(few) < set(more)
    assert choose(texts, 10, 3) == few != choose(texts, 10, 4)
    assert choose(texts, 0, 3) == choose(texts, 50, 3) == choose(texts, 99, 3) == tuple(texts)


def test_a_fingerprint_tells_texts_their_order_and_their_bounds() -> None:
    expected = hashlib.sha256(b"\0\0\0\0\0\0\0\2\xc3\xa9" + b"\0\0\0\0\0\0\0\1b").hexdigest()
    assert fingerprint(["é", "b"]) == expected
    assert len({fingerprint(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""])}) == 5


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_window_of_a_split_document_has_the_frame(kind: str) -> None:
    tokenizer, task = TOKENIZERS[kind]
    prefix, suffix = FRAMES[kind]
    size = len(prefix + suffix)
    windows = make_windows("some", words(3, 17, 12 - size), tokenizer, task, 12)
    assert (list(windows.frame.prefix), list(windows.frame.suffix)) == (prefix, suffix)
    assert [len(ids) for ids in windows.input_ids] == [3 + size, 12, 17 - (12 - size) + size, 12]
    for ids in windows.input_ids:
        assert ids.dtype == torch.int64
        assert ids[: len(prefix)].tolist() == prefix
        assert ids[len(ids) - len(suffix) :].tolist() == suffix
    assert (windows.documents, windows.split_documents) == (3, 1)
    assert (windows.tokens, windows.longest) == (3 + 17 + 12 - size, 12)
    assert windows.fingerprint == fingerprint(words(3, 17, 12 - size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    room=st.integers(1, 80),
)
def test_windows_without_frames_joined_are_the_documents(kind: str, lengths: list[int], room: int) -> None:
    tokenizer, task = TOKENIZERS[kind]
    prefix, suffix = FRAMES[kind]
    max_length = room + len(prefix + suffix)
    windows = make_windows("some", words(*lengths), tokenizer, task, max_length)
    pieces = [ids.tolist()[len(prefix) : len(ids) - len(suffix)] for ids in windows.input_ids]
    assert list(chain(*pieces)) == tokenizer.convert_tokens_to_ids(" ".join(words(*lengths)).split())
    assert len(pieces) == sum(-(-length // room) for length in lengths)
    assert max(map(len, windows.input_ids)) == windows.longest <= max_length


def test_special_tokens_written_in_the_text_do_not_mislead_the_frame() -> None:
    windows = make_windows("some", ["<s>", "<s> w1", "w2"], llama_like(), "causal", 8)
    assert [ids.tolist() for ids in windows.input_ids] == [[1, 1], [1, 1, 4], [1, 5]]
    assert windows.frame.prefix == (1,)


def test_a_causal_model_without_bos_gets_no_frame_and_a_masked_one_no_bos() -> None:
    plain = build_tokenizer(["</s>"], None, eos_token="</s>")
    assert make_windows("some", words(3), plain, "causal", 8).frame.size == 0
    assert make_windows("some", words(3), gpt2_like(), "masked", 8).frame.size == 0


def test_documents_that_make_no_tokens_do_not_count() -> None:
    silent = gpt2_like()
    silent.backend_tokenizer.model = WordLevel({"<|end|>": 0, "w1": 1}, unk_token="[UNK]")
    silent.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    texts = ["w1 w1", " ", "w1"]
    windows = make_windows("some", texts, silent, "causal", 8)
    assert (windows.documents, windows.tokens, len(windows.input_ids)) == (2, 3, 2)
    with pytest.raises(DataError, match="makes no tokens of any document of some"):
        make_windows("some", [" "], silent, "causal", 8)


def test_a_context_without_room_for_text_is_refused() -> None:
    with pytest.raises(DataError, match="a context of 2 tokens has no room for text beside 2 special tokens"):
        make_windows("some", words(3), bert_like(), "masked", 2)


def test_the_log_line_says_what_was_split() -> None:
    def line(*lengths: int) -> str:
        return make_windows("x.jsonl", words(*lengths), gpt2_like(), "causal", 11).describe()

    assert line(4, 10) == "2 documents of x.jsonl, 14 tokens"
    assert line(4, 1025, 11) == "3 documents of x.jsonl (2 longer than 11 tokens, split into 105 windows), 1,040 tokens"
    assert line(1) == "1 document of x.jsonl, 1 token"


# --- the data module -----------------------------------------------------------------------------------------------

LENGTHS = [5, 9, 2, 30, 7, 7, 12, 3, 1, 26]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Ten calibration and three evaluation documents."""
    write_texts(tmp_path / "train.jsonl", words(*LENGTHS))
    write_texts(tmp_path / "test.jsonl", [text + " w59" for text in words(4, 40, 11)])
    return tmp_path


def ready(kind: str, texts: Path, **options: Any) -> TextDataModule:
    tokenizer, task = TOKENIZERS[kind]
    module = TextDataModule(tokenizer, task=task, data=str(texts), **{"max_length": 12, "batch_size": 4, **options})
    module.setup()
    return module


def windows_of(batches: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row of the batches without its padding."""
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def test_the_windows_are_named_and_chosen(texts: Path) -> None:
    module = ready("gpt2", texts, samples=4, eval_samples=2, seed=5)
    assert isinstance(module.calibration, Windows)
    assert (module.calibration.documents, module.evaluation.documents) == (4, 2)
    assert module.calibration.fingerprint == fingerprint(choose(words(*LENGTHS), 4, 5))
    assert module.describe()[0] == f"calibration: {module.calibration.describe()}"
    assert module.describe()[1].startswith(f"evaluation: 2 documents of {texts.name}/test.jsonl")


def test_dropped_documents_are_told(texts: Path) -> None:
    write_texts(texts / "test.jsonl", [words(*LENGTHS)[4], "w1 w2"])
    module = ready("gpt2", texts)
    assert module.overlap == 1
    assert module.describe()[0].endswith(" tokens; 1 more left out, being in the evaluation set too")


def test_setting_up_again_reads_nothing(texts: Path) -> None:
    module = ready("gpt2", texts)
    before = module.calibration
    (texts / "train.jsonl").unlink()
    module.setup("test")
    assert module.calibration is before


def test_what_cannot_work_is_refused_at_once(texts: Path) -> None:
    for name in ("samples", "eval_samples", "batch_size", "max_length"):
        with pytest.raises(DataError, match=f"^{name} is -1; expected"):
            ready("gpt2", texts, **{name: -1})
    with pytest.raises(DataError, match="the tokenizer has no mask token"):
        TextDataModule(gpt2_like(), task="masked", max_length=8)
    with pytest.raises(RuntimeError, match="call setup"):
        _ = TextDataModule(gpt2_like(), task="causal", max_length=8).calibration


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_batches_are_padded_on_the_right_and_the_tokenizer_is_untouched(kind: str, texts: Path) -> None:
    tokenizer, _ = TOKENIZERS[kind]
    before = (tokenizer.backend_tokenizer.to_str(), repr(tokenizer), len(tokenizer))
    module = ready(kind, texts)
    pad = {"bert": 1, "gpt2": 1, "llama": 2}[kind]  # the pad token, or the end of text
    lengths = []
    for batch in module.predict_dataloader():
        places, real = batch.pop("places"), batch.pop("real")
        assert places.shape == (len(batch["labels"]), 2)
        assert real.tolist() == [n for n, one in enumerate(batch["attention_mask"].flatten().tolist()) if one]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(part.dtype == torch.int64 and part.shape == batch["labels"].shape for part in batch.values())
        rows = batch["attention_mask"].sum(dim=1)
        assert batch["labels"].shape[1] == rows.max()
        for length, ids, mask, labels in zip(rows.tolist(), *(batch[key] for key in batch), strict=True):
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(ids[length:].tolist()) <= {pad}
            assert set(labels[length:].tolist()) <= {-100}
        lengths += rows.tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(lengths) == sorted(map(len, module.calibration.input_ids))
    assert (tokenizer.backend_tokenizer.to_str(), repr(tokenizer), len(tokenizer)) == before


def test_padding_is_zero_without_pad_and_end_tokens(texts: Path) -> None:
    plain = build_tokenizer([], None)
    module = TextDataModule(plain, task="causal", data=str(texts), max_length=12)
    module.setup()
    assert next(iter(module.predict_dataloader()))["input_ids"][-1, -1] == 0
    assert plain.pad_token is None


@pytest.mark.parametrize("loader", ["predict", "test", "val", "train"])
def test_causal_labels_are_the_ids(loader: str, texts: Path) -> None:
    module = ready("llama", texts)
    rows = windows_of(getattr(module, f"{loader}_dataloader")())
    expected = module.calibration if loader in ("predict", "train") else module.evaluation
    assert sorted(ids for ids, _ in rows) == sorted(ids.tolist() for ids in expected.input_ids)
    assert all(ids == labels for ids, labels in rows)


def test_calibration_of_a_masked_model_is_unmasked_and_unlabelled(texts: Path) -> None:
    module = ready("bert", texts)
    rows = windows_of(module.predict_dataloader())
    assert sorted(ids for ids, _ in rows) == sorted(ids.tolist() for ids in module.calibration.input_ids)
    assert {label for _, labels in rows for label in labels} == {-100}


@pytest.mark.parametrize("loader", ["test", "val", "train"])
def test_masks_hide_a_share_of_the_content_and_label_just_that(loader: str, texts: Path) -> None:
    mask_id = 4
    module = ready("bert", texts, max_length=42)
    rows = windows_of(getattr(module, f"{loader}_dataloader")())
    restored = []
    for ids, labels in rows:
        hidden = [position for position, label in enumerate(labels) if label != -100]
        assert hidden == [position for position, token in enumerate(ids) if token == mask_id]
        assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
        assert set(hidden) <= set(range(1, len(ids) - 1))
        restored.append([label if label != -100 else token for token, label in zip(ids, labels, strict=True)])
    windows = module.evaluation if loader != "train" else module.calibration
    assert sorted(restored) == sorted(ids.tolist() for ids in windows.input_ids)


def test_unknown_tokens_are_hidden_only_where_there_is_nothing_else(texts: Path) -> None:
    write_texts(texts / "test.jsonl", ["? w1 ? ? ? ?", "? ?"])
    rows = windows_of(ready("bert", texts).test_dataloader())
    assert rows[0][1] == [-100, -100, 6, -100, -100, -100, -100, -100]
    assert sorted(rows[1][1]) == [-100, -100, -100, 0]


def test_masks_do_not_depend_on_the_batch_but_on_the_seed(texts: Path) -> None:
    def rows(batch_size: int, seed: int) -> list[tuple[list[int], list[int]]]:
        return windows_of(ready("bert", texts, batch_size=batch_size, seed=seed).test_dataloader())

    assert rows(1, 0) == rows(2, 0) == rows(64, 0)
    assert rows(1, 0) != rows(1, 1)
    module = ready("bert", texts)
    write_texts(texts / "test.jsonl", words(*[10] * 8))
    alike = windows_of(ready("bert", texts).test_dataloader())
    assert len({tuple(label == -100 for label in labels) for _, labels in alike}) > 1
    torch.manual_seed(1)
    first = windows_of(module.test_dataloader())
    torch.manual_seed(2)
    assert windows_of(module.test_dataloader()) == first


def test_training_shuffles_the_buckets_and_nothing_but_the_buckets(texts: Path) -> None:
    module = ready("gpt2", texts, max_length=4, batch_size=3)
    loader = module.train_dataloader()

    def epoch(number: int) -> list[list[list[int]]]:
        loader.sampler.set_epoch(number)
        return [batch["input_ids"].tolist() for batch in loader]

    buckets = [batch["input_ids"].tolist() for batch in module.predict_dataloader()]
    assert len(buckets) > 9
    assert len(buckets[-1]) < 3
    assert epoch(0) == epoch(0) != buckets
    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(buckets)
    assert epoch(0) != epoch(1)
    assert epoch(1)[-1] == buckets[-1]
    other = ready("gpt2", texts, max_length=4, batch_size=3, seed=1)
    assert [batch["input_ids"].tolist() for batch in other.train_dataloader()] != epoch(0)
    assert len(loader) == len(buckets)


# --- under the Trainer ---------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Keeps every batch it is given, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[list[tuple[list[int], list[int]]]]] = {"train": [], "val": [], "test": []}

    def predict_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["input_ids"]

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.seen["test"].append(windows_of([batch]))

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.seen["val"].append(windows_of([batch]))

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen["train"].append(windows_of([batch]))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # wanted: the tensors are tiny and made beforehand
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with torch 2.13
def test_the_trainer_takes_the_loaders_without_a_warning_and_masks_anew_in_every_epoch(texts: Path) -> None:
    module = ready("bert", texts)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    recorder = Recorder()
    predicted = trainer.predict(recorder, datamodule=module)
    assert predicted is not None
    assert [ids.tolist() for ids in predicted] == [batch["input_ids"].tolist() for batch in module.predict_dataloader()]
    trainer.test(recorder, datamodule=module, verbose=False)
    assert list(chain(*recorder.seen["test"])) == windows_of(module.test_dataloader())
    trainer.fit(recorder, datamodule=module)
    half = len(recorder.seen["train"]) // 2
    first, second = (
        list(chain(*batches)) for batches in (recorder.seen["train"][:half], recorder.seen["train"][half:])
    )
    assert first == windows_of(module.train_dataloader())
    assert len(first) == len(second)
    assert {str(ids) for ids, _ in first} != {str(ids) for ids, _ in second}
    once = len(recorder.seen["val"]) // 2
    assert recorder.seen["val"][:once] == recorder.seen["val"][once:] == recorder.seen["test"]
