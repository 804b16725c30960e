"""`losa compare`: many methods on one model, the same texts, tokens and seeds, in one table.

A row is a method at a target (a sparsity or an n:m pattern) and a seed. What it found is one JSON file, named by what decides
it, so a comparison that was stopped goes on where it was, and two comparisons in one directory share the rows they have in
common. No checkpoint is kept.
"""

import copy
import datetime
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from losa.baselines import lift_masks, mask_again, one_shot
from losa.config import LosaConfig, read_presets
from losa.cost import decoding_speed, stored_size
from losa.data import read_run
from losa.evaluation.checkpoint import harness, score_tasks
from losa.evaluation.context import context_use
from losa.evaluation.zeroshot import mean_accuracy, task_names
from losa.method import adapt, dynamic_steps, put_on_grid, sparsify
from losa.models import load
from losa.models.precision import computing
from losa.report.content import public
from losa.session import Session, check_request
from losa.system import distributed
from losa.system.doors import door, read_json
from losa.system.output import claim
from losa.system.progress import progress
from losa.system.writing import replace, to_json
from losa.system.yaml_tree import build, current_names, merge, nested, read_config, require

logger = logging.getLogger(__name__)

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
    "dense": Method("dense", {}),
    "magnitude": Method("prune", ONE_SHOT | {"pruner": "magnitude"}),
    "Wanda": Method("prune", ONE_SHOT | {"pruner": "wanda"}),
    "SparseGPT": Method("prune", ONE_SHOT | {"pruner": "sparsegpt"}),
    "ALPS": Method("prune", ONE_SHOT | {"pruner": "alps"}),
    "ALPS int8": Method("prune", ONE_SHOT | {"pruner": "alps", "values": "int8"}),
    "ALPS int4": Method("prune", ONE_SHOT | {"pruner": "alps", "values": "int4"}),
    "Wanda + LoRA": Method("lora", UNIFORM | {"pruner": "wanda"}),
    "SparseGPT + LoRA": Method("lora", UNIFORM | {"pruner": "sparsegpt"}),
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
        f"GPTQ {bits}-bit + training": Method("round and train", ALL | {"steps": 1, "values": f"dense{bits}"})
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
    variants: dict[str, Any] = field(default_factory=dict)  # rows of your own: a name; `method`, LoSA when absent; keys on top

    def __post_init__(self) -> None:
        if self.methods is None:
            self.methods = [] if self.variants else list(METHODS)
        for name in self.methods:
            require(slug(name) in SLUGS, "methods", name, "some of " + ", ".join(SLUGS))
        self.methods = [SLUGS[slug(name)] for name in self.methods]
        self.run = current_names(LosaConfig, self.run)
        require("output" not in self.run, "run.output", self.run.get("output"), "none: a comparison keeps no checkpoint")
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
        require(bool(values.get("output")), "output", values.get("output"), "a directory for rows, tables and plots")
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
    def key(self) -> str:
        """A hash of all that decides the result; not the name."""
        decides = f"{self.maker} {self.config.fingerprint()} {self.also}"
        return hashlib.sha256(decides.encode()).hexdigest()[:16]


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Makes every row that is not there yet. Writes the tables after each, and the plots at the end.

    Returns:
        One dict a row: `method`, `target`, `seed`, and what `measure` found.

    Raises:
        ValueError: another command writes to the output.
    """
    with claim(config.output):
        return _compare(config)


def _compare(config: CompareConfig) -> list[dict[str, Any]]:
    from losa.report.comparison import write_tables
    from losa.report.plots import write_plots

    folder = Path(config.output, "rows")
    folder.mkdir(parents=True, exist_ok=True)
    Path(config.output, ".losa-comparison").touch()  # no text to train on, where it lies among texts (see data/sources.py)
    rows, found = config.rows(), []
    for row in progress(rows, "comparison"):
        file = folder / f"{row.key}.json"
        result = _read_row(row, file)
        if result is None:
            result = measure(row)
            logger.info("%s %s, seed %d: %.2f", row.name, row.target, row.seed, result["perplexity"])
            text = to_json(result, file.name)
            if distributed.is_main():
                replace(file, text)
            result = json.loads(text)
            distributed.wait()
        entry = {"method": row.name, "target": row.target, "seed": row.seed}
        found.append(entry | result)
        if distributed.is_main():
            write_tables(Path(config.output, config.name), found)
    if distributed.is_main():
        write_plots(Path(config.output, config.name), found)
    return found


def _read_row(row: Row, file: Path) -> dict[str, Any] | None:
    """What was found before, or None; of a file that cannot be used, with a warning."""
    from losa.report.comparison import markdown

    if not file.exists():
        return None
    try:
        found = read_json(file)
        with door(file, "use"):
            markdown([{"method": row.name, "target": row.target, "seed": row.seed} | found])
    except ValueError as error:
        logger.warning("%s; the row is made again", error)
        return None
    return found


def measure(row: Row) -> dict[str, Any]:
    """Makes one row's model and measures it.

    Returns:
        `perplexity`; `masked_again`, that of a dense merge with its pruned weights set to zero again, else None; `sparsity`;
        `bits` of a weight of the decoder's blocks and `bytes` of the model, stored as `losa pack` does, or as dense models of few
        bits are; `speed`, what `decoding_speed` says, or None; `context`, what `context_use` says, or None; `tasks`,
        accuracy by task and `mean_accuracy`, or None; `tokens` trained on;
        `seconds` per stage; `evaluation`; `model`, `data`, `date`, `config`.
    """
    config = row.config
    kind = "run" if row.maker in TRAINED else "prune"
    data = read_run(config, training=kind == "run")
    model, tokenizer = load(config)
    session = Session.start(model, tokenizer, config, kind=kind, data=data)
    lifted = MAKERS[row.maker](session)
    session.finish("made")
    bits, stored = stored_size(session.model, config.values)
    device = session.device if session.config.blocks_on_host else None
    with computing(session.model, session.device, config.dtype):
        if lifted:
            mask_again(session.model, lifted)
            session.measure("masked again")
        context = context_use(session.model, session.data.evaluation, device) if row.also.context else None
        accuracy = _accuracy(session, row.also)
    record, train = session.record, session.config.train
    texts = (train.data, config.calibration.data, config.eval.data)
    return {
        "perplexity": record["perplexity"]["made"],
        "masked_again": record["perplexity"].get("masked again"),
        "sparsity": record["sparsity"]["achieved"],
        "bits": bits,
        "bytes": stored,
        "context": context,
        "tasks": accuracy,
        "speed": decoding_speed(session.model, config.values, session.device) if row.also.speed else None,
        "tokens": train.tokens if kind == "run" else 0,
        "samples": train.samples,
        "seconds": record["seconds"],
        "model": public(config.model),
        "data": [public(text) if text else None for text in texts],
        "evaluation": record["evaluation"],
        "date": datetime.date.today().isoformat(),
        "config": session.config.to_dict(),
        "steps": record["steps"],
    }


def _dense(session: Session) -> None:
    """Nothing is done to it."""


def _accuracy(session: Session, also: Also) -> dict[str, Any] | None:
    if also.tasks is None:
        return None
    folder = Path(also.task_data) if also.task_data else None
    tasks = harness().load_tasks(task_names(also.tasks), folder)
    found = score_tasks(session.model, session.tokenizer, tasks, also.limit)
    return {"tasks": {name: score.get("acc") for name, score in found.items()}, "mean": mean_accuracy(found)}


def _losa(session: Session) -> None:
    session.go_through(dynamic_steps(session.config))


def _lora(session: Session) -> dict[str, Tensor]:
    """Returns the masks that were lifted."""
    sparsify(session, 1)
    masks = lift_masks(session.model)
    adapt(session, 1)
    return masks


def _round_and_train(session: Session) -> None:
    """Of the dense model, so its masks are full. Each half as in a run."""
    put_on_grid(session)
    session.record["steps"].append({"step": 1})
    adapt(session, 1)


TRAINED = ("losa", "lora", "round and train")
FULL = ("dense", "round", "round and train")  # no zeros, so one row whatever the target
MAKERS: dict[str, Callable[[Session], dict[str, Tensor] | None]] = {
    "dense": _dense,
    "prune": one_shot,
    "losa": _losa,
    "lora": _lora,
    "round": put_on_grid,
    "round and train": _round_and_train,
}
