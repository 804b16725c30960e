"""The `losa` command. Thin: every command reads options, calls one function of the package and prints what it returned."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from losa.cli.options import AsJson, DryRun, KeepModels, Model, OutputOrFile, Overwrite, Request, Resume, requests
from losa.cli.serving import bench, chat, generate, push, serve
from losa.cli.storing import pack, round_, unpack
from losa.cli.terminal import OTHERS, err, heavy, out, quiet, say
from losa.system.signals import Interrupted, end_quietly, raised

if TYPE_CHECKING:
    from losa.config import LosaConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Sparse language models with their quality recovered (dynamic low-rank sparse adaptation).

    Start with `losa demo`. Then `losa plan MODEL` to see what a run needs, and `losa run MODEL --data TEXT --output DIR`.""",
)


def _version(asked: bool) -> None:
    if asked:
        from losa import __version__

        say(f"losa {__version__}")
        raise typer.Exit


@app.callback()
def losa(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What all commands share."""


@app.command()
@requests()
def run(
    *,
    model: Model = None,
    output: OutputOrFile = None,
    request: Request,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Prune MODEL, train what is left under the mask, save a sparse checkpoint that transformers opens as it is.

    Example: `losa run meta-llama/Llama-2-7b-hf --sparsity 0.7 --data alpaca.json --output llama-sparse`

    Several GPUs: `torchrun --nproc-per-node 8 -m losa run ...`, or `accelerate launch -m losa run ...`; the same result, sooner.
    """
    resolved = request.resolve(needs=("model", "output"), model=model, output=output and str(output))
    (_rehearse if dry_run else _make)(resolved, training=True, resume=resume, overwrite=overwrite)


def _make(config: "LosaConfig", training: bool, resume: bool, overwrite: bool) -> None:
    """What `run` and `prune` do once they know what is wanted."""
    from losa import api
    from losa.cli.tables import summary
    from losa.data import read_run
    from losa.models import load
    from losa.session import check_request
    from losa.system.output import claim

    with claim(config.output):
        check_request(config, training=training, resume=resume, overwrite=overwrite)
        heavy()
        texts = read_run(config, training)
        make = api.run if training else api.prune
        sparse = make(*load(config), config, data=texts, resume=resume, overwrite=overwrite, claimed=True)
    out.print(summary(sparse.losa_record))
    say(f"saved and verified: {config.output}")


def _rehearse(config: "LosaConfig", training: bool, resume: bool, overwrite: bool) -> None:
    """`--dry-run`."""
    from losa.cli.tables import rehearsal
    from losa.planning.rehearsal import rehearse
    from losa.session import check_request

    check_request(config, training=training, resume=resume, overwrite=overwrite)
    quiet()
    out.print(rehearsal(rehearse(config, training)))


@app.command()
@requests()
def prune(
    *,
    model: Model = None,
    output: OutputOrFile = None,
    request: Request,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Prune MODEL once, at one rate for all layers, without training: the baselines to compare with.

    `--set rates=dlp` gives layers their own rates. Perplexity is over the first 16 windows, which takes less time
    than pruning does; `losa eval OUTPUT --data TEXT` measures over all.
    """
    resolved = request.resolve("one-shot", ("model", "output"), model=model, output=output and str(output))
    (_rehearse if dry_run else _make)(resolved, training=False, resume=resume, overwrite=overwrite)


@app.command()
@requests()
def compare(
    request: Request,
    model: Annotated[
        str | None, typer.Argument(help="Local directory or hub name; `run.model` of the config when not given.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of rows, tables and plots.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; all when not given: dense, magnitude, wanda, sparsegpt, alps, alps-int8, alps-int4, "
            "wanda-lora, sparsegpt-lora, wanda-masked-lora, sparsegpt-masked-lora, wanda-losa, sparsegpt-losa, "
            "losa-without-layer-rates, "
            "losa-without-rank-allocation, losa-without-dynamic-steps, masked-full-fine-tuning, losa, losa-int8, losa-int4, "
            "gptq-8-bit, gptq-4-bit, gptq-3-bit, gptq-2-bit, and the last three with -training."
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Sparsities and patterns, such as `0.5,0.7,2:4`; --sparsity or --pattern is one of them.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as `0,1,2`: the table then shows mean and spread. Default 0.")] = None,
    speed: Annotated[
        bool | None, typer.Option("--speed", help="Also measure tokens per second, packed and dense in turns.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Also measure accuracy, as `losa eval --tasks` does.")] = None,
    task_data: Annotated[str | None, typer.Option(help="Folder with the tasks' data, instead of the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items of each task.")] = None,
    keep_models: KeepModels = None,
) -> None:
    """One table of methods on one model, on the same texts, tokens and seeds: dense; magnitude, Wanda, SparseGPT and ALPS, pruned
    only; Wanda and SparseGPT with LoRA (merged, so dense again), with masked LoRA (one shot, uniform) and with the paper's LoSA;
    that without each of its parts; full fine-tuning under the mask; what `losa run` does by default; and dense models of few bits
    (GPTQ). With what each takes in bytes.

    Rows that are there are not made again, so a comparison that was stopped goes on. Writes a CSV file, tables in Markdown and
    LaTeX, and plots of quality against bytes, speed, time and sparsity; ends with what to use for which quality.
    The config is one of a comparison; see configs/experiments. What a method is made of wins over options.

    Example: `losa compare novels-4m --data novels.txt --targets 0.5,0.7 --seeds 0,1,2 --set train.tokens=100000 -o comparison`
    """
    from losa.cli.tables import comparison_table
    from losa.comparison import CompareConfig
    from losa.comparison import compare as compare_methods
    from losa.report.pareto import recommendations

    keys = ({"model": model} if model else {}) | request.overrides
    one = {name: keys.pop(name, None) for name in ("sparsity", "pattern", "seed")}
    target = one["pattern"] if ":" in str(one["pattern"]) else one["sparsity"]
    resolved = CompareConfig.load(
        str(request.config) if request.config else None, keys, request.preset,
        output=str(output) if output else None, methods=methods,
        targets=targets or (None if target is None else str(target)),
        seeds=seeds or (None if one["seed"] is None else str(one["seed"])), speed=speed,
        tasks=tasks, task_data=task_data, limit=limit, keep_models=keep_models,
    )  # fmt: skip
    heavy(logging.WARNING)
    logging.getLogger("losa.comparison").setLevel(logging.INFO)
    rows = compare_methods(resolved)
    out.print(comparison_table(rows))
    for line in recommendations(rows):
        say(line)
    say(f"tables and plots: {resolved.output}")


@app.command(name="eval")
@requests("windows", "dtype", "device", "seed", "trust_remote_code", "skip_bad_records")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name: dense, sparse or packed.")],
    request: Request,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: file, directory, hub dataset, or `wikitext2`, `ptb`, `c4` as pruning papers read them. "
            "Not given, and no --tasks: what the model's run used."
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="The same as --data, by the name that `losa run` has for it.")] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Window in tokens; may be given several times. By default 2048 and 4096 as far as the model allows, or, of a "
            "text that the run held out, the run's.",
        ),
    ] = None,
    words: Annotated[
        bool,
        typer.Option("--words", help="Word perplexity too, as lm-eval defines it: of the whole text, whatever --windows is."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="`paper`, the LoSA paper's seven with rte and lambada_openai, or names of lm-eval's tasks, separated by commas."
        ),
    ] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with the tasks' data, instead of the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items of each task: a quick look.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the result in MODEL's directory, as `eval.json`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a checkpoint on a text, and its accuracy on tasks, without examples in the prompt.

    Perplexity by token is over windows of a named length, as pruning papers report it; `--words` adds lm-eval's, by word. Tasks
    and words are measured by lm-eval: `pip install ".[eval]"`, in a clone. The mean accuracy is over the paper's seven tasks.
    Of a --config or --set, what says what is measured counts: `eval.data`, `eval.length`, `eval.windows`, `dtype`, `device`.

    Example: `losa eval llama-sparse --data wikitext2 --tasks paper --save`
    """
    from losa.cli.tables import evaluation_tables
    from losa.evaluation.checkpoint import RecordedText, check_savable, evaluate_checkpoint, recorded_text, save_results
    from losa.evaluation.zeroshot import task_names
    from losa.system.output import claim

    given: dict[str, Any] = {"model": model, "eval.data": data or eval_data}
    config = request.resolve(**given)
    config.model = model  # that of a --config is another one, most likely the dense one
    config.output = None  # nothing is made: a packed checkpoint may be read
    text: str | RecordedText | None = config.eval.data
    lengths = length or ([config.eval.length] if config.eval.length else [])
    names = task_names(tasks) if tasks is not None else []
    if save:
        check_savable(model)
    with claim(model if save else None):
        if text is None and not names:
            text = recorded_text(model)
        heavy()
        result = evaluate_checkpoint(config, text, lengths, config.eval.windows, words, names, task_data, limit)
        out.print_json(data=result) if as_json else out.print(evaluation_tables(result, out.width))
        if save:  # after it was printed: what was measured is not lost where this fails
            say(f"kept in {save_results(model, result)}", err)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer instead of one a block.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sparsity per block or layer, straight from the safetensors, without loading the model."""
    from losa.cli.tables import sparsity_json, sparsity_table
    from losa.commands.inspect import inspect as read

    found = read(directory)
    out.print_json(data=sparsity_json(found)) if as_json else out.print(sparsity_table(found, layers))


@app.command()
@requests()
def plan(
    *,
    model: Model = None,
    request: Request,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the result would go; its disk is checked.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="As many as torchrun would start, on a device each.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GiB of a device elsewhere, to plan for that one.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that it sustains.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Memory, time and disk of a run, before anything is loaded. Exit status 1 if it cannot fit.

    Takes what `losa run` takes, so that a command is planned by changing its verb; texts, --resume, --overwrite and --dry-run
    change nothing.
    Times come from trying one decoder block of random weights for a few seconds; with --memory or --tflops, from its flops.

    Example: `losa plan meta-llama/Llama-2-70b-hf --processes 8 --shard --memory 80 --tflops 300`
    """
    from losa.cli.tables import plan_table
    from losa.planning.plan import plan as make_plan

    resolved = request.resolve(needs=("model",), model=model, output=output and str(output))
    for name, value in (("--memory", memory), ("--tflops", tflops)):
        if value is not None and not 0.001 <= value < 1e9:  # nor not a number
            raise ValueError(f"{name} is {value}, expected what a machine could have")
    with err.status("looking at the model, and trying a block of it"):
        made = make_plan(resolved, processes, int(memory * 2**30) if memory else None, tflops * 1e12 if tflops else None)
    out.print_json(data=made.to_dict()) if as_json else out.print(plan_table(made))
    if not made.fits:
        raise typer.Exit(1)


app.command(name="round")(round_)
for _verb in (pack, unpack, generate, chat, serve, bench, push):
    app.command()(_verb)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Write `report.html` and the model card of a run anew, with what was measured since.

    Every `losa run` and `losa prune` leaves both; the page opens offline, in any browser.
    """
    from losa.report.page import refresh
    from losa.system.output import claim

    with claim(directory if directory.is_dir() else None):
        say(f"report: {refresh(directory)}")


@app.command()
def doctor() -> None:
    """Versions, devices, and a five-second self-test of the whole method on a toy model."""
    from losa.cli.tables import pairs
    from losa.commands.doctor import environment, self_test

    heavy(logging.WARNING)
    out.print(pairs("environment", environment()))
    out.print(pairs("self-test: passed", {key: f"{value:.4f}" for key, value in self_test().items()}))


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the sparse checkpoint here.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """A small real Llama pruned to 70 % and recovered, offline, in two or three minutes on two CPU cores."""
    from losa.cli.tables import pairs, summary
    from losa.commands.demo import PROMPT
    from losa.commands.demo import demo as run_demo

    heavy(logging.WARNING)
    result = run_demo(str(output) if output else None, overwrite)
    out.print(summary(result.record))
    out.print(pairs(f'samples, prompt: "{PROMPT}"', result.samples))
    if output:
        say(f"saved and verified: {output}")


def main() -> None:
    """Entry point. What a user got wrong is one line on stderr and exit status 2, without a traceback; a signal is one line and
    128 plus its number."""
    end_quietly()
    try:
        with raised():
            app()
    except Interrupted as stopped:
        name = signal.Signals(stopped.number).name
        if not OTHERS:
            told = "nothing half-written is left. losa run and losa prune go on with --resume, other commands start anew"
            say(f"stopped by {name}; {told}", err)
        sys.exit(128 + stopped.number)
    except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        from losa.system.doors import out_of_memory, printable

        said, no_memory = str(error), out_of_memory(error)
        if os.environ.get("LOSA_DEBUG") or (isinstance(error, RuntimeError) and not no_memory):
            raise
        if no_memory and type(error).__name__ != "OutOfMemoryError":  # that one names what to lower
            said = f"out of memory: {' '.join(said.split()) or 'no more to be had'}; losa plan shows what a run needs"
        err.print(f"[bold red]error:[/] {escape(printable(said))}", highlight=False, soft_wrap=True)
        sys.exit(2)
