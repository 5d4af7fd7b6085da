"""Two real processes that count and keep symbols, against one pass over what both saw: bit for bit."""

import os
import subprocess
import sys

import pytest
import torch

from compressor.game import pair_entropies
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def symbols(observations: int, heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, 4, (observations, heads), generator=generator)
    return own + torch.randint(0, 6, (observations, 1), generator=generator)


DEVICE = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from compressor.callbacks.tables import Observations, SymbolTable
from compressor.game.counts import DensePairs, SparsePairs

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
makers = {
    "dense": lambda: DensePairs(3, 9),
    "sparse": lambda: SparsePairs(3, 9),
    "table": lambda: SymbolTable(9),
    "spilled": lambda: SymbolTable(9, 40),
    "observations": Observations,
}
results = {}
for case, parts in torch.load(f"{folder}/parts.pt").items():
    for name, make in makers.items():
        metric, answers = make(), []
        for batches in parts[rank]:
            for batch in batches:
                metric.update(*batch[:, :2].unbind(1)) if name == "observations" else metric.update(batch)
            answers.append(metric.statistics() if name in ("dense", "sparse") else metric.compute())
        results[case, name] = [tuple(answer) if isinstance(answer, tuple) else answer for answer in answers]
        torch.save(results, f"{folder}/{rank}.pt")  # now, for a fault in what follows may end the process
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two real processes find, by (case, metric): after some batches, and once more after others."""
    folder = tmp_path_factory.mktemp("devices")
    rows = symbols(300, 3)
    first, second = rows[:200], rows[200:]
    cases = {
        "uneven": ((first[:30].split(11), second[:60].split(25)), (first[30:].split(50), second[60:].split(7))),
        "one idle": ((first.split(60), second.split(60)), ((), (rows[:0],))),
    }
    torch.save(cases, folder / "parts.pt")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", DEVICE, str(rank), str(folder)] for rank in (0, 1)]
    running = [
        subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()

    def found(case: str, name: str) -> list:
        """By rank, the answers after some batches and after all."""
        ranks = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
        assert all((case, name) in results for results in ranks), "".join(said)[-2000:]
        return [results[case, name] for results in ranks]

    return cases, found


CASES = pytest.mark.parametrize("case", ["uneven", "one idle"])


@CASES
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_two_processes_count_as_one(two_processes, case, name):
    """Merging does not stop the counting, and nothing is counted twice."""
    cases, found = two_processes
    seen = []
    for moment in (0, 1):
        seen += [batch for part in cases[case] for batch in part[moment]]
        for answers in found(case, name):
            entropies, _, observations = answers[moment]
            assert observations == len(torch.cat(seen))
            assert torch.equal(entropies, pair_entropies(torch.cat(seen)))


@CASES
@pytest.mark.parametrize("name", ["table", "spilled", "observations"])
def test_two_processes_keep_what_one_keeps(two_processes, case, name):
    """One device's rows after the other's."""
    cases, found = two_processes
    for moment in (0, 1):
        rows = torch.cat([batch for part in cases[case] for batches in part[: moment + 1] for batch in batches])
        for answers in found(case, name):
            assert torch.equal(answers[moment], rows[:, :2] if name == "observations" else rows)
