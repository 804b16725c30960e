"""The `losa` command. Thin: every command reads options, calls one function of the package and prints what it returned."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from losa.signals import Interrupted, end_quietly, raised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from losa.config import LosaConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Sparse language models with their quality recovered (dynamic low-rank sparse adaptation).

    Start with `losa demo`. Then `losa plan MODEL` to see what a run needs, and `losa run MODEL --data TEXT --output DIR`.""",
)
_others = os.environ.get("RANK", "0") != "0"  # under torchrun, only the first process speaks
out, err = Console(quiet=_others), Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Local directory or hub name of a causal language model.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Training text or conversations: a file (.txt, .md, .json, .jsonl, .ndjson, .csv, .parquet, also .gz or .zst), a "
        "directory of them, or a hub dataset, `name[:config[:split]]`."
    ),
]
Calibration = Annotated[str | None, typer.Option(help="Calibration text; the training text when not given.")]
EvalData = Annotated[str | None, typer.Option(help="Text to measure perplexity on; a held-out part of --data when not given.")]
SkipBad = Annotated[
    bool | None,
    typer.Option("--skip-bad-records", help="Leave out records that are damaged or lack text or an answer, and say how many."),
]
Sparsity = Annotated[float | None, typer.Option(help="Ratio of zeros in the decoder's linear layers. The one dial. Default 0.7.")]
PrunerName = Annotated[
    str | None,
    typer.Option(
        help="`alps` (default, recovers most), `sparsegpt`, `wanda` (fastest), `magnitude`, or `movement`: scores collected "
        "while the model trains."
    ),
]
Protect = Annotated[
    str | None, typer.Option(help="Blocks to leave dense, such as `0,5`; the others lose more, to the same total.")
]
PatternName = Annotated[str | None, typer.Option(help="`unstructured` (default), or `n:m` such as `2:4` or `4:8`.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the sparse checkpoint.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of configuration keys.")]
SetKeys = Annotated[list[str] | None, typer.Option("--set", help="`key=value` for any other key, e.g. `--set train.lr=1e-3`.")]
Train = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="What is trained under the mask: `all` surviving weights (default, 16 more bytes a weight), or low-rank `adapters`, "
        "as in the paper. `losa plan` shows the memory of either.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Start from a shipped configuration: `quick`, a short run; `paper`, the released recipe."),
]
Device = Annotated[str | None, typer.Option(help="`auto` (default), `cpu` or `cuda`.")]
Offload = Annotated[bool | None, typer.Option("--offload", help="Calibrate with one block at a time on the device.")]
Shard = Annotated[
    bool | None, typer.Option("--shard", help="Under torchrun: spread the weights over all GPUs while training (FSDP2).")
]
Distill = Annotated[
    float | None,
    typer.Option(help="Weight of the KL to the dense model, 0..1; the rest is cross-entropy. Default 0.5."),
]
Seed = Annotated[int | None, typer.Option(help="Of everything random. Default 0.")]
Trust = Annotated[bool | None, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what losa wrote there earlier; files of others beside it stay.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def run(
    model: Model,
    output: Output,
    sparsity: Sparsity = None,
    data: Data = None,
    calibration: Calibration = None,
    eval_data: EvalData = None,
    skip_bad_records: SkipBad = None,
    pruner: PrunerName = None,
    pattern: PatternName = None,
    protect: Protect = None,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: SetKeys = None,
    train: Train = None,
    distill: Distill = None,
    device: Device = None,
    offload: Offload = None,
    shard: Shard = None,
    seed: Seed = None,
    trust_remote_code: Trust = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what a stopped or killed run left in --output.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune MODEL, train what is left under the mask, save a sparse checkpoint that transformers opens as it is.

    Example: `losa run meta-llama/Llama-2-7b-hf --sparsity 0.7 --data alpaca.json --output llama-sparse`

    Several GPUs: `torchrun --nproc-per-node 8 -m losa run ...`, or `accelerate launch -m losa run ...`; the same result, sooner.
    """
    from losa.data import read_run
    from losa.method import run as run_losa
    from losa.models import load
    from losa.output import claim
    from losa.report.table import summary
    from losa.session import check_request

    resolved = _config(
        preset, config, set_,
        model=model, output=str(output), sparsity=sparsity, pruner=pruner, pattern=pattern, protect=protect, device=device,
        offload=offload, shard=shard, seed=seed, trust_remote_code=trust_remote_code, skip_bad_records=skip_bad_records,
        **{"train.data": data, "train.weights": train, "train.distill": distill},
        **{"calibration.data": calibration, "eval.data": eval_data},
    )  # fmt: skip
    with claim(resolved.output):
        check_request(resolved, training=True, resume=resume, overwrite=overwrite)
        _heavy()
        texts = read_run(resolved, training=True)
        sparse = run_losa(*load(resolved), resolved, data=texts, resume=resume, overwrite=overwrite, claimed=True)
    out.print(summary(sparse.losa_record))
    _say(f"saved and verified: {output}")


@app.command()
def prune(
    model: Model,
    output: Output,
    sparsity: Sparsity = None,
    calibration: Calibration = None,
    eval_data: EvalData = None,
    skip_bad_records: SkipBad = None,
    pruner: PrunerName = None,
    pattern: PatternName = None,
    protect: Protect = None,
    config: ConfigFile = None,
    set_: SetKeys = None,
    device: Device = None,
    offload: Offload = None,
    seed: Seed = None,
    trust_remote_code: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Prune MODEL once, at one rate for all layers, without training: the baselines to compare with.

    `--set rates=dlp` gives layers their own rates. Perplexity is over the first 16 windows, which takes less time
    than pruning does; `losa eval OUTPUT --data TEXT` measures over all.
    """
    from losa.data import read_run
    from losa.method import prune as prune_once
    from losa.models import load
    from losa.output import claim
    from losa.report.table import summary
    from losa.session import check_request

    resolved = _config(
        "one-shot", config, set_,
        model=model, output=str(output), sparsity=sparsity, pruner=pruner, pattern=pattern, protect=protect, device=device,
        offload=offload, seed=seed, trust_remote_code=trust_remote_code, skip_bad_records=skip_bad_records,
        **{"calibration.data": calibration, "eval.data": eval_data},
    )  # fmt: skip
    with claim(resolved.output):
        check_request(resolved, training=False, overwrite=overwrite)
        _heavy()
        texts = read_run(resolved, training=False)
        pruned = prune_once(*load(resolved), resolved, data=texts, overwrite=overwrite, claimed=True)
    out.print(summary(pruned.losa_record))
    _say(f"saved and verified: {output}")


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Argument(help="Local directory or hub name; `run.model` of the config when not given.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of rows, tables and plots.")] = None,
    data: Data = None,
    calibration: Calibration = None,
    eval_data: EvalData = None,
    skip_bad_records: SkipBad = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, comma-separated; all when not given.")] = None,
    targets: Annotated[str | None, typer.Option(help="Sparsities and patterns, such as `0.5,0.7,2:4`. Default 0.7.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as `0,1,2`: the table then shows mean and spread. Default 0.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of a comparison; see configs/.")] = None,
    set_: SetKeys = None,
    device: Device = None,
) -> None:
    """One table of methods on one model: the same texts, tokens and seeds for dense, magnitude, Wanda, SparseGPT, each with LoRA
    (merged, so dense again), with masked LoRA (one shot, uniform: the missing baseline), with LoSA whole and without each of its
    parts, and full fine-tuning under the mask.

    Rows that are there are not made again, so a comparison that was stopped goes on. Writes a CSV file, a Markdown table, plots.

    Example: `losa compare novels-4m --data novels.txt --targets 0.5,0.7 --seeds 0,1,2 --set train.tokens=100000 -o comparison`
    """
    from losa.comparison import CompareConfig
    from losa.comparison import compare as compare_methods
    from losa.config import parse_set
    from losa.report.table import comparison_table

    options: dict[str, Any] = {
        "model": model,
        "train.data": data,
        "calibration.data": calibration,
        "eval.data": eval_data,
        "device": device,
    }
    options["skip_bad_records"] = skip_bad_records
    shared = {key: value for key, value in options.items() if value is not None} | parse_set(set_ or [])
    resolved = CompareConfig.load(
        str(config) if config else None, shared,
        output=str(output) if output else None, methods=methods, targets=targets, seeds=seeds,
    )  # fmt: skip
    _heavy(logging.WARNING)
    logging.getLogger("losa.comparison").setLevel(logging.INFO)
    out.print(comparison_table(compare_methods(resolved)))
    _say(f"tables and plots: {resolved.output}")


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name: dense, sparse or packed.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: file, directory, hub dataset, or `wikitext2`, `ptb`, `c4` as pruning papers read them. "
            "Not given, and no --tasks: what the model's run used."
        ),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(min=2, help="Window in tokens; 2048 and 4096, or what it allows.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Use at most so many windows.")] = None,
    words: Annotated[bool, typer.Option("--words", help="Word perplexity of the text too, as lm-eval defines it.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="`paper`, the LoSA paper's seven with rte and lambada_openai, or names of lm-eval's tasks, separated by commas."
        ),
    ] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with the tasks' data, instead of the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items of each task: a quick look.")] = None,
    skip_bad_records: SkipBad = None,
    dtype: Annotated[str, typer.Option(help="`auto` (the checkpoint's), `float32`, `bfloat16`, `float16`.")] = "auto",
    device: Device = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the result in MODEL's directory, as `eval.json`.")] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = None,
) -> None:
    """Perplexity of a checkpoint on a text, and its accuracy on tasks, without examples in the prompt.

    Perplexity by token is over windows of a named length, as pruning papers report it; `--words` adds lm-eval's, by word. Tasks
    and words are measured by lm-eval: `pip install "losa[eval]"`. The mean accuracy is over the paper's seven tasks.

    Example: `losa eval llama-sparse --data wikitext2 --tasks paper --save`
    """
    from losa.evaluation.checkpoint import check_savable, evaluate_checkpoint, recorded_text, save_results
    from losa.evaluation.zeroshot import task_names
    from losa.output import claim
    from losa.report.table import evaluation_tables

    config = _config(
        None, None, None,
        model=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, skip_bad_records=skip_bad_records,
    )  # fmt: skip
    names = task_names(tasks) if tasks is not None else []
    if save:
        check_savable(model)
    with claim(model if save else None):
        text = recorded_text(model) if data is None and not names else data
        _heavy()
        result = evaluate_checkpoint(config, text, length or [], windows, words, names, task_data, limit)
        out.print_json(data=result) if as_json else out.print(evaluation_tables(result))
        if save:  # after it was printed: what was measured is not lost where this fails
            _say(f"kept in {save_results(model, result)}", err)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer instead of one a block.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sparsity per block or layer, straight from the safetensors, without loading the model."""
    from losa.inspect import inspect as read
    from losa.report.table import sparsity_json, sparsity_table

    found = read(directory)
    out.print_json(data=sparsity_json(found)) if as_json else out.print(sparsity_table(found, layers))


@app.command()
def plan(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the result would go; its disk is checked.")] = None,
    sparsity: Sparsity = None,
    pruner: PrunerName = None,
    pattern: PatternName = None,
    train: Train = None,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: SetKeys = None,
    device: Device = None,
    offload: Offload = None,
    shard: Shard = None,
    processes: Annotated[int, typer.Option(min=1, help="As many as torchrun would start, on a device each.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GiB of a device elsewhere, to plan for that one.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s that it sustains.")] = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = None,
) -> None:
    """Memory, time and disk of a run, before anything is loaded. Exit status 1 if it cannot fit.

    Times come from trying one decoder block of random weights for a few seconds; with --memory or --tflops, from its flops.

    Example: `losa plan meta-llama/Llama-2-70b-hf --processes 8 --shard --memory 80 --tflops 300`
    """
    from losa.plan import plan as make_plan
    from losa.report.table import plan_table

    resolved = _config(
        preset, config, set_,
        model=model, output=str(output) if output else None, sparsity=sparsity, pruner=pruner, pattern=pattern, device=device,
        offload=offload, shard=shard, trust_remote_code=trust_remote_code,
        **{"train.weights": train},
    )  # fmt: skip
    for name, value in (("--memory", memory), ("--tflops", tflops)):
        if value is not None and not value < 1e9:  # nor not a number
            raise ValueError(f"{name} is {value}, expected what a machine could have")
    made = make_plan(resolved, processes, int(memory * 2**30) if memory else None, tflops * 1e12 if tflops else None)
    out.print_json(data=made.to_dict()) if as_json else out.print(plan_table(made))
    if not made.fits:
        raise typer.Exit(1)


@app.command()
def pack(
    directory: Annotated[Path, typer.Argument(help="Directory of a sparse checkpoint.")],
    packed: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or see --overwrite.")],
    values: Annotated[
        str, typer.Option(help="`bfloat16` keeps every weight; `int8` and `int4` round them, with scales of rows or groups.")
    ] = "bfloat16",
    head: Annotated[
        str | None,
        typer.Option(help="The output head: `int8`, `int4`, or `keep` it dense. By default int8 where values are rounded."),
    ] = None,
    trust_remote_code: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Store a sparse checkpoint small: one bit for every weight, one number for every weight that is not zero.

    At 70 % zeros that is 0.36 of the dense linear layers (0.21 with int8 values, 0.15 with int4). `losa.load`, `losa generate`,
    `losa eval` and transformers with `losa.SparseConfig` run it packed; `losa unpack` gives the checkpoint back.
    """
    from losa.report.content import size
    from losa.runtime.files import pack_checkpoint

    _quiet()
    done = pack_checkpoint(directory, packed, values, bool(trust_remote_code), head, overwrite)
    _say(
        f"packed {done['layers']} layers, {done['sparsity']:.2%} zeros: "
        f"{size(done['dense_bytes'])} -> {size(done['packed_bytes'])}, {done['ratio']:.3f} of dense"
    )
    if done["head_bytes"]:
        _say(f"and the output head in {done['head']}: {size(done['head_bytes'])}")
    _say(f"saved and verified: {packed}")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="Directory of a packed checkpoint.")],
    directory: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or see --overwrite.")],
    trust_remote_code: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """The dense checkpoint of a packed one, with its zeros; bit for bit what was packed, for bfloat16 values."""
    from losa.runtime.files import unpack_checkpoint

    _quiet()
    _say(f"unpacked {unpack_checkpoint(packed, directory, bool(trust_remote_code), overwrite)} layers: {directory}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name: packed, sparse or dense.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is freer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw, when the temperature is not 0.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = None,
) -> None:
    """Continue a text, token by token.

    Example: `losa generate llama-packed --prompt "The old man looked at her and said"`
    """
    from losa.runtime.generate import check_wishes
    from losa.runtime.generate import generate as go_on

    check_wishes(prompt, tokens, temperature, seed)
    loaded, tokenizer = _served(model, device, trust_remote_code)
    _say(prompt, end="")

    def show(piece: str) -> None:
        _say(piece, end="")

    done = go_on(loaded, tokenizer, prompt, show, tokens, temperature, seed)
    out.print()
    err.print(f"{done.tokens} tokens in {done.seconds:.1f} s, {done.tokens / done.seconds:.1f} a second", highlight=False)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name: packed, sparse or dense.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; `0.0.0.0` lets other machines in, and asks for no key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    device: Device = None,
    trust_remote_code: Trust = None,
) -> None:
    """Serve MODEL to OpenAI's clients: chat, completions, streaming, many requests at a time; until SIGTERM or Ctrl-C.

    The name to ask for is MODEL as it is given here. Needs `pip install "losa[serve]"`.

    Example: `losa serve llama-packed`, then `curl localhost:8000/v1/completions -H "Content-Type: application/json" -d
    '{"model": "llama-packed", "prompt": "The old man", "max_tokens": 20}'`
    """
    from losa.serving.start import check_installed, listen
    from losa.serving.start import serve as answer

    check_installed()
    with listen(host, port) as listening:
        loaded, tokenizer = _served(model, device, trust_remote_code)
        place = f"[{host}]" if ":" in host else host
        _say(f"serving {model} at http://{place}:{listening.getsockname()[1]}/v1")
        answer(loaded, tokenizer, model, listening)
    _say("stopped")


