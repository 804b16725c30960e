"""The configuration of a run: one dataclass tree, YAML in and out, checked before any weight is loaded.

`--sparsity` is the one dial; every other field has a default. Fields that are None are decided when the model is known, and the
resolved configuration is what gets printed, saved and hashed.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from losa.pruning import Pattern, get_pruner
from losa.pruning.grid import FORMATS
from losa.rules import RULES
from losa.system.yaml_tree import build, current_names, merge, nested, parse_yaml, read_config, renamed_from, require

DTYPES = ("auto", "bfloat16", "float16", "float32")
UPDATE_TOKENS = 1024  # that one forward in training sees where all weights are trained
ADAPTER_ROWS = 8  # where adapters are, as in the release
WHOLE_RATE = 0.288  # peak learning rate times the hidden size, where all weights are trained: 5e-4 at 576 (docs/LOG.md)
RECONSTRUCTION_RATE = 0.576  # the same of block-wise reconstruction
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


def local(source: str | None) -> str | None:
    """A text source with a `~` at its beginning made the home directory: no shell does that in YAML, nor after `--data=`."""
    return source and os.path.expanduser(source)  # noqa: PTH111 - a Path rewrites names of the hub, and raises without a home


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """Text that importance, pruning and reconstruction errors are measured on."""

    data: str | None = None  # a text source (see data/); the training text when None
    sequences: int | None = None  # for pruning; when None as many as make the tokens that the pruner wants, at most 128
    rmi_sequences: int = 64  # for layer rates by rmi, owl, dlp or error
    rmi_length: int = 512  # at most so many tokens of each of those
    error_sequences: int = 16  # of those for pruning, for reconstruction errors
    length: int | None = None  # tokens of each; min(2048, what the model allows) when None

    def __post_init__(self) -> None:
        self.data = local(self.data)
        require(self.sequences is None or self.sequences >= 1, "calibration.sequences", self.sequences, "at least 1")
        require(self.rmi_sequences >= 2, "calibration.rmi_sequences", self.rmi_sequences, "at least 2")
        require(self.rmi_length >= 8, "calibration.rmi_length", self.rmi_length, "at least 8 tokens")
        require(self.error_sequences >= 1, "calibration.error_sequences", self.error_sequences, "at least 1")
        require(self.length is None or self.length >= 8, "calibration.length", self.length, "at least 8 tokens")


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Ranks of the low-rank adapters."""

    # Mean rank, the paper's Omega, in the first dynamic step; linear up to the last, so 6, 7, 8, 9, 10 over five.
    mean_rank_first: float = field(default=6.0, metadata=renamed_from("omega_first"))
    # The same in the last step, or in the only one.
    mean_rank_last: float = field(default=10.0, metadata=renamed_from("omega_last"))
    max_rank: int = 16  # of any block
    scale: float = 2.0  # alpha / r
    allocation: str = "error"  # ranks follow reconstruction errors, or "uniform"

    def __post_init__(self) -> None:
        require(self.max_rank >= 1, "adapter.max_rank", self.max_rank, "at least 1")
        for name in ("mean_rank_first", "mean_rank_last"):
            value = getattr(self, name)
            require(1 <= value <= self.max_rank, f"adapter.{name}", value, f"1..adapter.max_rank = {self.max_rank}")
        require(0 < self.scale < math.inf, "adapter.scale", self.scale, "a positive number")
        require(self.allocation in ("error", "uniform"), "adapter.allocation", self.allocation, "'error' or 'uniform'")

    def mean_rank(self, step: int, steps: int) -> float:
        """Mean rank of dynamic step `step` (1-based) of `steps`."""
        if steps == 1:
            return self.mean_rank_last
        return self.mean_rank_first + (self.mean_rank_last - self.mean_rank_first) * (step - 1) / (steps - 1)


