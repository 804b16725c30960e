"""A toy to run end to end in about a second: a two-block Llama on disk, a character tokenizer, and a text it can learn."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from losa.checkpoint import RECORD
from losa.config import LosaConfig
from losa.doctor import TOY, toy_tokenizer
from losa.method import run
from losa.models import load
from losa.report.page import PAGE

WORDS = ["THE", "QUICK", "BROWN", "FOX", "JUMPS", "OVER", "A", "LAZY", "DOG", "WHILE", "SIX", "WIZARDS", "BOX"]


def toy_model(dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**TOY, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 63, **sizes})
    return LlamaForCausalLM(config).to(dtype).eval()


def save_toy(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **sizes: Any) -> Path:
    """A checkpoint directory with tokenizer and generation configuration."""
    model = toy_model(dtype, **sizes)
    model.generation_config = GenerationConfig(eos_token_id=63, do_sample=True, temperature=0.25)
    model.save_pretrained(folder, max_shard_size=shard)
    toy_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, characters: int = 40_000, seed: int = 0) -> Path:
    """Sentences of random words."""
    pick = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += " ".join(pick.choices(WORDS, k=7)) + ". "
    path.write_text(text[:characters], encoding="utf-8")
    return path


def toy_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration of a toy run in `folder`, where `save_toy` and `save_text` left `model` and `text.txt`."""
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": str(folder / "sparse"),
        "sparsity": 0.6,
        "steps": 3,
        "device": "cpu",
        "calibration": {"sequences": 8, "rmi_sequences": 6, "length": 32},
        "train": {"data": str(folder / "text.txt"), "tokens": 6400, "length": 32, "lr": 0.01, "last_share": 0.6},
        "eval": {"length": 32, "windows": 16},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return values


def toy_config(folder: Path, **changes: Any) -> LosaConfig:
    return LosaConfig.from_dict(toy_values(folder, **changes))


def set_up(folder: Path, **model: Any) -> Path:
    """A folder with everything a toy run reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_toy(folder / "model", **model)
    save_text(folder / "text.txt")
    return folder


def toy_run(folder: Path, resume: bool = False, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> PreTrainedModel:
    config = toy_config(folder, **changes)
    return run(*load(config), config, resume=resume, callbacks=callbacks)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def pruned_names(directory: Path) -> list[str]:
    return [name for name, value in tensors(directory).items() if ".layers." in name and value.ndim == 2]


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / RECORD).read_text("utf-8"))


def comparable(directory: Path) -> dict[str, Any]:
    """`losa.json` without what may differ between equal runs: clock and place."""
    record = record_of(directory)
    del record["seconds"], record["config"]["output"]
    return record


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Every file but the record and the report, which tell the time, bit for bit."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (RECORD, PAGE)}


class Stop(Exception):  # noqa: N818 - not an error
    """What a test raises to end a run."""


class StopAtStep(TrainerCallback):
    """Ends the run where the training of dynamic step `step` begins, or right before its update `update`."""

    def __init__(self, step: int, update: int | None = None) -> None:
        self.left, self.update = step, update

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0 and self.update is None:
            raise Stop

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left == 0 and state.global_step + 1 == self.update:
            raise Stop