@app.command()
def bench(
    directory: Annotated[Path, typer.Argument(help="Directory of a checkpoint, packed or not.")],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, random ones.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of every model; medians are shown.")] = 3,
    device: Device = None,
    as_json: AsJson = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures in DIRECTORY/bench.json, for `losa report`.")] = False,
) -> None:
    """Tokens per second, time to the first token and memory: sparse against dense, in this process, on a CPU or a GPU.

    Beside each speed stands the physical limit: one token reads every weight once, so memory bandwidth over bytes of weights.
    """
    from losa.checkpoint import BENCH, replace, to_json
    from losa.evaluation.checkpoint import check_savable
    from losa.output import claim
    from losa.report.table import bench_table
    from losa.runtime.bench import compare

    _huge_pages()
    if save:
        check_savable(directory, BENCH)
    _quiet(logging.WARNING)
    with claim(directory if save and directory.is_dir() else None):
        result = compare(directory, prompt, new, rounds, device or "auto")
        out.print_json(data=result) if as_json else out.print(bench_table(result))
        if save:
            replace(directory / BENCH, to_json(result, BENCH))


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Write `report.html` and the model card of a run anew, with what was measured since.

    Every `losa run` and `losa prune` leaves both; the page opens offline, in any browser.
    """
    from losa.output import claim
    from losa.report.page import refresh

    with claim(directory if directory.is_dir() else None):
        _say(f"report: {refresh(directory)}")


@app.command()
def doctor() -> None:
    """Versions, devices, and a five-second self-test of the whole method on a toy model."""
    from losa.doctor import environment, self_test
    from losa.report.table import pairs

    _heavy(logging.WARNING)
    out.print(pairs("environment", environment()))
    out.print(pairs("self-test: passed", {key: f"{value:.4f}" for key, value in self_test().items()}))


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the sparse checkpoint here.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """A small real Llama pruned to 70 % and recovered, offline, in two or three minutes on two CPU cores."""
    from losa.demo import PROMPT
    from losa.demo import demo as run_demo
    from losa.report.table import pairs, summary

    _heavy(logging.WARNING)
    result = run_demo(str(output) if output else None, overwrite)
    out.print(summary(result.record))
    out.print(pairs(f'samples, prompt: "{PROMPT}"', result.samples))
    if output:
        _say(f"saved and verified: {output}")


def _say(text: str, console: Console = out, end: str = "\n") -> None:
    """Prints a text as it is: not wrapped, so that paths can be copied, and nothing in it is markup or obeyed by the terminal."""
    from losa.doors import printable

    console.print(printable(text), end=end, highlight=False, markup=False, soft_wrap=True)


def _config(preset: str | None, path: Path | None, sets: list[str] | None, **options: Any) -> "LosaConfig":
    """Defaults < preset < file < options < --set."""
    from losa.config import LosaConfig, parse_set

    given = {key: value for key, value in options.items() if value is not None}
    return LosaConfig.load(str(path) if path else None, preset, given | parse_set(sets or []))


def _served(model: str, device: str | None, trust_remote_code: bool | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model to generate with, on its device, and its tokenizer."""
    _huge_pages()
    _quiet(logging.WARNING)
    from losa.environment import resolve_device
    from losa.models import load

    config = _config(None, None, None, model=model, device=device, trust_remote_code=trust_remote_code)
    place = resolve_device(config.device)
    loaded, tokenizer = load(config)
    return loaded.to(place), tokenizer


