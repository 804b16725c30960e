"""A toy to run end to end in about a second: a two-block Llama on disk, a character tokenizer, and a text it can learn."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from losa.adapter import masked_linears
from losa.api import run
from losa.commands.toy import TOY, toy_tokenizer
from losa.config import LosaConfig
from losa.models import load
from losa.report.page import PAGE
from losa.system.output import RECORD

WORDS = ["THE", "QUICK", "BROWN", "FOX", "JUMPS", "OVER", "A", "LAZY", "DOG", "WHILE", "SIX", "WIZARDS", "BOX"]


def toy_model(dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**TOY, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 63, **sizes})
    return LlamaForCausalLM(config).to(dtype).eval()


def save_toy(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", talks: bool = True, **sizes: Any) -> Path:
    """A checkpoint directory with tokenizer and generation configuration. One that does not talk ends with its first letter."""
    model = toy_model(dtype, **sizes)
    ends = 63 if talks else list(range(1, 64))
    model.generation_config = GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.25)
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


# Rows of the tasks with the fields that the hub's have, for tests that reach no hub.
HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["is using wrap.", "is ripping tiles off.", "sings.", "starts pulling up roofing."],
            "label": "3",
        },
        {
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to dry a rose [title] Cut it early. [step] The stem should be dry.",
            "ctx_b": "",
            "endings": ["Hang it. [substeps] Wait.", "Eat it.", "Paint [www.roses.org] it.", "Sing."],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "Ann thanked Sue because _ had helped.", "option1": "Ann", "option2": "Sue", "answer": "2"},
        {"sentence": "The cup broke as the _ was hard.", "option1": "floor", "option2": "cup", "answer": "1"},
    ],
    "boolq": [
        {"passage": "Rain is water.", "question": "is rain wet", "label": 1},
        {"passage": "Stone is hard.", "question": "is a stone soft", "label": 0},
    ],
    "openbookqa": [
        {
            "question_stem": "Sharks live in",
            "choices": {"text": ["the sea", "trees", "sand", "books"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
    ],
    "piqa": [
        {"goal": "Keep soup warm", "sol1": "Cover the pot.", "sol2": "Freeze it.", "label": 0},
        {"goal": "Dry a shirt", "sol1": "Wet it.", "sol2": "Hang it up.", "label": 1},
    ],
    "arc_easy": [
        {
            "question": "Which is a gas?",
            "choices": {"text": ["iron", "air", "sand", "milk"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
    ],
    "arc_challenge": [
        {
            "question": "What do plants need?",
            "choices": {"text": ["light", "shoes", "salt", "noise"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
    ],
    "rte": [{"sentence1": "Dana died at 44.", "sentence2": "Dana lived.", "label": 0}],
    "lambada_openai": [
        {"text": 'He took the stone.\n\n"Keep it," she said, and so he kept the stone'},
        {"text": "The old man looked at the sea, and the sea looked at the old man"},
    ],
}


def _query(row: dict[str, Any]) -> dict[str, Any]:
    """A row of HellaSwag as it is spread in one piece: only what WikiHow's markup leaves behind is gone."""
    plain = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".strip()
    texts = [plain, *row["endings"]]
    for mark, put in ((" [title]", ". "), ("[header]", ""), ("[step]", ""), ("[substeps]", ""), ("  ", " ")):
        texts = [text.replace(mark, put) for text in texts]
    return {"query": texts[0], "choices": texts[1:], "gold": int(row["label"])}


def save_tasks(folder: Path) -> Path:
    """`HUB_ROWS` as `--task-data` wants them."""

    def lines(file: str, rows: list[dict[str, Any]]) -> None:
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    for task, rows in HUB_ROWS.items():
        if task == "hellaswag":
            lines("hellaswag/hellaswag_val.jsonl", [_query(row) for row in rows])
        elif task == "lambada_openai":
            parts = [row["text"].rpartition(" ") for row in rows]
            lines("lambada/llm-foundry_lambada_openai.jsonl", [{"context": a, "continuation": b} for a, _, b in parts])
        else:
            local = [{**row, "answer": bool(row["label"])} for row in rows] if task == "boolq" else rows
            Dataset.from_list(local).save_to_disk(folder / task / "validation")
    return folder


def toy_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration of a toy run in `folder`, where `save_toy` and `save_text` left `model` and `text.txt`: the paper's method,
    with adapters in three dynamic steps."""
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": str(folder / "sparse"),
        "sparsity": 0.6,
        "pruner": "wanda",
        "rates": "rmi",
        "steps": 3,
        "reconstruct": {"epochs": 0},
        "device": "cpu",
        "calibration": {"sequences": 8, "rmi_sequences": 6, "length": 32},
        "train": {"weights": "adapters", "data": str(folder / "text.txt")}
        | {"tokens": 3840, "length": 32, "lr": 0.01, "last_share": 0.6},
        "eval": {"length": 32, "windows": 16},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return values


def toy_config(folder: Path, **changes: Any) -> LosaConfig:
    return LosaConfig.from_dict(toy_values(folder, **changes))


def set_up(folder: Path, talks: bool = False, **model: Any) -> Path:
    """A folder with everything a toy run reads. Its model does not talk unless asked to: three samples of forty tokens are a
    fifth of a toy run."""
    folder.mkdir(parents=True, exist_ok=True)
    save_toy(folder / "model", talks=talks, **model)
    save_text(folder / "text.txt")
    return folder


def toy_run(
    folder: Path, resume: bool = False, callbacks: tuple[TrainerCallback, ...] = (), overwrite: bool = False, **changes: Any
) -> PreTrainedModel:
    config = toy_config(folder, **changes)
    return run(*load(config), config, resume=resume, overwrite=overwrite, callbacks=callbacks)


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
    (record["evaluation"]["held_out"] or {}).pop("source", None)
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


class Look(TrainerCallback):
    """Notes, at the start of each training, masks, ranks and what is in the output directory."""

    def __init__(self, output: Path) -> None:
        self.output, self.masks, self.ranks, self.stages = output, [], [], []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        layers = masked_linears(kwargs["model"])
        self.masks.append({name: layer.keep_OI.clone() for name, layer in layers.items()})
        self.ranks.append({name: layer.rank for name, layer in layers.items()})
        self.stages.append(sorted(path.name for path in (self.output / ".losa").iterdir() if (path / "stage.json").exists()))
