"""The main job on a model and a text that ship with the package: offline, about two minutes on two CPU cores.

The model is a small real Llama trained on 94 English novels (`demo_assets/novels-4m`, with its card); the texts are excerpts of
24 of these novels to train on, and of three that the model never saw to measure on.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.api import prune, run
from losa.config import LosaConfig
from losa.models import load
from losa.session import check_request
from losa.system.output import claim

PROMPT = "The old man looked at her and said"


@dataclass(frozen=True)
class DemoResult:
    """The record of the run and a sample of each model."""

    record: dict[str, Any]
    samples: dict[str, str]


def assets() -> Path:
    """Where the package keeps the demo's model and texts."""
    return Path(str(resources.files("losa").joinpath("demo_assets")))


def demo_config(output: str | None) -> LosaConfig:
    """A `losa run` as a user would write it, small enough for a demo."""
    folder = assets()
    values = {
        "model": str(folder / "novels-4m"),
        "output": output,
        "sparsity": 0.7,
        "train": {"data": str(folder / "train.txt"), "tokens": 400_000},
        "calibration": {"sequences": 32, "rmi_sequences": 32},
        "eval": {"data": str(folder / "held.txt")},
    }
    return LosaConfig.from_dict(values)


def demo(output: str | None = None, overwrite: bool = False) -> DemoResult:
    """Runs it: dense, pruned only, LoSA.

    Args:
        output: directory to leave the sparse checkpoint in; nothing is written when None.
        overwrite: replace what an earlier command left there.
    """
    config = demo_config(output)
    with claim(output):
        check_request(config, training=True, overwrite=overwrite)  # before the first half, which writes nothing
        return _demo(config, overwrite)


def _demo(config: LosaConfig, overwrite: bool) -> DemoResult:
    samples = {}
    model, tokenizer = load(config)
    samples["dense"] = sample(model, tokenizer)
    uniform = LosaConfig.from_dict(config.to_dict() | {"output": None, "rate_band": 0.0})
    samples["pruned only"] = sample(prune(model, tokenizer, uniform), tokenizer)
    model, tokenizer = load(config)
    model = run(model, tokenizer, config, overwrite=overwrite, claimed=True)
    samples["LoSA"] = sample(model, tokenizer)
    return DemoResult(model.losa_record, samples)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str = PROMPT, tokens: int = 60) -> str:
    """A continuation of `prompt`, the same random numbers every time."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
