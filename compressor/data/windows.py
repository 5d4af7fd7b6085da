"""Documents → windows of token ids no longer than the context, and windows → batches. Nothing is lost or overlaps."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from compressor.data.documents import fingerprint, short_hash
from compressor.errors import DataError
from compressor.types import Task

Example = tuple[Tensor, Tensor]  # (input_ids, labels) of one window: [tokens], int64
Labels = Literal["next", "masked", "none"]
# input_ids, attention_mask, labels: [batch, longest window of the batch]; places: [batch, 2]; real: [real tokens]
Batch = dict[str, Tensor]
Place = tuple[int, int]  # (document, how many windows of it came before)
PlacedExample = tuple[Example, Place]

IGNORED = -100  # the label of a position that is not to be predicted
MASKED_FRACTION = 0.15  # Devlin et al. 2019, section 3.1; all of them become the mask token


@dataclass(frozen=True)
class Frame:
    """The special tokens around the content of every window, e.g. ([CLS],) and ([SEP],), or (<s>,) and ()."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens that the frame takes from the context."""
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True, eq=False)
class Windows:
    """Documents as a model reads them; a document longer than the context makes several consecutive windows.

    `input_ids` holds one int64 tensor [tokens] per window, framed, in the documents' order, and `places` where each
    comes from. `documents` counts the documents, `split_documents` those longer than `max_length`, `tokens` the content
    tokens (frames not counted), and `longest` is the length in tokens of the longest window, its frame included.
    `fingerprint` is that of the texts, `hashes` has one short hash for each of them.
    """

    name: str
    fingerprint: str
    hashes: tuple[str, ...]
    documents: int
    split_documents: int
    input_ids: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    frame: Frame
    max_length: int
    tokens: int
    longest: int

    def facts(self) -> dict[str, Any]:
        """What identifies the text, JSON-ready."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "documents": self.documents,
            "split_documents": self.split_documents,
            "windows": len(self.input_ids),
            "tokens": self.tokens,
            "hashes": list(self.hashes),
        }

    def describe(self) -> str:
        """One line for the log: "319 documents of x.jsonl (3 longer than 256 tokens, split into 7 windows), …"."""
        split = ""
        if self.split_documents:
            pieces = len(self.input_ids) - (self.documents - self.split_documents)
            split = f" ({self.split_documents:,} longer than {self.max_length:,} tokens, split into {pieces:,} windows)"
        return f"{_count(self.documents, 'document')} of {self.name}{split}, {_count(self.tokens, 'token')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def make_windows(
    name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int
) -> Windows:
    """Tokenise each text once, split those that are too long, and frame every window.

    Raises:
        DataError: a context too short for the frame, or texts of which the tokenizer makes nothing.
    """
    contents: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    kept = [(text, ids) for text, ids in zip(texts, contents, strict=True) if ids]
    if not kept:
        raise DataError(f"the tokenizer makes no tokens of any document of {name}; is it the model's own tokenizer?")
    frame = find_frame(tokenizer, task, [text for text, _ in kept], [ids for _, ids in kept])
    room = max_length - frame.size
    if room < 1:
        raise DataError(
            f"a context of {max_length} tokens has no room for text beside {frame.size} special tokens; raise it"
        )
    pieces = {
        (document, part): piece
        for document, (_, ids) in enumerate(kept)
        for part, piece in enumerate(split_ids(ids, room))
    }
    windows = [torch.tensor([*frame.prefix, *piece, *frame.suffix]) for piece in pieces.values()]
    return Windows(
        name=name,
        fingerprint=fingerprint(text for text, _ in kept),
        hashes=tuple(short_hash(text) for text, _ in kept),
        documents=len(kept),
        split_documents=sum(len(ids) > room for _, ids in kept),
        input_ids=tuple(windows),
        places=tuple(pieces),
        frame=frame,
        max_length=max_length,
        tokens=sum(len(ids) for _, ids in kept),
        longest=max(len(window) for window in windows),
    )


def find_frame(
    tokenizer: PreTrainedTokenizerBase, task: Task, texts: Sequence[str], contents: Sequence[Sequence[int]]
) -> Frame:
    """Find the special tokens that the tokenizer puts around a text, by encoding one of `texts` with them.

    A causal LM whose tokenizer has a BOS token but adds none (GPT-2's) gets it before the text all the same: the first
    token of a document is then predicted too, from what the model saw between the documents of its training.

    Args:
        tokenizer: the model's.
        task: "causal" or "masked".
        texts: at least one text.
        contents: the ids of each text without special tokens, none of them empty.

    Raises:
        DataError: a tokenizer that encodes the text itself differently with special tokens.
    """
    special = set(tokenizer.all_special_ids)
    plain = [index for index, ids in enumerate(contents) if special.isdisjoint(ids)]
    probe = plain[0] if plain else 0
    content = list(contents[probe])
    framed: list[int] = tokenizer(texts[probe], add_special_tokens=True, verbose=False)["input_ids"]
    for start in range(len(framed) - len(content) + 1):
        if framed[start : start + len(content)] == content:
            prefix, suffix = tuple(framed[:start]), tuple(framed[start + len(content) :])
            break
    else:
        raise DataError(
            "the tokenizer changes a text's own tokens when it adds special ones; only frames are supported"
        )
    bos = tokenizer.bos_token_id
    if task == "causal" and isinstance(bos, int) and bos not in prefix:
        prefix = (bos, *prefix)
    return Frame(prefix, suffix)


def split_ids(ids: Sequence[int], room: int) -> list[Sequence[int]]:
    """Cut ids into consecutive pieces of `room`, the last one shorter; joined they are `ids` again."""
    return [ids[start : start + room] for start in range(0, len(ids), room)]


def mask_window(input_ids: Tensor, frame: Frame, special_ids: frozenset[int], mask_id: int, key: str) -> Example:
    """Hide 15 % of a window's content tokens (at least one) behind the mask token.

    Which ones depends on `key` and the window only. Special tokens inside the content (e.g. unknown ones) are chosen
    only where there is nothing else.

    Returns:
        The ids as the model gets them [tokens], and the labels [tokens]: the hidden ids, `IGNORED` elsewhere.
    """
    content = range(len(frame.prefix), len(input_ids) - len(frame.suffix))
    candidates = [position for position in content if int(input_ids[position]) not in special_ids] or list(content)
    count = max(1, round(MASKED_FRACTION * len(candidates)))
    hidden = torch.tensor(random.Random(key).sample(candidates, count))
    labels = torch.full_like(input_ids, IGNORED)
    labels[hidden] = input_ids[hidden]
    masked = input_ids.clone()
    masked[hidden] = mask_id
    return masked, labels


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the pad token's, else the end-of-text token's, else 0; the attention mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def collate(examples: Sequence[PlacedExample], pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them, and say where each comes from.

    `real` numbers the real tokens in the flattened batch: to find them on a device, the device would have to be asked.
    """
    ids = [ids for (ids, _), _ in examples]
    attention_mask = pad_sequence([torch.ones_like(window) for window in ids], batch_first=True)
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": attention_mask,
        "labels": pad_sequence([labels for (_, labels), _ in examples], batch_first=True, padding_value=IGNORED),
        "places": torch.tensor([place for _, place in examples]),
        "real": attention_mask.flatten().nonzero().squeeze(1),
    }


