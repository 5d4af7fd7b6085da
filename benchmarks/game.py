"""What counting and playing the game costs on bare arrays: processor time in one process with one thread.

    python -m pip install infomeasure
    OMP_NUM_THREADS=1 python benchmarks/game.py

Three comparisons on seeded synthetic heads: all pairs and triples of 12 heads beside `np.unique` for every coalition
and beside infomeasure; the exact Shapley values of such a layer; and all pairs of 22 layers of 32 heads as a scoring
epoch counts them, beside the forward pass of that model (TinyLlama's shape), extrapolated from single layers with
random weights. Writes benchmarks/results/game.json.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path

import infomeasure
import numpy as np
import torch
from clock import interleaved, ratios, spread
from transformers import LlamaConfig, LlamaModel

from compressor.console import log, show_logs
from compressor.environment import machine, versions
from compressor.files import to_json
from compressor.game import pair_entropies, shapley_values, triple_entropies
from compressor.game.counts import PairHistogram

TARGET = Path(__file__).parent / "results" / "game.json"
ALPHABET = 256
HEADS, LAYERS, GROUPED, BATCH = 32, 22, 4, (4, 256)  # TinyLlama's shape, and its batches


def heads(count: int, observations: int, seed: int) -> np.ndarray:
    """Symbols [observations, heads] of heads that follow one another by half, with Zipf-like alphabets."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, ALPHABET + 1)
    own = rng.choice(ALPHABET, (observations, count), p=shares / shares.sum())
    for head in range(1, count):
        own[:, head] = np.where(rng.random(observations) < 0.5, own[:, head - 1], own[:, head])
    return own


def by_unique(symbols: np.ndarray) -> np.ndarray:
    """Joint entropies of all pairs and all triples, an `np.unique` for each."""
    found = []
    for size in (2, 3):
        for coalition in combinations(range(symbols.shape[1]), size):
            joint = np.ravel_multi_index(tuple(symbols[:, head] for head in coalition), (ALPHABET,) * size)
            shares = np.unique(joint, return_counts=True)[1] / len(joint)
            found.append(-(shares * np.log(shares)).sum())
    return np.array(found)


def by_infomeasure(symbols: np.ndarray) -> np.ndarray:
    """The same by infomeasure."""
    columns = list(symbols.T.copy())
    coalitions = [part for size in (2, 3) for part in combinations(columns, size)]
    return np.array([infomeasure.entropy(part, approach="discrete", base="e") for part in coalitions])


def by_compressor(symbols: np.ndarray) -> np.ndarray:
    """The same by this package."""
    pairs = pair_entropies(symbols)
    upper = torch.triu_indices(*pairs.shape, offset=1)
    return torch.cat([pairs[upper[0], upper[1]], triple_entropies(symbols)]).numpy()


def forward_seconds(repeats: int) -> list[float]:
    """Processor time of one forward pass of TinyLlama's shape over one batch, from single layers."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=HEADS, num_key_value_heads=GROUPED,
        num_hidden_layers=1, vocab_size=128,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    ids = torch.randint(128, BATCH)
    with torch.inference_mode():
        model(input_ids=ids)
        timed = interleaved({"layer": lambda: model(input_ids=ids, use_cache=False)}, repeats, time.process_time)
    return [LAYERS * seconds for seconds in timed["layer"]]


def count_epoch(batches: list[torch.Tensor]) -> None:
    """Count and evaluate one layer's pairs as a scoring epoch does."""
    histogram = PairHistogram.of(HEADS, ALPHABET, dense=True)
    for batch in batches:
        histogram.update(batch)
    histogram.statistics()


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    show_logs(quiet=False)
    torch.manual_seed(0)

    symbols = heads(12, args.observations, seed=0)
    ways = {"compressor": by_compressor, "np.unique": by_unique, "infomeasure": by_infomeasure}
    answers = {name: way(symbols) for name, way in ways.items()}
    slow = {"infomeasure": lambda: by_infomeasure(symbols)}
    seconds = interleaved(
        {name: (lambda way=way: way(symbols)) for name, way in ways.items() if name not in slow},
        args.repeats,
        time.process_time,
    )
    seconds |= interleaved(slow, 1, time.process_time)
    shapley = interleaved({"shapley": lambda: shapley_values(symbols)}, args.repeats, time.process_time)["shapley"]

    wide = torch.from_numpy(heads(HEADS, args.observations, seed=1))
    batches = list(wide.split(BATCH[0] * BATCH[1]))
    counting = interleaved({"layer": lambda: count_epoch(batches)}, args.repeats, time.process_time)["layer"]
    counting = [LAYERS * layer for layer in counting]
    forward = [len(batches) * batch for batch in forward_seconds(args.repeats)]

    document = {
        "suite": "game",
        "coalitions": {
            "heads": symbols.shape[1],
            "count": len(answers["compressor"]),
            "seconds": {name: spread(found) for name, found in seconds.items()},
            "to_compressor": {
                "np.unique": ratios(seconds["np.unique"], seconds["compressor"]),
                "infomeasure": seconds["infomeasure"][0] / spread(seconds["compressor"])["median"],
            },
            "largest_difference": {
                name: float(np.abs(found - answers["compressor"]).max()) for name, found in answers.items()
            },
        },
        "shapley": {"heads": symbols.shape[1], "seconds": spread(shapley)},
        "epoch": {
            "layers": LAYERS,
            "heads": HEADS,
            "counting_seconds": spread(counting),
            "forward_seconds": spread(forward),
            "counting_to_forward": ratios(counting, forward),
        },
        "settings": {
            **vars(args),
            "alphabet": ALPHABET,
            "batch": BATCH,
            "infomeasure": infomeasure.__version__,
            "numpy": np.__version__,
        },
        "machine": machine(),
        "versions": versions(),
    }
    TARGET.write_text(to_json(document), encoding="utf-8")
    log.info(f"written: benchmarks/results/{TARGET.name}")


if __name__ == "__main__":
    main()
