"""What is compared: the methods, what they share, and the rows that follow."""

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losa.config import LosaConfig, read_presets
from losa.evaluation.checkpoint import harness
from losa.evaluation.zeroshot import task_names
from losa.session import check_request
from losa.system.yaml_tree import build, current_names, merge, nested, read_config, require

TRAINED = ("losa", "lora", "train and round")  # makers that train
FULL = ("dense", "round", "train and round")  # no zeros, so one row whatever the target

ONE_SHOT: dict[str, Any] = {"steps": 1, "rate_band": 0.0, "reconstruct": {"epochs": 0}}
PAPER: dict[str, Any] = {"steps": 5, "rates": "rmi", "reconstruct": {"epochs": 0}, "train": {"weights": "adapters"}}
ALL: dict[str, Any] = {"train": {"weights": "all"}}
UNIFORM: dict[str, Any] = ONE_SHOT | {"adapter": {"allocation": "uniform"}, "train": {"weights": "adapters"}}


@dataclass(frozen=True)
class Method:
    """How a row is made: by which function of `MAKERS`, with which changes to the configuration that all rows share."""

    maker: str
    changes: dict[str, Any]


METHODS: dict[str, Method] = {
    "dense": Method("dense", {"values": None}),
    "magnitude": Method("prune", ONE_SHOT | {"pruner": "magnitude"}),
    "Wanda": Method("prune", ONE_SHOT | {"pruner": "wanda"}),
    "SparseGPT": Method("prune", ONE_SHOT | {"pruner": "sparsegpt"}),
    "ALPS": Method("prune", ONE_SHOT | {"pruner": "alps"}),
    "ALPS int8": Method("prune", ONE_SHOT | {"pruner": "alps", "values": "int8"}),
    "ALPS int4": Method("prune", ONE_SHOT | {"pruner": "alps", "values": "int4"}),
    "Wanda + LoRA": Method("lora", UNIFORM | {"pruner": "wanda", "values": None}),  # ends dense, and is not rounded
    "SparseGPT + LoRA": Method("lora", UNIFORM | {"pruner": "sparsegpt", "values": None}),
    "Wanda + masked LoRA": Method("losa", UNIFORM | {"pruner": "wanda"}),
    "SparseGPT + masked LoRA": Method("losa", UNIFORM | {"pruner": "sparsegpt"}),
    "Wanda + LoSA": Method("losa", PAPER | {"pruner": "wanda"}),
    "SparseGPT + LoSA": Method("losa", PAPER | {"pruner": "sparsegpt"}),
    "LoSA without layer rates": Method("losa", PAPER | {"pruner": "wanda", "rate_band": 0.0}),
    "LoSA without rank allocation": Method("losa", PAPER | {"pruner": "wanda", "adapter": {"allocation": "uniform"}}),
    "LoSA without dynamic steps": Method("losa", PAPER | {"pruner": "wanda", "steps": 1}),
    "masked full fine-tuning": Method("losa", ONE_SHOT | {"pruner": "wanda", "train": {"weights": "all"}}),
    "losa": Method("losa", {}),
    "losa int8": Method("losa", {"values": "int8"}),
    "losa int4": Method("losa", {"values": "int4"}),
    # The rivals: no zeros, few bits, by the same solver and calibration (GPTQ), and with the same training.
    **{f"GPTQ {bits}-bit": Method("round", {"values": f"dense{bits}"}) for bits in (8, 4, 3, 2)},
    **{
        f"GPTQ {bits}-bit + training": Method("train and round", ALL | {"steps": 1, "values": f"dense{bits}"})
        for bits in (4, 3, 2)
    },
}