def longest_first(windows: Sequence[Tensor]) -> list[int]:
    """Order window indices by length, longest first, so that memory faults come early; equal lengths keep order."""
    return sorted(range(len(windows)), key=lambda index: -len(windows[index]))


Draw = tuple[int, int]  # (window's index, epoch): what an example is made from


class Examples(Dataset[PlacedExample]):
    """The example of any `Draw`; its labels are every token ("next"), the hidden tokens ("masked") or none ("none")."""

    def __init__(self, windows: Windows, tokenizer: PreTrainedTokenizerBase, labels: Labels, seed: int) -> None:
        self.windows = windows
        self.labels = labels
        self.seed = seed
        self.mask_id: int | None = tokenizer.mask_token_id
        self.special_ids = frozenset(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return len(self.windows.input_ids)

    def __getitem__(self, draw: Draw) -> PlacedExample:
        index, epoch = draw
        return self._example(index, epoch), self.windows.places[index]

    def _example(self, index: int, epoch: int) -> Example:
        ids = self.windows.input_ids[index]
        if self.labels == "next":
            return ids, ids
        if self.labels == "none":
            return ids, torch.full_like(ids, IGNORED)
        assert self.mask_id is not None
        return mask_window(ids, self.windows.frame, self.special_ids, self.mask_id, f"{self.seed}:{epoch}:{index}")


class ShuffledBuckets(Sampler[Draw]):
    """Windows for a BatchSampler of the same `batch_size`: batches of like lengths, in an order new in every epoch.

    A last batch of fewer windows stays last, so that the others keep their windows. Lightning calls `set_epoch`.
    """

    def __init__(self, windows: Sequence[Tensor], batch_size: int, seed: int) -> None:
        order = longest_first(windows)
        self.buckets = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.last = self.buckets.pop() if len(order) % batch_size else []
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets) + len(self.last)

    def __iter__(self) -> Iterator[Draw]:
        buckets = list(self.buckets)
        random.Random(f"{self.seed}:{self.epoch}").shuffle(buckets)
        return iter([(index, self.epoch) for bucket in [*buckets, self.last] for index in bucket])
