"""The symbols that a scoring epoch saw, and what they are of."""

from __future__ import annotations

import tempfile
from typing import IO, Any

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from compressor.errors import CompressorError


class SymbolTable(Metric):
    """The symbols themselves, for joint entropies of any order; merging devices is a concatenation.

    They take as many bytes as the alphabet needs, on the metric's device, and go to a temporary file whenever there are
    more than `budget` bytes of them. State: the bytes one after the other, which every backend can send, and `sizes`,
    what an observation has of heads and, perhaps, of symbols for each.
    """

    full_state_update = False
    rows: list[torch.Tensor]
    sizes: torch.Tensor

    def __init__(self, alphabet: int, budget: int | None = None) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.kind = next(kind for kind, size in _KINDS if alphabet <= size)
        self.budget = budget
        self._file: IO[bytes] | None = None
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("sizes", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, symbols: torch.Tensor) -> None:
        """Keep symbols [observations, heads], integers from 0 to alphabet − 1."""
        on_cpu = symbols.device.type == "cpu"  # elsewhere a look would wait for the device
        if on_cpu and len(symbols) and not 0 <= int(symbols.min()) <= int(symbols.max()) < self.alphabet:
            span = f"{int(symbols.min())} to {int(symbols.max())}"
            raise ValueError(f"symbols run from {span}; expected 0 to {self.alphabet - 1}")
        if not self._update_count > 1:
            self.sizes[: symbols.ndim - 1] = torch.tensor(symbols.shape[1:])
        self.rows.append(symbols.to(self.kind).contiguous().view(torch.uint8).flatten())
        if self.budget is not None and sum(row.numel() for row in self.rows) > self.budget:
            self._spill()

    def compute(self) -> torch.Tensor:
        """The symbols, int64 [observations, heads] on the CPU."""
        self._recall()
        shape = [size for size in self.sizes.tolist() if size]
        if not len(self.rows):
            return torch.zeros(0, *shape, dtype=torch.int64)
        return dim_zero_cat(self.rows).cpu().view(self.kind).to(torch.int64).reshape(-1, *shape)

    def symbols(self) -> torch.Tensor:
        """What `compute` gives, also where torchmetrics would squeeze a 1 × 1."""
        return self.compute().reshape(-1, *(size for size in self.sizes.tolist() if size))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Bring back what is on disk before devices are merged, of which one may have seen nothing."""
        self._recall()
        if not len(self.rows):
            self.rows = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Bring back what is on disk, here and there, before it is put together."""
        self._recall()
        if isinstance(incoming_state, SymbolTable):
            incoming_state._recall()
        super().merge_state(incoming_state)

    def reset(self) -> None:
        """Forget everything, on disk too."""
        self._close()
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        self._recall()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if file := vars(self).get("_file"):
            file.close()
        self._file = None

    def _spill(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - closed when the table forgets it
            self._file.write(dim_zero_cat(self.rows).cpu().numpy().tobytes())
        except OSError as error:
            raise CompressorError(
                f"cannot keep symbols in {tempfile.gettempdir()} ({error.strerror}); give a larger --memory-budget, or "
                "set TMPDIR to a folder with more room"
            ) from error
        self.rows = []

    def _recall(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            spilled = torch.from_numpy(np.frombuffer(self._file.read(), dtype=np.uint8).copy())
            self.rows = [spilled.to(self.device), *self.rows]
            self._close()


_KINDS = ((torch.uint8, 1 << 8), (torch.uint16, 1 << 16), (torch.int32, 1 << 31), (torch.int64, 1 << 63))


class Observations(Metric):
    """Which document and which place in it every observation is of, in the order of the symbol tables."""

    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, documents: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep as many documents as positions, [observations] each."""
        self.rows.append(torch.stack([documents, positions], dim=1).to(torch.int32))

    def compute(self) -> torch.Tensor:
        """Documents and positions, int64 [observations, 2] on the CPU."""
        return dim_zero_cat(self.rows).cpu().long() if len(self.rows) else torch.zeros(0, 2, dtype=torch.int64)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Let a device that saw nothing say so in rows of the others' shape."""
        if not len(self.rows):
            self.rows = [torch.zeros(0, 2, dtype=torch.int32, device=self.device)]
        super().sync(*args, **kwargs)


class TupleTable(SymbolTable):
    """Whole tuples as symbols, one observation per document, put together again where it was split into windows."""

    places: list[torch.Tensor]

    def __init__(self, alphabet: int, budget: int | None = None) -> None:
        super().__init__(alphabet + 1, budget)  # and a filler
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, symbols: torch.Tensor, places: torch.Tensor) -> None:  # type: ignore[override]
        """Keep the tuples [windows, heads, width] of windows whose places [windows, 2] are (document, part).

        The elements of a tuple are −1 to alphabet − 1.
        """
        super().update(symbols + 1)
        self.places.append(places)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Let a device that saw nothing say so of the places, too."""
        if not len(self.places):
            self.places = [torch.zeros(0, 2, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> torch.Tensor:
        """Compact ids of the documents' tuples, int64 [documents, heads]."""
        rows = super().compute()
        if not len(rows):
            return rows[..., 0] if rows.ndim > 2 else rows
        places = dim_zero_cat(self.places).cpu()
        documents, parts = torch.unique(places[:, 0], return_inverse=True)[1], places[:, 1]
        columns = []
        for column in rows.unbind(1):
            whole = documents.new_full((int(documents.max()) + 1, int(parts.max()) + 1), -1)
            whole[documents, parts] = _ids(column)
            columns.append(_ids(whole))
        return torch.stack(columns, dim=1)

    def symbols(self) -> torch.Tensor:
        """What `compute` gives, also where torchmetrics would squeeze a 1 × 1."""
        return self.compute().reshape(-1, int(self.sizes[0]))


def _ids(symbols: torch.Tensor) -> torch.Tensor:
    """Number what lies along the first axis: equal numbers for what is equal."""
    numbers: torch.Tensor = torch.unique(symbols, dim=0, return_inverse=True)[1]
    return numbers
