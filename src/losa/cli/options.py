"""The options that the verbs of `losa` share, each defined once: changing the verb of a command changes nothing else in it.

A verb that is decorated with `requests(...)` has these options on its command line and gets what was given as one `Request`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from losa.config import LosaConfig

Model = Annotated[
    str | None, typer.Argument(help="Local directory or hub name of a causal language model; `model` of --config when not given.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the sparse checkpoint.")]
OutputOrFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory of the sparse checkpoint; `output` of --config when not given.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what a stopped or killed run left in --output.")]
KeepModels = Annotated[
    bool | None,
    typer.Option("--keep-models", help="Keep the rows' checkpoints, for what is measured later; killed rows then go on."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what losa wrote there earlier; files of others beside it stay.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check model, texts and options, say what would be done, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str | None, typer.Option(help="`auto` (default), `cpu` or `cuda`.")]
Trust = Annotated[bool | None, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of configuration keys.")]
SetKeys = Annotated[list[str] | None, typer.Option("--set", help="`key=value` for any other key, e.g. `--set train.lr=1e-3`.")]
Preset = Annotated[
    str | None,
    typer.Option(help="Start from a shipped configuration: `quick`, a short run; `paper`, the released recipe."),
]
EvalData = Annotated[str | None, typer.Option(help="Text to measure perplexity on; a held-out part of --data when not given.")]


@dataclass(frozen=True)
class Shared:
    """An option that several verbs take: the key of `LosaConfig` that it sets, and how typer is to read it."""

    key: str
    annotation: Any


SHARED: dict[str, Shared] = {
    "sparsity": Shared(
        "sparsity",
        Annotated[float | None, typer.Option(help="Ratio of zeros in the decoder's linear layers. The one dial. Default 0.7.")],
    ),
    "data": Shared(
        "train.data",
        Annotated[
            str | None,
            typer.Option(
                help="Training text or conversations: a file (.txt, .md, .json, .jsonl, .ndjson, .csv, .parquet, also .gz or "
                ".zst), a directory of them, or a hub dataset, `name[:config[:split]]`."
            ),
        ],
    ),
    "calibration": Shared(
        "calibration.data",
        Annotated[str | None, typer.Option(help="Calibration text; the training text when not given.")],
    ),
    "eval_data": Shared("eval.data", EvalData),
    "skip_bad_records": Shared(
        "skip_bad_records",
        Annotated[
            bool | None,
            typer.Option(
                "--skip-bad-records", help="Leave out records that are damaged or lack text or an answer, and say how many."
            ),
        ],
    ),
    "windows": Shared(
        "eval.windows", Annotated[int | None, typer.Option(min=1, help="Measure perplexity over at most so many windows.")]
    ),
    "pruner": Shared(
        "pruner",
        Annotated[
            str | None,
            typer.Option(
                help="`alps` (default, recovers most), `sparsegpt`, `wanda` (fastest), `magnitude`, or `movement`: scores "
                "collected while the model trains, so it needs training and `--set steps=2` or more."
            ),
        ],
    ),
    "pattern": Shared(
        "pattern", Annotated[str | None, typer.Option(help="`unstructured` (default), or `n:m` such as `2:4` or `4:8`.")]
    ),
    "values": Shared(
        "values",
        Annotated[
            str | None,
            typer.Option(
                help="`int8` or `int4`: also round the surviving weights, so that `losa pack --values` with the same name loses "
                "nothing; the result stays a bfloat16 checkpoint."
            ),
        ],
    ),
    "protect": Shared(
        "protect",
        Annotated[
            str | None, typer.Option(help="Blocks to leave dense, such as `0,5`; the others lose more, to the same total.")
        ],
    ),
    "train": Shared(
        "train.weights",
        Annotated[
            str | None,
            typer.Option(
                "--train",
                help="What is trained under the mask: `all` surviving weights (default, 16 more bytes a weight), or low-rank "
                "`adapters`, as in the paper. `losa plan` shows the memory of either.",
            ),
        ],
    ),
    "distill": Shared(
        "train.distill",
        Annotated[
            float | None,
            typer.Option(help="Weight of the KL to the dense model, 0..1; the rest is cross-entropy. Default 0.75."),
        ],
    ),
    "dtype": Shared(
        "dtype",
        Annotated[
            str | None,
            typer.Option(
                help="`auto` (the checkpoint's; a CPU without instructions for it computes in float32, and saves it all the "
                "same), `float32`, `bfloat16`, `float16`."
            ),
        ],
    ),
    "device": Shared("device", Device),
    "offload": Shared(
        "offload",
        Annotated[
            bool | None,
            typer.Option(
                "--offload", help="For a model larger than the GPU: blocks stay on the host and visit it one at a time."
            ),
        ],
    ),
    "shard": Shared(
        "shard",
        Annotated[
            bool | None,
            typer.Option("--shard", help="Under torchrun: spread the weights over all GPUs while training (FSDP2)."),
        ],
    ),
    "seed": Shared("seed", Annotated[int | None, typer.Option(help="Of everything random. Default 0.")]),
    "trust_remote_code": Shared("trust_remote_code", Trust),
}
LAYERS = {"preset": Preset, "config": ConfigFile, "set_": SetKeys}  # where keys come from besides options


@dataclass(frozen=True)
class Request:
    """What was given on the command line: by layer, where keys come from; `options`, dotted keys of `LosaConfig`."""

    preset: str | None
    config: Path | None
    sets: list[str]
    options: dict[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted keys and values; `--set` wins over options."""
        from losa.system.yaml_tree import parse_set

        return self.options | parse_set(self.sets)

    def resolve(self, base: str | None = None, needs: Sequence[str] = (), **keys: Any) -> "LosaConfig":
        """Defaults < preset < `base`, the preset that a verb is defined by < file < `keys` and options < --set.

        Raises:
            ValueError: as `LosaConfig.load`; one of `needs`, `model` or `output`, is named nowhere.
        """
        from losa.config import LosaConfig

        given = {key: value for key, value in keys.items() if value is not None} | self.overrides
        presets = ",".join(name for name in (self.preset, base) if name)
        config = LosaConfig.load(str(self.config) if self.config else None, presets or None, given)
        for name in needs:
            if not getattr(config, name):
                here = {"model": "a directory or hub name as the first argument", "output": "a directory with --output"}[name]
                raise ValueError(f"no {name}; give {here}, or `{name}:` in the file of --config")
        return config


def requests(*names: str, layers: Sequence[str] = tuple(LAYERS)) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that puts shared options where a verb has its parameter `request`: those named, or all, and `layers`."""
    shown = {name: SHARED[name].annotation for name in (names or SHARED)} | {name: LAYERS[name] for name in layers}

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            preset, config, sets = (given.pop(name, None) for name in LAYERS)
            options = {SHARED[name].key: given.pop(name) for name in shown if name in SHARED}
            request = Request(preset, config, sets or [], {key: value for key, value in options.items() if value is not None})
            verb(request=request, **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(verb).parameters.values():
            if parameter.name == "request":
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters += [inspect.Parameter(name, kind, default=None, annotation=how) for name, how in shown.items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__, command.__module__ = verb.__name__, verb.__doc__, verb.__module__
        return command

    return decorate


def configuration(**options: Any) -> "LosaConfig":
    """Defaults, and the options that were given."""
    return Request(None, None, [], {}).resolve(**options)
