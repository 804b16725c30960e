"""The configuration of a run: one dataclass tree, YAML in and out, checked before any weight is loaded.

`--sparsity` is the one dial; every other field has a default that follows from it or from the paper. Fields that are None are
decided when the model is known, and the resolved configuration is what gets printed, saved and hashed.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from losa.allocation import BANDS
from losa.doors import YAML_BYTES, door, read_text, read_yaml, shown
from losa.pruning import Pattern, get_pruner
from losa.pruning.grid import FORMATS

RENAMED = {"importance": "rates"}
DTYPES = ("auto", "bfloat16", "float16", "float32")
WHOLE_RATE = 0.576  # peak learning rate times the hidden size, where all weights are trained: 1e-3 at 576 (docs/LOG.md)
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


logger = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Leaves numbers as text, for `_convert` knows what a field wants. YAML 1.1 reads 2:4 as 124 and 1e-3 as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str, name: str) -> Any:
    return read_yaml(text, _Loader, name)


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of keys and values, numbers still as text.

    Raises:
        ValueError: it cannot be read, or is not a mapping.
    """
    with door(f"the config {path}"):
        text = read_text(Path(path), YAML_BYTES)
    loaded = _read_yaml(text, f"the config {path}")
    require(isinstance(loaded, dict), f"the config {path}", type(loaded).__name__, "a mapping of keys to values")
    values: dict[str, Any] = loaded
    return values


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises the `ValueError` "name is found, expected ..." unless `condition`."""
    if not condition:
        raise ValueError(f"{name} is {shown(found)}, expected {expected}")


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """Text that importance, pruning and reconstruction errors are measured on."""

    data: str | None = None  # a text source (see data/); the training text when None
    sequences: int | None = None  # for pruning; 128, but no more than make the tokens that the pruner wants, when None
    rmi_sequences: int = 64  # of these, for representation mutual information
    rmi_length: int = 512  # at most so many tokens of each of those
    error_sequences: int = 16  # of these, for reconstruction errors
    length: int | None = None  # tokens of each; min(2048, what the model allows) when None

    def __post_init__(self) -> None:
        require(self.sequences is None or self.sequences >= 1, "calibration.sequences", self.sequences, "at least 1")
        require(self.rmi_sequences >= 2, "calibration.rmi_sequences", self.rmi_sequences, "at least 2")
        require(self.rmi_length >= 8, "calibration.rmi_length", self.rmi_length, "at least 8 tokens")
        require(self.error_sequences >= 1, "calibration.error_sequences", self.error_sequences, "at least 1")
        require(self.length is None or self.length >= 8, "calibration.length", self.length, "at least 8 tokens")


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Ranks of the low-rank adapters."""

    omega_first: float = 6.0  # mean rank in the first dynamic step
    omega_last: float = 10.0  # in the last one; linear in between, so 6, 7, 8, 9, 10 over five steps
    max_rank: int = 16  # of any block
    scale: float = 2.0  # alpha / r
    allocation: str = "error"  # ranks follow reconstruction errors, or "uniform"

    def __post_init__(self) -> None:
        require(self.max_rank >= 1, "adapter.max_rank", self.max_rank, "at least 1")
        for name in ("omega_first", "omega_last"):
            value = getattr(self, name)
            require(1 <= value <= self.max_rank, f"adapter.{name}", value, f"1..adapter.max_rank = {self.max_rank}")
        require(self.scale > 0, "adapter.scale", self.scale, "a positive number")
        require(self.allocation in ("error", "uniform"), "adapter.allocation", self.allocation, "'error' or 'uniform'")

    def omega(self, step: int, steps: int) -> float:
        """Mean rank of dynamic step `step` (1-based) of `steps`."""
        if steps == 1:
            return self.omega_last
        return self.omega_first + (self.omega_last - self.omega_first) * (step - 1) / (steps - 1)


