"""A target of costs: what leaves first until so much is saved that the rest costs no more than a share of the whole."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from compressor.errors import PlanError

# (structure, layer, portions in the order in which they leave) → what is saved in all after each of them
Costs = Callable[[str, int, tuple[tuple[int, ...], ...]], Sequence[float]]
DUST = 1e-9  # of the whole: what rounding may be short of a target


@dataclass(frozen=True)
class Queue:
    """What can leave one layer, in order.

    `values`, `saved` and `shares` tell what has been lost and saved after each portion, and what share of the layer's
    heads or channels is gone.
    """

    structure: str
    index: int
    portions: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]
    saved: tuple[float, ...]
    shares: tuple[float, ...]

    def after(self, portions: int) -> tuple[float, float, float]:
        """(value lost, cost saved, share of the layer gone) after so many portions, as far as there are any."""
        last = min(portions, len(self.portions)) - 1
        return (0.0, 0.0, 0.0) if last < 0 else (self.values[last], self.saved[last], self.shares[last])


def queue_of(
    structure: str, index: int, values: Sequence[float], portions: Sequence[tuple[int, ...]], costs: Costs
) -> Queue:
    """The queue of a layer whose units have such values, from portions in the order in which they leave."""
    lost = accumulate(math.fsum(values[unit] for unit in portion) for portion in portions)
    shares = (gone / len(values) for gone in accumulate(map(len, portions)))
    saved = costs(structure, index, tuple(portions)) if portions else ()
    return Queue(structure, index, tuple(portions), tuple(lost), tuple(saved), tuple(shares))


def aim(
    queues: Sequence[Queue], total: float, target: tuple[str, float], scope: str, *, in_loss: bool, allow_empty: bool
) -> tuple[dict[tuple[str, int], int], float]:
    """How many portions leave each queue so that a share of the cost is left, or less; and the share that is.

    With `in_loss` values add up and compare. Then scope "global" lets portions leave in ascending order of value ÷ cost
    saved, and "layer" takes equal numbers from every layer, those of the least value. Otherwise "global" takes as large
    a share of every layer and structure, and "layer" those numbers whose shares of both structures are closest.

    Args:
        queues: what can leave, layer by layer.
        total: the cost of the whole.
        target: (kind, share of `total` that may be left); the kind is for messages.
        scope: "global" or "layer".
        in_loss: whether values of different layers and structures compare.
        allow_empty: for messages: whether queues hold the last portion of a layer.

    Raises:
        PlanError: the target is out of reach; the message says what is not.
    """
    kind, share = target
    needed = (1 - share - DUST) * total
    most = math.fsum(queue.saved[-1] for queue in queues if queue.portions)
    if not any(queue.portions for queue in queues):
        raise PlanError("no layer has anything to spare: every one would lose its last portion")
    if most < needed:
        structures = " and ".join(dict.fromkeys(queue.structure for queue in queues))
        least = math.ceil(1000 * (1 - most / total)) / 1000
        down = "all gone" if allow_empty else "down to the last portion of every layer"
        raise PlanError(
            f"target_{kind} is {share:g}; with {structures} {down} {least:g} is the least; ask for {least:g} or more"
        )
    taken = _by_layer(queues, needed, in_loss) if scope == "layer" else _over_all(queues, needed, in_loss)
    saved = math.fsum(queue.after(taken[queue.structure, queue.index])[1] for queue in queues)
    return taken, 1 - saved / total


def _over_all(queues: Sequence[Queue], needed: float, in_loss: bool) -> dict[tuple[str, int], int]:
    """Portion after portion, from wherever it costs the least."""
    taken = {(queue.structure, queue.index): 0 for queue in queues}
    waiting = [(_urgency(queue, 0, in_loss), place) for place, queue in enumerate(queues) if queue.portions]
    heapq.heapify(waiting)
    saved = 0.0
    while waiting and saved < needed:
        _, place = heapq.heappop(waiting)
        queue = queues[place]
        taken[queue.structure, queue.index] += 1
        count = taken[queue.structure, queue.index]
        saved += queue.after(count)[1] - queue.after(count - 1)[1]
        if count < len(queue.portions):
            heapq.heappush(waiting, (_urgency(queue, count, in_loss), place))
    return taken


def _urgency(queue: Queue, count: int, in_loss: bool) -> float:
    """What decides when the next portion of a queue leaves; the lowest first."""
    value, saved, share = queue.after(count + 1)
    if not in_loss:
        return share
    before = queue.after(count)
    value, saved = value - before[0], saved - before[1]
    return value / saved if saved > 0 else math.copysign(math.inf, value)


def _by_layer(queues: Sequence[Queue], needed: float, in_loss: bool) -> dict[tuple[str, int], int]:
    """Equal numbers of portions from every layer, one number for each structure."""
    structures = list(dict.fromkeys(queue.structure for queue in queues))
    tables = [_table([queue for queue in queues if queue.structure == name]) for name in structures]
    if len(tables) == 1:
        tables.append([(0.0, 0.0, 0.0)])
    feasible: list[tuple[int, int]] = []
    for first, (_, gained, _) in enumerate(tables[0]):
        enough = [second for second, (_, more, _) in enumerate(tables[1]) if gained + more >= needed]
        if in_loss:
            feasible += [(first, second) for second in enough]
        elif enough and (not feasible or enough[0] < feasible[-1][1]):  # with a portion less of either, it is missed
            feasible.append((first, enough[0]))

    def cost(counts: tuple[int, int]) -> tuple[float, float]:
        rows = [table[count] for table, count in zip(tables, counts, strict=True)]
        shares = [share for _, _, share in rows]
        lost = math.fsum(value for value, _, _ in rows) if in_loss else abs(shares[0] - shares[1])
        return lost, math.fsum(saved for _, saved, _ in rows)

    best = min(feasible, key=cost)
    counts = dict(zip(structures, best, strict=False))
    return {(queue.structure, queue.index): min(counts[queue.structure], len(queue.portions)) for queue in queues}


def _table(queues: Sequence[Queue]) -> list[tuple[float, float, float]]:
    """(value lost, cost saved, mean share gone) after as many portions from every layer, from none on."""
    most = max((len(queue.portions) for queue in queues), default=0)
    rows = []
    for count in range(most + 1):
        lost, saved, share = zip(*(queue.after(count) for queue in queues), strict=True)
        rows.append((math.fsum(lost), math.fsum(saved), sum(share) / len(share)))
    return rows


def chosen(queues: Iterable[Queue], taken: Mapping[tuple[str, int], int], structure: str) -> dict[int, tuple[int, ...]]:
    """The units of a structure that leave, by layer."""
    found = {}
    for queue in queues:
        gone = [unit for portion in queue.portions[: taken[queue.structure, queue.index]] for unit in portion]
        if queue.structure == structure and gone:
            found[queue.index] = tuple(sorted(gone))
    return found
