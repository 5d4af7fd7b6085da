"""The flags, each defined once: the same flag means the same in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL, _TEXT, _PRUNING, _MEASURING, _OUTPUT = "Model", "Text", "Pruning", "Measuring", "Output"
_TRAINING = "Training"

Model = Annotated[
    str | None, typer.Option(help="Hub id, local directory, or 'embedded'.", rich_help_panel=_MODEL, show_default=False)
]
ModelType = Annotated[
    str | None,
    typer.Argument(help="A model type, as config.json has it, or a class.  [default: all]", show_default=False),
]
PaperModel = Annotated[str, typer.Argument(help="A model of the paper's: gpt2, bert or tinyllama.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)]
Task = Annotated[str | None, typer.Option(help="causal or masked.  [default: from the config]", rich_help_panel=_MODEL)]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps …  [default: auto]", rich_help_panel=_MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, stored, float32, bfloat16, float16, float64.  [default: auto]", rich_help_panel=_MODEL),
]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_MODEL)
]
Data = Annotated[
    str | None,
    typer.Option(
        help="gsm8k, embedded, owner/name[:config] on the hub, a .jsonl, .txt or .parquet file, or a directory with "
        "train.* and test.*.  [default: gsm8k; for the embedded model its corpus]",
        rich_help_panel=_TEXT,
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(help="What to report on.  [default: the test split of --data]", rich_help_panel=_TEXT),
]
Part = Annotated[str | None, typer.Option(help="question, answer or both.  [default: both]", rich_help_panel=_TEXT)]
Samples = Annotated[
    int | None, typer.Option(help="Calibration documents, 0 for all.  [default: 500]", rich_help_panel=_TEXT)
]
EvalSamples = Annotated[
    int | None, typer.Option(help="Evaluation documents, 0 for all.  [default: 200]", rich_help_panel=_TEXT)
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per batch.  [default: 8]", rich_help_panel=_TEXT)]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens per sequence.  [default: the model's context, 2048 at most]", rich_help_panel=_TEXT),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw.  [default: 0]", rich_help_panel=_TEXT)]
Symbol = Annotated[
    str | None,
    typer.Option(help="What is counted: key, offset or sequence.  [default: key]", rich_help_panel="Scoring"),
]
TripleLayers = Annotated[
    str | None,
    typer.Option(help="Layers with triple dividends, such as 0,3, or 'none'.  [default: 0]", rich_help_panel="Scoring"),
]
Order = Annotated[
    int | None,
    typer.Option(help="Size of the largest coalitions in those layers.  [default: 3]", rich_help_panel="Scoring"),
]
Values = Annotated[
    str | None,
    typer.Option(
        help="Further values of all heads: third-order, shapley, eta, marginal, loss-game, taylor, fisher, loo, "
        "activation, fluctuation.  [default: none]",
        rich_help_panel="Scoring",
    ),
]
Coalitions = Annotated[
    str | None,
    typer.Option(
        help="Single coalitions of layer.head, also across layers, such as 0.1+0.5,0.1+3.2.", rich_help_panel="Scoring"
    ),
]
Estimator = Annotated[
    str | None,
    typer.Option(
        help="plug-in, miller-madow, grassberger, chao-shen or chao-wang-jost.  [default: plug-in]",
        rich_help_panel="Scoring",
    ),
]
Bootstrap = Annotated[
    int | None,
    typer.Option(help="Resamples of the documents, for intervals on φ.  [default: 100]", rich_help_panel="Scoring"),
]
Shuffles = Annotated[
    int | None,
    typer.Option(
        help="Shuffles to test the signs of triples with, such as 99.  [default: 0]", rich_help_panel="Scoring"
    ),
]
MemoryBudget = Annotated[
    float | None,
    typer.Option(
        help="GiB for counts, and for symbols.  [default: a quarter of what is free]", rich_help_panel="Scoring"
    ),
]
UntilStable = Annotated[
    bool | None,
    typer.Option(
        "--until-stable",
        help="Stop scoring when the heads that φ (or --criterion entropy or second-order) removes at --ratio stay the "
        "same.",
        rich_help_panel="Scoring",
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="gt-fep (φ), entropy, second-order, third-order, eta, shapley, marginal, loss-game, taylor, fisher, loo, "
        "activation, fluctuation, bos-sink, magnitude or random.  "
        "[default: loss-game]",
        rich_help_panel=_PRUNING,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of heads (or channels) to remove, rounded up.  [default: 0.2]", rich_help_panel=_PRUNING),
]
TargetFlops = Annotated[
    float | None,
    typer.Option(help="Share of the FLOPs to leave, instead of --ratio.", rich_help_panel=_PRUNING),
]
TargetParams = Annotated[
    float | None,
    typer.Option(help="Share of the parameters to leave, instead of --ratio.", rich_help_panel=_PRUNING),
]
TargetLatency = Annotated[
    float | None,
    typer.Option(help="Share of a prefill's seconds to leave, timed on this machine.", rich_help_panel=_PRUNING),
]
Structures = Annotated[
    str | None,
    typer.Option(
        help="heads, channels (of MLPs) or heads,channels.  [default: heads; for a target all that have scores]",
        rich_help_panel=_PRUNING,
    ),
]
Align = Annotated[
    int | None,
    typer.Option(
        help="What stays of an MLP is a multiple of so many channels.  [default: 8]", rich_help_panel=_PRUNING
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Rounds of pruning: a part leaves, the rest is repaired, the loss is asked again.  [default: 1]",
        rich_help_panel=_PRUNING,
    ),
]
Deployable = Annotated[
    bool | None,
    typer.Option(
        "--deployable", help="As much from every layer and group, so that stock code runs it.", rich_help_panel=_PRUNING
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="A plan, from --dry-run --json or plan.json: removed as it is.", rich_help_panel="Input"
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Share of every layer, or of the whole model: layer or global.  [default: layer; for a target global]",
        rich_help_panel=_PRUNING,
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(
        help="What leaves at one time: a head, one query head of every group that shares keys (query), or a group with "
        "its keys.  [default: head]",
        rich_help_panel=_PRUNING,
    ),
]
Repair = Annotated[
    bool | None,
    typer.Option(
        "--repair/--no-repair",
        help="Refit the maps that lose inputs, on the text that was scored.  [default: repair]",
        rich_help_panel=_PRUNING,
    ),
]
AllowEmpty = Annotated[
    bool | None,
    typer.Option("--allow-empty", help="Let a layer lose its last head.", rich_help_panel=_PRUNING),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="A pruned checkpoint.  [default: the newest]", rich_help_panel="Input"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted recovery.", rich_help_panel="Input")]
Objective = Annotated[
    str | None,
    typer.Option(help="distill (towards the dense model) or loss.  [default: distill]", rich_help_panel=_TRAINING),
]
HiddenWeight = Annotated[
    float | None,
    typer.Option(help="Weight of the hidden states' mean squared difference.  [default: 0]", rich_help_panel=_TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Of AdamW, at its highest.  [default: 0.05 / width; ten times that for adapters]",
        rich_help_panel=_TRAINING,
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the text.  [default: 3]", rich_help_panel=_TRAINING)]
MaxMinutes = Annotated[
    float | None,
    typer.Option(help="End after so many minutes, 0 for no limit.  [default: 10]", rich_help_panel=_TRAINING),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(help="Steps between held-out evaluations.  [default: 50]", rich_help_panel=_TRAINING),
]
TrainSamples = Annotated[
    int | None, typer.Option(help="Training documents, 0 for all.  [default: 0]", rich_help_panel=_TEXT)
]
Lora = Annotated[
    int | None,
    typer.Option(help="Train adapters of this rank, and merge them.  [default: none]", rich_help_panel=_TRAINING),
]
RandomSeeds = Annotated[
    int | None, typer.Option(help="Draws of random pruning.  [default: 5]", rich_help_panel=_MEASURING)
]
Repeats = Annotated[int | None, typer.Option(help="Timed repeats.  [default: 5]", rich_help_panel=_MEASURING)]
PromptLength = Annotated[
    int | None, typer.Option(help="Tokens of prefill.  [default: 128]", rich_help_panel=_MEASURING)
]
NewTokens = Annotated[int | None, typer.Option(help="Tokens to decode.  [default: 32]", rich_help_panel=_MEASURING)]
ScoresDir = Annotated[
    Path | None, typer.Option("--scores", help="A score run.  [default: the newest]", rich_help_panel="Input")
]
RivalScores = Annotated[
    Path | None,
    typer.Option("--scores", help="A score run of --model: measure the other criteria too.", rich_help_panel="Input"),
]
Against = Annotated[
    list[Path] | None,
    typer.Option(help="A pruned checkpoint; may be repeated.  [default: the newest]", rich_help_panel="Input"),
]
Export = Annotated[bool, typer.Option("--export", help="Write the slimmer checkpoint.", rich_help_panel=_OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.", rich_help_panel=_OUTPUT)]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML recipe; flags override it.", rich_help_panel="Input")
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Where to write.  [default: runs/<model>/…]", rich_help_panel=_OUTPUT),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an earlier result in --output-dir.", rich_help_panel=_OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no log but warnings.", rich_help_panel=_OUTPUT)
]
