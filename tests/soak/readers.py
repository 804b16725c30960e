"""Every reader of the package, with samples of what it reads: `TARGETS`.

What a reader does with a file is all that a command does with it before hours of work begin.
"""

import contextlib
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from conftest import make_tiny_model
from helpers import Stop, StopAtStep, save_tasks, save_text, save_toy, set_up, toy_run, toy_values
from pyarrow import parquet
from soak.mutate import (
    Mutator,
    mutate_bytes,
    mutate_gzip,
    mutate_json,
    mutate_lines,
    mutate_number,
    mutate_safetensors,
    mutate_yaml,
)
from test_report import BENCH, EVALUATION
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from losa.adapter import attach
from losa.commands.inspect import inspect
from losa.commands.toy import toy_tokenizer
from losa.comparison import CompareConfig, _read_row
from losa.config import LosaConfig
from losa.data import evaluation_documents, load_documents, pieces, training_blocks
from losa.evaluation.checkpoint import recorded_text, save_results
from losa.evaluation.perplexity import perplexity
from losa.evaluation.zeroshot import local_rows
from losa.models import load
from losa.report.page import refresh
from losa.runtime.files import pack_checkpoint, unpack_checkpoint
from losa.runtime.generate import generate
from losa.session.stages import latest_position, latest_stage, load_stage