@dataclass(kw_only=True, slots=True)
class ReconstructConfig:
    """Block-wise reconstruction: each block's surviving weights are trained to put out what the dense block does."""

    epochs: int = 0  # over the sequences; 0: no reconstruction
    sequences: int = 64  # of the calibration sequences
    batch_size: int = 1  # sequences of one update, of all processes together
    lr: float | None = None  # peak; that of training all weights when None

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "reconstruct.epochs", self.epochs, "at least 0")
        require(self.sequences >= 1, "reconstruct.sequences", self.sequences, "at least 1")
        require(self.batch_size >= 1, "reconstruct.batch_size", self.batch_size, "at least 1")
        require(self.lr is None or 0 < self.lr < 1, "reconstruct.lr", self.lr, "a number in (0, 1)")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Training under the mask."""

    weights: str = "all"  # what is trained: all surviving weights, or low-rank "adapters", as in the paper, in less memory

    data: str | None = None  # a text source; required by `losa run`
    tokens: int = 2_200_000  # over all dynamic steps; the released recipe sees about as many
    samples: int | None = None  # instead of tokens: documents, one a row, padded, not packed (the released recipe)
    last_share: float = 0.9  # of them in the last dynamic step; the earlier steps share the rest evenly. Released recipe: 0.6
    length: int | None = None  # tokens of a row; min(1024, what the model allows) when None
    batch_size: int = 8  # rows of one forward, of all processes together
    accumulation: int = 1  # forwards of one optimizer step
    lr: float | None = None  # peak; when None 0.576 / hidden size, at most 3e-3, or of adapters 2e-4 * 4096 / hidden size, 5e-3
    weight_decay: float = 0.001
    warmup: float = 0.3  # ratio of a step's updates
    schedule: str = "linear"
    max_grad_norm: float = 0.3
    gradient_checkpointing: bool = False
    reuse_weights: bool = False  # build effective weights once an update, not twice a forward; worth their memory if accumulating
    distill: float = 0.5  # weight of the KL to the dense model in the loss; the rest is cross-entropy. Released recipe: 0
    temperature: float = 1.0  # of that KL
    loss_on: str = "assistant"  # of conversations, the assistant's tokens; or "all" tokens. Of other texts all in any case
    distill_blocks: float = 0.0  # weight, added, of the relative error of every block's output against the dense model's
    save_minutes: float = 15.0  # between two savings of a training under way; the result does not depend on it
    report_to: str = "none"  # any of transformers.Trainer's: wandb, tensorboard, ...

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "accumulation"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(self.weights in ("all", "adapters"), "train.weights", self.weights, "'all' or 'adapters'")
        require(self.samples is None or self.samples >= 1, "train.samples", self.samples, "at least 1")
        require(0 < self.last_share <= 1, "train.last_share", self.last_share, "a ratio in (0, 1]")
        require(self.length is None or self.length >= 8, "train.length", self.length, "at least 8 tokens")
        require(self.lr is None or 0 < self.lr < 1, "train.lr", self.lr, "a number in (0, 1)")
        require(self.loss_on in ("assistant", "all"), "train.loss_on", self.loss_on, "'assistant' or 'all'")
        require(self.schedule in SCHEDULES, "train.schedule", self.schedule, "one of " + ", ".join(SCHEDULES))
        require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a ratio in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.distill <= 1, "train.distill", self.distill, "a ratio in [0, 1]")
        require(0 <= self.distill_blocks < math.inf, "train.distill_blocks", self.distill_blocks, "at least 0")
        require(1e-3 <= self.temperature <= 1e3, "train.temperature", self.temperature, "a number in [0.001, 1000]")
        require(0 < self.save_minutes < math.inf, "train.save_minutes", self.save_minutes, "a positive number")
        require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "a positive number")

    @property
    def whole(self) -> bool:
        """Whether all surviving weights are trained."""
        return self.weights == "all"

    def shares(self, steps: int) -> list[float]:
        """Ratio of the budget spent in each dynamic step; sums to 1."""
        if steps == 1:
            return [1.0]
        return [(1 - self.last_share) / (steps - 1)] * (steps - 1) + [self.last_share]


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Perplexity before and after."""

    data: str | None = None  # a text source; a held-out part of the training text when None
    length: int | None = None  # tokens of a window; min(2048, what the model allows) when None
    windows: int | None = None  # at most so many; all when None

    def __post_init__(self) -> None:
        require(self.length is None or self.length >= 2, "eval.length", self.length, "at least 2 tokens")
        require(self.windows is None or self.windows >= 1, "eval.windows", self.windows, "at least 1")