@dataclass(kw_only=True, slots=True)
class ReconstructConfig:
    """Block-wise reconstruction: each block's surviving weights are trained to put out what the dense block does."""

    epochs: int = 0  # over the sequences; 0: no reconstruction
    sequences: int = 64  # of calibration text, calibration.length tokens each; may be more than pruning sees
    length: int = 256  # tokens of the pieces that those are cut into, at most calibration.length; more updates, and faster ones
    batch_size: int = 1  # pieces of one update, of all processes together
    lr: float | None = None  # peak; 0.576 / hidden size when None, at most 3e-3

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "reconstruct.epochs", self.epochs, "at least 0")
        require(self.sequences >= 1, "reconstruct.sequences", self.sequences, "at least 1")
        require(self.length >= 8, "reconstruct.length", self.length, "at least 8 tokens")
        require(self.batch_size >= 1, "reconstruct.batch_size", self.batch_size, "at least 1")
        require(self.lr is None or 0 < self.lr < 1, "reconstruct.lr", self.lr, "a number in (0, 1)")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Training under the mask."""

    weights: str = "all"  # what is trained: all surviving weights, or low-rank "adapters", as in the paper, in less memory

    data: str | None = None  # a text source; required by `losa run`
    tokens: int = 2_200_000  # over all dynamic steps; the released recipe sees about as many
    samples: int | None = None  # instead of tokens: documents, one a row, padded, not packed (the released recipe)
    last_share: float = 0.9  # of tokens or samples, in the last dynamic step; the others share the rest. Released recipe: 0.6
    length: int | None = None  # tokens of a row; min(1024, what the model allows) when None
    batch_size: int | None = None  # rows of one forward, of all processes together; when None 1,024 tokens, of adapters 8 rows
    accumulation: int = 1  # forwards of one optimizer step
    lr: float | None = None  # peak; when None 0.288 / hidden size, at most 3e-3; of adapters 0.8192 / hidden size, at most 5e-3
    weight_decay: float = 0.001  # of AdamW
    warmup: float = 0.3  # ratio of a step's updates
    schedule: str = "linear"  # or cosine, constant, constant_with_warmup, polynomial, inverse_sqrt
    max_grad_norm: float = 0.3  # gradients are clipped to it
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    reuse_weights: bool = False  # build effective weights once an update, not twice a forward; worth their memory if accumulating
    distill: float = 0.75  # weight of the KL to the dense model in the loss; the rest is cross-entropy. Released recipe: 0
    temperature: float = 1.0  # of that KL
    loss_on: str = "assistant"  # of conversations, the assistant's tokens; or "all" tokens. Of other texts all in any case
    distill_blocks: float = 0.0  # weight, added, of the relative error of every block's output against the dense model's
    save_minutes: float = 15.0  # between two savings of a training or a pruning under way; the result does not depend on it
    report_to: str = "none"  # any of transformers.Trainer's: wandb, tensorboard, ...

    def __post_init__(self) -> None:
        self.data = local(self.data)
        for name in ("tokens", "accumulation"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(self.batch_size is None or self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        require(self.weights in ("all", "adapters"), "train.weights", self.weights, "'all' or 'adapters'")
        require(self.samples is None or self.samples >= 1, "train.samples", self.samples, "at least 1")
        require(0 < self.last_share <= 1, "train.last_share", self.last_share, "a ratio in (0, 1]")
        require(self.length is None or self.length >= 8, "train.length", self.length, "at least 8 tokens")
        require(self.lr is None or 0 < self.lr < 1, "train.lr", self.lr, "a number in (0, 1)")
        require(self.loss_on in ("assistant", "all"), "train.loss_on", self.loss_on, "'assistant' or 'all'")
        require(self.schedule in SCHEDULES, "train.schedule", self.schedule, "one of " + ", ".join(SCHEDULES))
        ends = self.schedule != "polynomial" or self.lr is None or self.lr > 1e-7
        require(ends, "train.lr", self.lr, "more than 1e-7, where a polynomial schedule ends")
        require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a ratio in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.distill <= 1, "train.distill", self.distill, "a ratio in [0, 1]")
        require(0 <= self.distill_blocks < math.inf, "train.distill_blocks", self.distill_blocks, "at least 0")
        require(1e-3 <= self.temperature <= 1e3, "train.temperature", self.temperature, "a number in [0.001, 1000]")
        require(0 < self.save_minutes < math.inf, "train.save_minutes", self.save_minutes, "a positive number")
        require(0 < self.max_grad_norm < math.inf, "train.max_grad_norm", self.max_grad_norm, "a positive number")

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
        self.data = local(self.data)
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
    # Or the rule that gives layers rates of their own: rmi, depth, owl, dlp or error; see rules.py.
    rates: str = field(default="uniform", metadata=renamed_from("importance"))
    protect: list[int] = field(default_factory=list)  # decoder blocks left dense; the others lose more, to the same total
    # How far a rate may leave the mean, delta in the formulas; what the rule's paper uses when None; 0 is uniform.
    rate_band: float | None = field(default=None, metadata=renamed_from("delta"))
    values: str | None = None  # int8 or int4: surviving weights lie on a grid that `losa pack --values` stores without loss
    rotate: bool = False  # turn the values of every attention head first, so that pruning finds more small weights; rotation.py
    seed: int = 0  # of everything random
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    dtype: str = "auto"  # of the base weights; auto: the checkpoint's, computing in float32 on CPUs without 16-bit instructions
    offload: bool = False  # for models larger than the device: decoder blocks stay on the host and visit it one at a time
    shard: bool = False  # of several processes, each holds a part of the weights while training (FSDP2)
    trust_remote_code: bool = False  # run Python code that comes with the model
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
        packed = " or ".join(name for name, made in FORMATS.items() if made.sparse)
        require(self.values is None or self.values in FORMATS, "values", self.values, packed)
        require(self.rates in RULES, "rates", self.rates, "one of " + ", ".join(RULES))
        if self.rate_band is None:
            self.rate_band = 0.0 if pattern.structured else RULES[self.rates].band(self.sparsity)
        require(
            not (pattern.structured and self.rate_band), "rate_band", self.rate_band, f"0: pattern {self.pattern} fixes all rates"
        )
        require(0 <= self.rate_band < 1, "rate_band", self.rate_band, "a ratio in [0, 1)")
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

    @property
    def importance_sequences(self) -> int:
        """Sequences that one dynamic step measures importance on; 0 where the rule needs none."""
        return self.calibration.rmi_sequences if self.rate_band and RULES[self.rates].needs != "nothing" else 0

    @property
    def calibration_sequences(self) -> int:
        """Sequences of calibration text that are read: as many as the stage that uses most."""
        reconstructed = self.reconstruct.sequences if self.reconstruct.epochs else 0
        return max(self.calibration.sequences or 0, self.importance_sequences, reconstructed)

    @property
    def reconstructed_pieces(self) -> int:
        """Pieces of `reconstruct.length` tokens that one epoch of reconstruction sees."""
        return self.reconstruct.sequences * ((self.calibration.length or 0) // self.reconstruct.length)

    def resolve(self, hidden_size: int, max_length: int, processes: int = 1) -> "LosaConfig":
        """A copy with every field decided that depends on the model, or on how many processes train it.

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
        config.reconstruct.length = min(config.reconstruct.length, config.calibration.length or 1)
        if config.train.batch_size is None:  # updates of few tokens learn more from as many (LOG.md); a row for every process
            rows = UPDATE_TOKENS // (config.train.length or 1) if config.train.whole else ADAPTER_ROWS
            config.train.batch_size = max(1, -(-rows // processes)) * processes
        # The released 2e-4 was set for adapters and a hidden size of 4096. Adam's steps scale with 1 / width (muP,
        # https://arxiv.org/abs/2203.03466); docs/LOG.md has the sweeps that agree. Capped for toy widths.
        if config.train.lr is None:
            rate, most = (WHOLE_RATE, 3e-3) if config.train.whole else (2e-4 * 4096, 5e-3)
            config.train.lr = min(most, round(rate / hidden_size, 8))
        if config.reconstruct.lr is None:
            config.reconstruct.lr = min(3e-3, round(RECONSTRUCTION_RATE / hidden_size, 8))
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
        made: LosaConfig = build(cls, values)
        return made

    @classmethod
    def load(cls, path: str | None = None, preset: str | None = None, overrides: dict[str, Any] | None = None) -> "LosaConfig":
        """Defaults, then `preset` (or several, separated by commas), then the YAML file `path`, then `overrides` (dotted keys).

        Raises:
            ValueError: as `from_dict`; no such preset; the YAML is not a mapping.
        """
        values = read_presets(preset)
        for given in (read_config(path) if path is not None else {}, nested(overrides or {})):
            merge(values, current_names(cls, given))
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
        merge(values, parse_yaml(folder.joinpath(f"{name}.yaml").read_text("utf-8"), name))
    return values
