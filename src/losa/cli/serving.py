"""The verbs of `losa` that put a model to use: `generate`, `chat`, `serve`, `bench`, `push`. `losa.cli` registers them."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from losa.cli.options import AsJson, Device, Trust, configuration
from losa.cli.terminal import err, out, quiet, say
from losa.system.signals import ctrl_c_as_usual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from losa.runtime.generate import Generated


Served = Annotated[str, typer.Argument(help="Checkpoint directory or hub name: packed, sparse or dense.")]
Tokens = Annotated[int, typer.Option(min=1, help="At most so many new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is freer.")]
Draw = Annotated[int, typer.Option(help="Of the draw, when the temperature is not 0.")]


def generate(
    model: Served,
    prompt: Annotated[str, typer.Option(help="Text to continue, or what an instruct model is asked.")],
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Draw = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, whatever chat template there is.")] = False,
    device: Device = None,
    trust_remote_code: Trust = None,
) -> None:
    """Continue a text, token by token. A model with a chat template is asked in its form, and answers.

    Example: `losa generate llama-packed --prompt "The old man looked at her and said"`
    """
    from losa.runtime.generate import generate as go_on
    from losa.runtime.generate import is_chat
    from losa.runtime.sampling import check_arguments

    check_arguments(prompt, tokens, temperature, seed)
    loaded, tokenizer = _served(model, device, trust_remote_code)
    if raw or not is_chat(tokenizer):
        say(prompt, end="")
    with ctrl_c_as_usual():
        done = go_on(loaded, tokenizer, prompt, _show, tokens, temperature, seed, raw)
    out.print()
    _pace(done)


def chat(
    model: Served,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    seed: Draw = 0,
    device: Device = None,
    trust_remote_code: Trust = None,
) -> None:
    """Talk with an instruct model in turns, dense, sparse or packed. Answers stream.

    `/clear` forgets the turns, `/exit` or Ctrl-D ends; Ctrl-C ends an answer, and at the prompt the conversation. Questions can
    be piped, one a line. One that does not fit into the model's window is told of and forgotten.
    """
    from losa.runtime.generate import chat as converse
    from losa.runtime.sampling import check_arguments

    check_arguments("a question", tokens, temperature, seed)
    loaded, tokenizer = _served(model, device, trust_remote_code)

    def end(answer: "Generated") -> None:
        out.print()
        if sys.stdin.isatty():
            _pace(answer)

    wishes: dict[str, Any] = {"system": system, "tokens": tokens, "temperature": temperature, "seed": seed}
    with ctrl_c_as_usual():
        converse(loaded, tokenizer, _questions(), _show, **wishes, done=end, fail=lambda error: say(str(error), err))


def _questions() -> Iterator[str]:
    """Lines of the terminal, after a prompt, or of a pipe, until there are no more."""
    asked = "> " if sys.stdin.isatty() else ""
    if asked:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives the prompt a history and keys to edit with
    while True:
        try:
            yield input(asked)
        except (EOFError, KeyboardInterrupt):
            if asked:
                out.print()
            return


def _show(piece: str) -> None:
    say(piece, end="")


def _pace(done: "Generated") -> None:
    first = "" if done.first is None else f", the first after {done.first:.1f} s"
    rate = "" if done.rate is None else f", then {done.rate:.1f} a second"
    err.print(f"{done.tokens} tokens in {done.seconds:.1f} s{first}{rate}, by {done.road}", highlight=False, style="dim")


def serve(
    model: Served,
    host: Annotated[
        str, typer.Option(help="Address to listen on; `0.0.0.0` lets other machines in, and asks for no key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    device: Device = None,
    trust_remote_code: Trust = None,
) -> None:
    """Serve MODEL to OpenAI's clients: chat, completions, streaming, many requests at a time; until SIGTERM or Ctrl-C.

    The name to ask for is MODEL as it is given here. Needs `pip install ".[serve]"`, in a clone.

    Example: `losa serve llama-packed`, then `curl localhost:8000/v1/completions -H "Content-Type: application/json" -d
    '{"model": "llama-packed", "prompt": "The old man", "max_tokens": 20}'`
    """
    from losa.serving.start import check_installed, listen
    from losa.serving.start import serve as answer

    check_installed()
    with listen(host, port) as listening:
        loaded, tokenizer = _served(model, device, trust_remote_code)
        place = f"[{host}]" if ":" in host else host
        say(f"serving {model} at http://{place}:{listening.getsockname()[1]}/v1")
        answer(loaded, tokenizer, model, listening)
    say("stopped")


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
    from losa.cli.tables import bench_table
    from losa.evaluation.checkpoint import check_savable
    from losa.runtime.bench import compare
    from losa.system.output import BENCH, claim
    from losa.system.writing import replace, to_json

    _huge_pages()
    if save:
        check_savable(directory, BENCH)
    quiet(logging.WARNING)
    with claim(directory if save and directory.is_dir() else None):
        result = compare(directory, prompt, new, rounds, device or "auto")
        out.print_json(data=result) if as_json else out.print(bench_table(result))
        if save:
            replace(directory / BENCH, to_json(result, BENCH))


def push(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished checkpoint, packed or not.")],
    repository: Annotated[str, typer.Argument(help="Repository on the hub, `owner/name`; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees a repository that is made now.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; the main one when not given.")] = None,
) -> None:
    """Upload a checkpoint to the hub in one commit, with a card that says how it opens there. `hf auth login` signs in.

    Example: `losa push llama-packed someone/llama-sparse-70`
    """
    from losa.commands.push import files_to_push
    from losa.commands.push import push as upload
    from losa.report.content import size

    files = files_to_push(directory)
    say(f"{len(files)} files, {size(sum(file.stat().st_size for file in files))}")
    say(f"pushed: {upload(directory, repository, private, revision)}")


def _served(model: str, device: str | None, trust_remote_code: bool | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model to generate with, on its device, and its tokenizer."""
    _huge_pages()
    quiet(logging.WARNING)
    from losa.models import load
    from losa.system.environment import resolve_device

    config = configuration(model=model, device=device, trust_remote_code=trust_remote_code)
    place = resolve_device(config.device)
    loaded, tokenizer = load(config)
    return loaded.to(place), tokenizer


def _huge_pages() -> None:
    """torch's own large tensors in huge pages too; read by torch at its first allocation."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