def _huge_pages() -> None:
    """torch's own large tensors in huge pages too; read by torch at its first allocation."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _heavy(level: int = logging.INFO) -> None:
    """Before work that takes minutes: memory settings for the CPU, quiet libraries, our own log lines from `level` up."""
    from losa.environment import keep_freed_memory

    keep_freed_memory()
    _quiet(level)


def _quiet(level: int = logging.INFO) -> None:
    """Quiet libraries, our own log lines from `level` up."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("losa").setLevel(logging.ERROR if _others else level)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's to fix


def main() -> None:
    """Entry point. What a user got wrong is one line on stderr and exit status 2, without a traceback; a signal is one line and
    128 plus its number."""
    end_quietly()
    try:
        with raised():
            app()
    except Interrupted as stopped:
        name = signal.Signals(stopped.number).name
        if not _others:
            _say(f"stopped by {name}; nothing half-written is left, and losa run goes on with --resume", err)
        sys.exit(128 + stopped.number)
    except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        from losa.doors import out_of_memory, printable

        said, no_memory = str(error), out_of_memory(error)
        if os.environ.get("LOSA_DEBUG") or (isinstance(error, RuntimeError) and not no_memory):
            raise
        if no_memory and type(error).__name__ != "OutOfMemoryError":  # that one names what to lower
            said = f"out of memory: {' '.join(said.split()) or 'no more to be had'}; losa plan shows what a run needs"
        err.print(f"[bold red]error:[/] {escape(printable(said))}", highlight=False, soft_wrap=True)
        sys.exit(2)