PROMPT = "THE QUICK BROWN FOX."


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        sample: the folder that it reads, below that of all samples.
        files: of the sample, one of which is mutated, with how.
        read: given a folder like the sample.
    """

    sample: str
    files: dict[str, Mutator]
    read: Callable[[Path], Any]


def save_samples(folder: Path) -> None:
    """Everything that `TARGETS` read, once."""
    (folder / "where.txt").write_text(str(folder), "utf-8")  # a stage knows the paths of its run; mutants are read in a copy
    set_up(folder / "work", dtype=torch.bfloat16)
    toy_run(folder / "work", steps=1, train={"tokens": 640}, eval={"data": str(folder / "work" / "text.txt")})
    (folder / "work" / "sparse").rename(folder / "finished")
    (folder / "finished" / "eval.json").write_text(json.dumps(EVALUATION), "utf-8")
    (folder / "finished" / "bench.json").write_text(json.dumps(BENCH), "utf-8")
    model = save_toy(folder / "model", torch.bfloat16)
    _byte_tokenizer().save_pretrained(folder / "tokenizer")
    shutil.copy(model / "config.json", folder / "tokenizer")
    save_toy(folder / "shards", torch.bfloat16, shard="20KB")
    with contextlib.suppress(Stop):
        toy_run(folder / "work", callbacks=(StopAtStep(2),))
    (folder / "work" / "sparse").rename(folder / "stopped")
    pack_checkpoint(folder / "finished", folder / "packed")
    pack_checkpoint(folder / "finished", folder / "int8", "int8")
    text = save_text(folder / "text.txt", 4000).read_text("utf-8")
    _save_data(folder / "data", text)
    _save_configs(folder)
    save_tasks(folder / "tasks")
    for family in FAMILIES:
        make_tiny_model(family).bfloat16().save_pretrained(folder / family)
        toy_tokenizer().save_pretrained(folder / family)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with every part that a tokenizer file may have."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([PROMPT, "it was the best of times, it was the worst of times"], trainer)
    pair = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", pair)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _save_data(folder: Path, text: str) -> None:
    folder.mkdir()
    records = [{"text": text[:900]}, {"instruction": "Add.", "input": "1 2", "output": "3"}, "a plain text"]
    lines = "\n".join(map(json.dumps, records)).encode()
    (folder / "a.txt").write_text(text, "utf-8")
    (folder / "b.json").write_text(json.dumps(records), "utf-8")
    (folder / "c.jsonl").write_bytes(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "f.csv").write_text('text,kind\none,a\n"two, with a comma",b\n', "utf-8")
    (folder / "e.raw").write_text(" = Title = \n\n " + text[:500], "utf-8")
    parquet.write_table(pa.table({"text": [text[:300], "two"], "kind": [["a"], []]}), folder / "g.parquet")
    with pa.OSFile(str(folder / "h.jsonl.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(lines)


def _save_configs(folder: Path) -> None:
    data = str(folder / "text.txt")
    values = toy_values(folder) | {"model": str(folder / "model"), "protect": [0]}
    values["train"]["data"] = data
    (folder / "yaml").mkdir()
    (folder / "yaml" / "run.yaml").write_text(LosaConfig.from_dict(values).to_yaml(), "utf-8")
    run = {"model": str(folder / "model"), "train": {"data": data, "tokens": 640}, "eval": {"data": data}}
    comparison = {"output": str(folder / "compared"), "run": run, "methods": ["dense", "Wanda"], "targets": ["0.5", "2:4"]}
    comparison |= {"seeds": [0, 1], "variants": {"mine": {"method": "Wanda + LoSA", "steps": 2}}}
    (folder / "yaml" / "compare.yaml").write_text(json.dumps(comparison), "utf-8")
    (folder / "rows").mkdir()
    row = {"perplexity": 9.5, "masked_again": None, "sparsity": 0.5, "context": None, "tokens": 640, "samples": None}
    row |= {"seconds": {"training": 3.0}, "model": "model", "data": ["text.txt", None, "text.txt"], "date": "2026-11-25"}
    row |= {"evaluation": {"data": "text.txt", "window": 32, "windows": 4}, "config": {}, "steps": []}
    (folder / "rows" / "row.json").write_text(json.dumps(row), "utf-8")


def _open_and_speak(folder: Path) -> None:
    model, tokenizer = load(folder)
    generate(model, tokenizer, PROMPT, lambda piece: None, tokens=2, temperature=0.7)


def _measure(folder: Path) -> None:
    model, tokenizer = load(folder)
    perplexity(model, training_blocks([PROMPT * 20], tokenizer, 16, 2))


def _tokenize(folder: Path) -> None:
    from losa.models.opening import check_vocabulary, open_tokenizer

    tokenizer = open_tokenizer(str(folder))
    check_vocabulary(tokenizer, 320, str(folder))
    blocks = training_blocks(pieces([PROMPT * 30, "naïve — 你好\t\n 1,024"], 0), tokenizer, 8, 4)
    assert int(blocks.max()) < 320
    tokenizer.decode(blocks[0], skip_special_tokens=True)


def _in_and_out(work: Callable[[Path, Path], Any]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        output = folder.with_name("written")
        shutil.rmtree(output, ignore_errors=True)
        work(folder, output)

    return read


def _add_result(folder: Path) -> None:
    save_results(str(folder), EVALUATION)
    for path in folder.glob("eval-*.json"):
        path.unlink()


def _texts(folder: Path) -> None:
    load_documents(str(folder))
    for file in folder.iterdir():  # beside records, prose is left out
        load_documents(str(file))
    evaluation_documents(str(folder / "e.raw"))


def _compare_config(folder: Path) -> None:
    CompareConfig.load(str(folder / "compare.yaml"), {})


def _row(folder: Path) -> None:
    config = CompareConfig.load(str(folder.with_name("yaml") / "compare.yaml"), {})
    _read_row(config.rows()[1], folder / "row.json")


def _resume(folder: Path) -> None:
    values = toy_values(Path(folder.with_name("where.txt").read_text("utf-8")) / "work")
    config = LosaConfig.from_dict(values).resolve(32, 64)
    manifest = latest_stage(folder, config)
    if manifest is not None:
        latest_position(folder, manifest, 1)
        load_stage(
            manifest,
            attach(load(folder.with_name("model"))[0], config.adapter.max_rank, config.adapter.scale),
            torch.device("cpu"),
        )


def _tasks(folder: Path) -> None:
    for task in ("hellaswag", "lambada_openai", "piqa"):
        local_rows(task, folder)


MODEL_TENSORS = {"model.safetensors": mutate_safetensors}
FAMILIES = ("gemma3_text", "gpt_neox", "opt", "phi3", "qwen3")
TASK_FILES = ("hellaswag/hellaswag_val.jsonl", "lambada/llm-foundry_lambada_openai.jsonl")
ARROW = "piqa/validation/data-00000-of-00001.arrow"
TARGETS = {
    "config": Target("model", {"config.json": mutate_json}, _measure),
    "generation": Target("model", {"generation_config.json": mutate_json}, _open_and_speak),
    "tokenizer": Target("tokenizer", {"tokenizer.json": mutate_json, "tokenizer_config.json": mutate_json}, _tokenize),
    "weights": Target("model", MODEL_TENSORS, _measure),
    "weights, inspected": Target("model", MODEL_TENSORS, inspect),
    "weights, packed": Target("model", MODEL_TENSORS | {"config.json": mutate_json}, _in_and_out(pack_checkpoint)),
    "index": Target("shards", {"model.safetensors.index.json": mutate_json}, _measure),
    "header": Target("packed", {"config.json": mutate_json} | MODEL_TENSORS, _open_and_speak),
    "header, int8": Target("int8", {"config.json": mutate_json} | MODEL_TENSORS, _open_and_speak),
    "header, inspected": Target("packed", {"config.json": mutate_json} | MODEL_TENSORS, inspect),
    "header, unpacked": Target("packed", {"config.json": mutate_json} | MODEL_TENSORS, _in_and_out(unpack_checkpoint)),
    "record": Target("finished", dict.fromkeys(("losa.json", "eval.json", "bench.json"), mutate_json), refresh),
    "record, text": Target("finished", {"losa.json": mutate_json}, lambda folder: recorded_text(str(folder))),
    "eval.json": Target("finished", {"eval.json": mutate_json}, _add_result),
    "run.yaml": Target("yaml", {"run.yaml": mutate_yaml}, lambda folder: LosaConfig.load(str(folder / "run.yaml"))),
    "run.yaml, values": Target("yaml", {"run.yaml": mutate_number}, lambda folder: LosaConfig.load(str(folder / "run.yaml"))),
    "compare.yaml": Target("yaml", {"compare.yaml": mutate_yaml}, _compare_config),
    **{f"config, {family}": Target(family, {"config.json": mutate_json}, _measure) for family in FAMILIES},
    "tasks": Target(
        "tasks",
        dict.fromkeys(TASK_FILES, mutate_lines) | {ARROW: mutate_bytes},
        _tasks,
    ),
    "stage": Target(
        "stopped",
        {".losa/02-pruned/stage.json": mutate_json, ".losa/02-pruned/state.safetensors": mutate_safetensors},
        _resume,
    ),
    "row": Target("rows", {"row.json": mutate_json}, _row),
    "data": Target(
        "data",
        {"a.txt": mutate_bytes, "b.json": mutate_json, "c.jsonl": mutate_lines, "d.jsonl.gz": mutate_gzip, "e.raw": mutate_bytes}
        | dict.fromkeys(("f.csv", "g.parquet", "h.jsonl.zst"), mutate_bytes),
        _texts,
    ),
}
