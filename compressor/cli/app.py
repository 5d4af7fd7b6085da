"""The commands: flags in, one call of the pipeline, tables or JSON out. Heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from compressor.cli import options as o
from compressor.errors import Interrupted, RecipeError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # its parent, in whatever click Typer brings


class Commands(TyperGroup):
    """Commands whose misuse and interruption end as `main` says, not as Typer would print them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise RecipeError(f"{error.format_message()} (compress --help)") from error  # type: ignore[attr-defined]
        except KeyboardInterrupt as error:
            raise Interrupted from error


app = typer.Typer(
    name="compress",
    cls=Commands,
    help="Remove attention heads from a transformer, and learn honestly what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lightning-compressor {version('lightning-compressor')}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Remove attention heads from a transformer, and learn honestly what it cost."""


@app.command()
def score(
    model: o.Model = None,
    revision: o.Revision = None,
    task: o.Task = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    part: o.Part = None,
    samples: o.Samples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    symbol: o.Symbol = None,
    triple_layers: o.TripleLayers = None,
    order: o.Order = None,
    values: o.Values = None,
    coalitions: o.Coalitions = None,
    estimator: o.Estimator = None,
    bootstrap: o.Bootstrap = None,
    shuffles: o.Shuffles = None,
    memory_budget: o.MemoryBudget = None,
    until_stable: o.UntilStable = None,
    criterion: o.Criterion = None,
    ratio: o.Ratio = None,
    scope: o.Scope = None,
    unit: o.Unit = None,
    allow_empty: o.AllowEmpty = None,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Watch every head over calibration text and score it."""
    flags = _flags(locals())
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.scored(pipeline.score(**flags), json)


@app.command()
def prune(
    scores: o.ScoresDir = None,
    plan: o.PlanFile = None,
    model: o.Model = None,
    revision: o.Revision = None,
    task: o.Task = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    part: o.Part = None,
    samples: o.Samples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    criterion: o.Criterion = None,
    ratio: o.Ratio = None,
    target_flops: o.TargetFlops = None,
    target_params: o.TargetParams = None,
    target_latency: o.TargetLatency = None,
    structures: o.Structures = None,
    align: o.Align = None,
    rounds: o.Rounds = None,
    deployable: o.Deployable = None,
    scope: o.Scope = None,
    unit: o.Unit = None,
    allow_empty: o.AllowEmpty = None,
    repair: o.Repair = None,
    repeats: o.Repeats = None,
    prompt_length: o.PromptLength = None,
    export: o.Export = False,
    dry_run: o.DryRun = False,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove the lowest-scoring heads and channels from the weights; takes up the newest score run."""
    flags = _flags(locals())
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.pruned(pipeline.prune(**flags), json)


@app.command()
def recover(
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    model: o.Model = None,
    revision: o.Revision = None,
    task: o.Task = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    part: o.Part = None,
    train_samples: o.TrainSamples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    objective: o.Objective = None,
    hidden_weight: o.HiddenWeight = None,
    learning_rate: o.LearningRate = None,
    epochs: o.Epochs = None,
    max_minutes: o.MaxMinutes = None,
    eval_every: o.EvalEvery = None,
    lora: o.Lora = None,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a pruned model back towards the dense one; takes up the newest checkpoint."""
    flags = _flags(locals())
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.recovered(pipeline.recover(**flags), json)


@app.command()
def bench(
    model: o.Model = None,
    against: o.Against = None,
    scores: o.RivalScores = None,
    revision: o.Revision = None,
    task: o.Task = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    part: o.Part = None,
    eval_samples: o.EvalSamples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    random_seeds: o.RandomSeeds = None,
    repeats: o.Repeats = None,
    prompt_length: o.PromptLength = None,
    new_tokens: o.NewTokens = None,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a dense model against pruned ones and against random pruning."""
    flags = _flags(locals())
    flags["against"] = flags["against"] or ()
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.benched(pipeline.bench(**flags), json)


@app.command()
def run(
    model: o.Model = None,
    revision: o.Revision = None,
    task: o.Task = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    part: o.Part = None,
    samples: o.Samples = None,
    eval_samples: o.EvalSamples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    symbol: o.Symbol = None,
    triple_layers: o.TripleLayers = None,
    order: o.Order = None,
    values: o.Values = None,
    coalitions: o.Coalitions = None,
    estimator: o.Estimator = None,
    bootstrap: o.Bootstrap = None,
    shuffles: o.Shuffles = None,
    memory_budget: o.MemoryBudget = None,
    until_stable: o.UntilStable = None,
    criterion: o.Criterion = None,
    ratio: o.Ratio = None,
    target_flops: o.TargetFlops = None,
    target_params: o.TargetParams = None,
    target_latency: o.TargetLatency = None,
    structures: o.Structures = None,
    align: o.Align = None,
    rounds: o.Rounds = None,
    deployable: o.Deployable = None,
    scope: o.Scope = None,
    unit: o.Unit = None,
    allow_empty: o.AllowEmpty = None,
    repair: o.Repair = None,
    random_seeds: o.RandomSeeds = None,
    repeats: o.Repeats = None,
    prompt_length: o.PromptLength = None,
    new_tokens: o.NewTokens = None,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score, prune, export and bench in one go."""
    flags = _flags(locals())
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.ran(pipeline.run(**flags), json)


@app.command()
def paper(
    name: o.PaperModel = "gpt2",
    model: o.Model = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    samples: o.Samples = None,
    eval_samples: o.EvalSamples = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    symbol: o.Symbol = None,
    triple_layers: o.TripleLayers = None,
    random_seeds: o.RandomSeeds = None,
    repeats: o.Repeats = None,
    config: o.Config = None,
    output_dir: o.OutputDir = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Follow the protocol of arXiv 2605.09515, and say which of its figures hold."""
    flags = _flags(locals())
    _start(quiet)
    from compressor import pipeline
    from compressor.cli import show

    show.reproduced(pipeline.paper(**flags), json)


@app.command()
def models(name: o.ModelType = None, json: o.Json = False) -> None:
    """List which model types can be pruned, by which units, and why not."""
    from compressor import support
    from compressor.cli import matrix

    matrix.listed(support.support_matrix(name), json)


def _flags(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a verb from those of its command."""
    flags = {name: value for name, value in values.items() if name not in ("json", "quiet")}
    if flags.get("triple_layers") is not None:
        flags["triple_layers"] = _layers(flags["triple_layers"])
    for name in ("values", "coalitions", "structures"):
        if flags.get(name) is not None:
            flags[name] = flags[name].split(",")
    return flags


def _layers(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"--triple-layers is {text!r}; expected layer numbers such as 0,3, or 'none'") from None


def _start(quiet: bool) -> None:
    from compressor.console import show_logs

    show_logs(quiet)