@dataclass(kw_only=True, slots=True)
class LosaConfig:
    """Everything that decides the result of a run."""

    model: str = ""  # local directory or hub name
    output: str | None = None  # directory of the sparse checkpoint; a Python call without one keeps the model in memory
    sparsity: float | None = None  # ratio of zeros in the decoder's linear layers; .7, or what an n:m pattern implies, when None
    pruner: str = "alps"  # or sparsegpt, wanda, magnitude, movement; see pruning/
    pattern: str = "unstructured"  # or n:m, such as 2:4
    steps: int = 1  # dynamic steps T; the paper's five earned nothing measurable (docs/experiments.md)
    rates: str = "uniform"  # or the rule that gives layers rates of their own: rmi, depth, owl, dlp or error; see rates.py
    protect: list[int] = field(default_factory=list)  # decoder blocks left dense; the others lose more, to the same total
    delta: float | None = None  # how far a rate may leave the mean; what the rule's paper uses when None; 0 is uniform
    values: str | None = None  # int8 or int4: surviving weights lie on a grid that `losa pack --values` stores without loss
    rotate: bool = False  # turn the values of every attention head first, so that pruning finds more small weights; rotation.py
    seed: int = 0
    device: str = "auto"  # cuda if there is one, else cpu
    dtype: str = "auto"  # of the base weights; the checkpoint's own when auto
    offload: bool = False  # for models larger than the device: decoder blocks stay on the host and visit it one at a time
    shard: bool = False  # of several processes, each holds a part of the weights while training (FSDP2)
    trust_remote_code: bool = False
    skip_bad_records: bool = False  # of any text; leave them out and say how many, instead of refusing the first
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        get_pruner(self.pruner)
        pattern = Pattern.parse(self.pattern)
        if self.sparsity is None:
            self.sparsity = pattern.sparsity if pattern.structured else 0.7
        require(0 < self.sparsity < 1, "sparsity", self.sparsity, "a ratio between 0 and 1, such as 0.7")
        if pattern.structured:
            fits = abs(self.sparsity - pattern.sparsity) < 1e-9
            require(fits, "sparsity", self.sparsity, f"{pattern.sparsity:g}, which pattern {self.pattern} implies")
        require(self.values is None or self.values in FORMATS, "values", self.values, "int8 or int4")
        require(self.rates in BANDS, "rates", self.rates, "one of " + ", ".join(BANDS))
        if self.delta is None:
            self.delta = 0.0 if pattern.structured else BANDS[self.rates](self.sparsity)
        require(not (pattern.structured and self.delta), "delta", self.delta, f"0: pattern {self.pattern} fixes all rates")
        require(0 <= self.delta < 1, "delta", self.delta, "a ratio in [0, 1)")
        require(1 <= self.steps <= 99, "steps", self.steps, "1..99")
        require(all(block >= 0 for block in self.protect), "protect", self.protect, "block numbers, 0 being the first")
        require(not (pattern.structured and self.protect), "protect", self.protect, f"none: {self.pattern} fixes all rates")
        local = not (get_pruner(self.pruner).from_training and self.blocks_on_host)
        require(local, "pruner", self.pruner, "one that needs no scores from training, with offload or shard")
        enough = self.train.samples is None or self.train.samples >= self.steps
        require(enough, "train.samples", self.train.samples, f"at least one for each of {self.steps} steps")
        alone = not (self.train.reuse_weights and self.blocks_on_host)
        require(alone, "train.reuse_weights", True, "false with offload or shard, which keep whole weights nowhere")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.dtype in DTYPES, "dtype", self.dtype, "one of " + ", ".join(DTYPES))

    @property
    def blocks_on_host(self) -> bool:
        """Whether decoder blocks are on the host except while they compute; with `shard`, except in training."""
        return self.offload or self.shard

    def resolve(self, hidden_size: int, max_length: int) -> "LosaConfig":
        """A copy with every field decided that depends on the model.

        Raises:
            ValueError: a length is longer than the model allows.
        """
        config = LosaConfig.from_dict(self.to_dict())
        for name, longest in (("calibration", 2048), ("train", 1024), ("eval", 2048)):
            part = getattr(config, name)
            part.length = min(longest, max_length) if part.length is None else part.length
            require(part.length <= max_length, f"{name}.length", part.length, f"at most the model's {max_length} tokens")
        if config.calibration.sequences is None:
            # The literature's 128 x 2048 tokens would take a third of a small model's run, and it does not need them (LOG.md).
            tokens = get_pruner(config.pruner).calibration_tokens(hidden_size)
            config.calibration.sequences = min(128, max(1, tokens // (config.calibration.length or 1)))
        config.reconstruct.sequences = min(config.reconstruct.sequences, config.calibration.sequences)
        # The released 2e-4 was set for adapters and a hidden size of 4096. Adam's steps scale with 1 / width (muP,
        # https://arxiv.org/abs/2203.03466); docs/LOG.md has the sweeps that agree. Capped for toy widths.
        whole = min(3e-3, round(WHOLE_RATE / hidden_size, 8))
        if config.train.lr is None:
            config.train.lr = whole if config.train.whole else min(5e-3, round(2e-4 * 4096 / hidden_size, 8))
        if config.reconstruct.lr is None:
            config.reconstruct.lr = whole
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LosaConfig":
        """Builds the tree, converting and checking every value.

        Raises:
            ValueError: unknown key (with the nearest known one), wrong type, or value out of range.
        """
        return build(cls, values)

    @classmethod
    def load(cls, path: str | None = None, preset: str | None = None, overrides: dict[str, Any] | None = None) -> "LosaConfig":
        """Defaults, then `preset` (or several, separated by commas), then the YAML file `path`, then `overrides` (dotted keys).

        Raises:
            ValueError: as `from_dict`; no such preset; the YAML is not a mapping.
        """
        values = read_presets(preset)
        if path is not None:
            merge(values, read_config(path))
        merge(values, nested(overrides or {}))
        return cls.from_dict(values)

    def fingerprint(self) -> str:
        """SHA-256 of every field that decides the result, to recognise a changed configuration on resume."""
        values = self.to_dict() | {"output": None}
        del values["train"]["save_minutes"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_presets(names: str | None) -> dict[str, Any]:
    """Keys of shipped configurations, separated by commas, later ones on top; of none when None.

    Raises:
        ValueError: no such preset.
    """
    values: dict[str, Any] = {}
    folder = resources.files("losa").joinpath("presets")
    known = sorted(path.name[:-5] for path in folder.iterdir())
    for name in names.split(",") if names is not None else []:
        require(name in known, "preset", name, "one of " + ", ".join(known))
        merge(values, _read_yaml(folder.joinpath(f"{name}.yaml").read_text("utf-8"), name))
    return values


def parse_set(items: list[str]) -> dict[str, Any]:
    """`["train.lr=1e-3"]` -> `{"train.lr": "1e-3"}`; values are read as YAML.

    Raises:
        ValueError: an item without `=`.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        require(bool(equals and key), "--set", item, "key=value, such as train.lr=1e-3")
        pairs[key] = _read_yaml(value, f"--set {item}")
    return pairs


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for all leaves that differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` -> `{"train": {"lr": 1}}`."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(values, value)
    return values


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Puts `values` into `into`, key by key at every depth."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def build(cls: Any, values: Any, prefix: str = "") -> Any:
    """A configuration dataclass from plain values, converted and checked; see `LosaConfig.from_dict`."""
    require(isinstance(values, dict), prefix.rstrip(".") or "the config", values, "a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    values = _renamed(cls, values)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys are {', '.join(hints)}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _renamed(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Keys that had another name in earlier versions, under the name they have now, with a warning."""
    names = RENAMED if cls is LosaConfig else {}
    for old, new in names.items():
        if old in values:
            logger.warning("the key %s is called %s now", old, new)
            values = {new if key == old else key: value for key, value in values.items()}
    return values


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name + ".")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is list:
        values = value.split(",") if isinstance(value, str) else value
        require(isinstance(values, list), name, value, "a list")
        return [_convert(typing.get_args(kind)[0], item, f"{name}[{index}]") for index, item in enumerate(values)]
    kind = typing.get_origin(kind) or kind
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number.is_integer() and abs(number) < 2**63:
            return int(value) if isinstance(value, int) or str(value).isdecimal() else int(number)  # a float has but 53 bits
    elif type(value) is kind:
        return value
    raise ValueError(f"{name} is {shown(value)}, expected {'a whole number' if kind is int else kind.__name__}")