def slug(name: str) -> str:
    """A method's name as it is typed: `Wanda + masked LoRA` is `wanda-masked-lora`."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


SLUGS = {slug(name): name for name in METHODS}


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """A comparison: what all rows share, and what differs."""

    output: str  # directory of rows, tables and plots; comparisons in one directory share the rows they have in common
    name: str = "comparison"  # of the tables and plots; the file's when it comes from one
    run: dict[str, Any]  # what all rows share: keys of `LosaConfig`
    methods: list[str] | None = None  # names of `METHODS`; all of them when None, or none if there are variants
    targets: list[str] = field(default_factory=lambda: ["0.7"])  # sparsities, or patterns such as 2:4
    seeds: list[int] = field(default_factory=lambda: [0])
    speed: bool = False  # also measure tokens per second, packed, against dense in turns
    tasks: str | None = None  # also measure accuracy: `paper`, or names of lm-eval's tasks, separated by commas
    task_data: str | None = None  # local folder with their data; the hub when None
    limit: int | None = None  # at most so many items of each task
    context: bool = False  # also measure how much every row makes of what it has read (`evaluation/context.py`)
    keep_models: bool = False  # in models/: a row's model is then there for measurements that are asked for later
    variants: dict[str, Any] = field(default_factory=dict)  # rows of your own: a name; `method`, LoSA when absent; keys on top

    def __post_init__(self) -> None:
        if self.methods is None:
            self.methods = [] if self.variants else list(METHODS)
        for name in self.methods:
            require(slug(name) in SLUGS, "methods", name, "some of " + ", ".join(SLUGS))
        self.methods = [SLUGS[slug(name)] for name in self.methods]
        self.run = current_names(LosaConfig, self.run)
        require(
            "output" not in self.run, "run.output", self.run.get("output"), "none: checkpoints are kept with keep_models only"
        )
        require(bool(self.methods or self.variants), "methods", self.methods, "at least one, or variants")
        require(not METHODS.keys() & self.variants.keys(), "variants", list(self.variants), "names that no method has")
        require(bool(self.targets), "targets", self.targets, "at least one, such as 0.7 or 2:4")
        require(bool(self.seeds), "seeds", self.seeds, "at least one")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        if self.tasks is not None:
            task_names(self.tasks)
            harness()
        measured = self.run.get("eval") or {}
        require(isinstance(measured, dict), "run.eval", measured, "a mapping of keys to values")
        held = measured.get("data")
        require(len(self.seeds) == 1 or held is not None, "run.eval.data", held, "a text: what is held out depends on the seed")
        for row in self.rows():  # every configuration is built, and so checked, before any model is loaded
            check_request(row.config, training=True)

    @classmethod
    def load(cls, path: str | None, run: dict[str, Any], preset: str | None = None, **options: Any) -> "CompareConfig":
        """The keys of `preset`, then the YAML file `path`, then `options` that are not None, then the dotted keys `run`; those of
        `preset` and `run` are what all rows share.

        Raises:
            ValueError: as `LosaConfig.load`; unknown methods; a text that does not exist.
        """
        values: dict[str, Any] = {"run": read_presets(preset)}
        merge(values, {"name": Path(path).stem} | read_config(path) if path else {})
        values |= {key: value for key, value in options.items() if value is not None}
        merge(values, {"run": nested(run)})
        hint = "a directory for rows, tables and plots; give one with --output"
        require(bool(values.get("output")), "output", values.get("output"), hint)
        made: CompareConfig = build(cls, values)
        return made

    def rows(self) -> "list[Row]":
        """All rows, in the order of the table."""
        assert self.methods is not None
        made = {name: METHODS[name] for name in self.methods}
        made |= {name: _variant(name, changes) for name, changes in self.variants.items()}
        return [row for name, method in made.items() for row in self._rows_of(name, method)]

    def _rows_of(self, name: str, method: Method) -> "Iterator[Row]":
        dense, full = method.maker == "dense", method.maker in FULL
        also = Also(self.context, self.speed, self.tasks, self.task_data, self.limit)
        for target in self.targets[:1] if full else self.targets:
            for seed in self.seeds[:1] if dense else self.seeds:
                values = copy.deepcopy(self.run)
                at: dict[str, Any] = {} if full else {"pattern": target} if ":" in target else {"sparsity": target}
                for changes in (at if dense else at | {"seed": seed}, method.changes):
                    merge(values, changes)
                if ":" in target and not full:  # the pattern fixes all rates
                    values["rate_band"] = 0.0
                config = LosaConfig.from_dict(values)
                if method.maker in ("lora", "train and round"):
                    steps, epochs = config.steps, config.reconstruct.epochs
                    require(steps == 1, f"steps of {name}", steps, "1: its pruning and its training are one step each")
                    require(not epochs, f"reconstruct.epochs of {name}", epochs, "0: this method has no reconstruction")
                yield Row(name, method.maker, "" if full else target, seed, config, also)


def _variant(name: str, changes: Any) -> Method:
    require(isinstance(changes, dict), f"variants.{name}", changes, "a mapping of keys to values")
    base = changes.get("method", "LoSA")
    known = isinstance(base, str) and (slug(base) in SLUGS or base == "LoSA")
    require(known, f"variants.{name}.method", base, "one of LoSA, " + ", ".join(SLUGS))
    method = Method("losa", PAPER) if base == "LoSA" else METHODS[SLUGS[slug(base)]]
    values = copy.deepcopy(method.changes)
    merge(values, current_names(LosaConfig, {key: value for key, value in changes.items() if key != "method"}))
    return Method(method.maker, values)


@dataclass(frozen=True)
class Also:
    """What is measured besides perplexity; see `CompareConfig`."""

    context: bool
    speed: bool
    tasks: str | None
    task_data: str | None
    limit: int | None


@dataclass(frozen=True)
class Row:
    """A method at a target and a seed."""

    name: str
    maker: str
    target: str
    seed: int
    config: LosaConfig
    also: Also

    @property
    def trained(self) -> bool:
        """Whether something is trained in it."""
        return self.maker in TRAINED

    @property
    def keepable(self) -> bool:
        """Whether its checkpoint is the row: not of the dense model, nor of a merge that was masked again."""
        return self.maker not in ("dense", "lora")

    @property
    def key(self) -> str:
        """A hash of all that decides the result; not the name."""
        return _hash(f"{self._makes} {self.also}")

    @property
    def model_key(self) -> str:
        """A hash of all that decides the model, whatever is measured of it."""
        return _hash(self._makes)

    @property
    def _makes(self) -> str:
        return f"{self.maker} {self.config.fingerprint()}"


def _hash(decides: str) -> str:
    return hashlib.sha256(decides.encode()).hexdigest()[:16]
