"""What a record says, as words and tables: the one source of the model card, the page and the terminal's tables.

Pure functions of `losa.json` and of what was measured later, `eval.json` and `bench.json`. What they return is for publication:
of a local path only the last part is shown.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from losa.config import LosaConfig
from losa.runtime.values import TYPES

TITLES = {
    "dense": "dense",
    "pruned": "pruned only",
    "reconstructed": "reconstructed",
    "unrounded": "before rounding",
    "losa": "LoSA",
    "made": "result",
}
# The finished model's perplexity has the first of these names that there is: of `losa run`, `losa compare` and `losa prune`.
RESULTS = ("losa", "made", "pruned")
# Of `losa run` and `losa prune`; every other key is a --set.
OPTIONS = {
    "output": "--output",
    "sparsity": "--sparsity",
    "train.data": "--data",
    "calibration.data": "--calibration",
    "eval.data": "--eval-data",
    "pruner": "--pruner",
    "pattern": "--pattern",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `words` columns are words, the others numbers."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    words: int = 1


def result_name(found: Mapping[str, float]) -> str:
    """Which of a record's perplexities is that of the finished model."""
    return next((name for name in RESULTS if name in found), RESULTS[-1])


def gap_closed(found: Mapping[str, float]) -> float | None:
    """Share of the log-perplexity that pruning lost and training won back; above 1 is better than dense.

    None where nothing was trained, one of the three was not measured, pruning lost nothing, or a perplexity is not finite.
    """
    if not {"dense", "pruned", "losa"} <= found.keys():
        return None
    if not found["dense"] < found["pruned"] < math.inf or not math.isfinite(found["losa"]):
        return None
    return math.log(found["pruned"] / found["losa"]) / math.log(found["pruned"] / found["dense"])


def warning(record: Mapping[str, Any]) -> str | None:
    """What to do about a result that training made worse, or whose perplexity is more than twice the dense model's; None for any
    other."""
    found = record["perplexity"]
    last = found[result_name(found)]
    worse = ""
    if last > found.get("pruned", last):
        worse = f"Training made it worse than pruning left it ({found['pruned']:.4g}): lower train.lr."
    if "dense" not in found or last <= 2 * found["dense"]:
        return worse or None
    far = f"The result is far from dense (perplexity {last:.4g} against {found['dense']:.4g}, more than twice)."
    if record["kind"] == "prune":
        return f"{far} Pruning alone does that; losa run recovers it by training what is left."
    lower = "Lower --sparsity" if record["config"]["pattern"] == "unstructured" else "Take a pattern that keeps more (--pattern)"
    return f"{far} {lower}, train on more tokens (train.tokens), or use text closer to yours (--data). {worse}".rstrip()


def size(count: float) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def public(source: str) -> str:
    """A hub name as it is; of a local path only the last part, for a card is published and directories are private."""
    path = Path(source)
    return path.name if path.is_absolute() or source.startswith((".", "~")) or path.exists() else source


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every path made public."""
    shown: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for part, key in ((shown, "model"), (shown, "output"), *((shown[name], "data") for name in ("calibration", "train", "eval"))):
        part[key] = part[key] and public(part[key])
    return shown


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `losa.json` with every path made public."""
    used = dict(record["evaluation"]) | {"data": public(record["evaluation"]["data"])}
    if held_out := used.get("held_out"):
        used["held_out"] = held_out | {"source": public(held_out["source"])}
    return dict(record) | {"config": public_config(record["config"]), "evaluation": used}


def public_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `eval.json` with every path made public."""
    rows = [row | {key: public(row[key]) for key in ("model", "data")} for row in evaluation["perplexity"]]
    return dict(evaluation) | {"perplexity": rows}


def command(record: Mapping[str, Any]) -> str:
    """The command that makes the same result again: every key that differs from the defaults, local paths without directories.

    Fields that were decided when the model was known are spelled out, so that the line outlives other defaults.
    """
    config, kind, processes = public_config(record["config"]), record["kind"], record.get("processes", 1)
    preset = "one-shot" if kind == "prune" else None
    given = {key: config[key] for key in ("sparsity", "pattern", "rates")}  # other defaults follow from these
    plain = LosaConfig.load(preset=preset, overrides=given).to_dict()
    rates = LosaConfig.load(preset=preset).rates
    defaults = dict(_leaves(plain | {"sparsity": None, "pattern": "unstructured", "rates": rates}))
    launcher = "losa" if processes == 1 else f"torchrun --nproc-per-node {processes} -m losa"
    lines = [f"{launcher} {kind} {shlex.quote(config.pop('model'))}"]
    for key, value in _leaves(config):
        if value == defaults[key]:
            continue
        named = key in OPTIONS and not (kind == "prune" and key == "train.data")
        lines.append(shlex.join([OPTIONS[key], str(value)] if named else ["--set", f"{key}={_yaml(value)}"]))
    return " \\\n  ".join(lines)


def _yaml(value: Any) -> str:
    """A value as `--set` reads it back; a text in quotes where YAML would read something else."""
    if not isinstance(value, str):
        return json.dumps(value)
    return yaml.safe_dump(value, allow_unicode=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def layer_bytes(record: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the decoder's linear layers in bfloat16, dense and packed, computed from their weights and zeros."""
    weights, density = record["sparsity"]["weights"], 1 - record["sparsity"]["achieved"]
    packed = {f"packed, {name} values": weights * kind.bytes_per_weight(density) for name, kind in TYPES.items()}
    return {"dense, bfloat16": 2.0 * weights} | packed


def headline(
    record: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None, bench: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """The few numbers to read first, each with what it is."""
    found, sparsity = record["perplexity"], record["sparsity"]
    last = result_name(found)
    before = ", ".join(f"{TITLES[name]} {found[name]:.2f}" for name in ("dense", "pruned") if name in found and name != last)
    dense, packed, *_ = layer_bytes(record).values()
    numbers = [
        (f"{sparsity['achieved']:.2%}", f"of the weights are zero; asked: {sparsity['asked']:.2%}"),
        (f"{found[last]:.2f}", f"perplexity; {before}" if before else "perplexity"),
    ]
    if (closed := gap_closed(found)) is not None:
        numbers.append((f"{closed:.1%}", "of the gap in log-perplexity between pruned only and dense is closed"))
    numbers.append((f"{packed / dense:.2f}x", f"the size of the dense layers, packed: {size(packed)} of {size(dense)}"))
    if bench:
        best = max((row for row in bench["rows"] if row["name"] != "dense"), key=lambda row: row["tokens_per_second"])
        ratio = best["tokens_per_second"] / _dense(bench)["tokens_per_second"]
        numbers.append((f"{ratio:.1f}x", f"the speed of dense: {best['tokens_per_second']:.1f} tokens/s, {best['name']}"))
    if evaluation and (mean := evaluation.get("mean_acc")):
        shown = f"mean accuracy of {len(mean['tasks'])} zero-shot tasks"
        if mean["acc_stderr"] is not None:  # of one item there is none
            shown += f", ± {100 * mean['acc_stderr']:.1f}"
        numbers.append((f"{mean['acc']:.1%}", shown))
    return numbers


def overview(record: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> Table:
    """Quality, size and, where it was measured, speed beside each other."""
    found = layer_bytes(record)
    dense, packed = found["dense, bfloat16"], found["packed, bfloat16 values"]
    names = ["dense", *[name for name in record["perplexity"] if name != "dense"]]
    speeds = {row["name"]: row["tokens_per_second"] for row in (bench or {}).get("rows", [])}
    last = names[-1]
    rows = []
    for name in names:
        zeros = "0 %" if name == "dense" else f"{record['sparsity']['achieved']:.2%}"
        bytes_ = dense if name == "dense" else packed
        speed = speeds.get("dense" if name == "dense" else "sparse bfloat16") if name in ("dense", last) else None
        quality = f"{record['perplexity'][name]:.2f}" if name in record["perplexity"] else ""  # dense may not be measured
        cells = (TITLES.get(name, name), quality, zeros, size(bytes_), f"{bytes_ / dense:.2f}")
        rows.append((*cells, *([f"{speed:.1f}" if speed else ""] if speeds else [])))
    head = ("model", "perplexity", "zeros", "decoder layers", "of dense", *(["tokens/s"] if speeds else []))
    note = "Sizes of the decoder's linear layers: dense in bfloat16, sparse ones packed by losa pack (computed). "
    note += "Tokens per second as losa bench measured them." if speeds else "losa bench --save adds tokens per second."
    return Table(head, rows, note)


def samples(record: Mapping[str, Any]) -> Table | None:
    """What each model says after the same words; None where it was not asked."""
    found = record.get("samples")
    if not found:
        return None
    rows = [(TITLES.get(name, name), text or "(nothing)") for name, text in found.items() if name != "prompt"]
    return Table(("model", "goes on with"), rows, f"After: {found['prompt']}", words=2)


def openers(record: Mapping[str, Any]) -> Table:
    """Which software does what with the checkpoint."""
    alike = "as a dense model: zeros take the room and the time of other weights"
    two_four = " (its 2:4 kernels want files of their own format)" if record["config"]["pattern"] == "2:4" else ""
    values = record["config"].get("values")
    pack = f"losa pack --values {values} loses nothing and" if values else "losa pack"
    rows = [
        ("transformers", "opens it as it is; as large and as fast as dense"),
        ("losa", f"{pack} stores the zeros in a bit each; losa.load, losa chat and transformers with losa open that"),
        (
            "vLLM",
            f"opens it {alike}{two_four}; with the plug-in of losa, --quantization losa packs it, and the packed form opens",
        ),
        ("llama.cpp", f"reads it after its own convert_hf_to_gguf.py, {alike}"),
    ]
    return Table(("software", "what it does with this checkpoint"), rows, "llama.cpp is not part of LoSA's tests.", words=2)


def perplexities(record: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> Table:
    """What the run measured, and what was measured later."""
    used = record["evaluation"]
    definition = "answer token, windowed" if used.get("counts") == "answers" else "token, windowed"
    place = (definition, public(used["data"]), str(used["window"]), f"{used['windows']:,} windows")
    rows = [(TITLES.get(name, name), *place, f"{value:.3f}") for name, value in record["perplexity"].items()]
    for row in (evaluation or {}).get("perplexity", []):
        over = next(f"{row[unit]:,} {unit}" for unit in ("windows", "documents") if unit in row)
        place = (row["definition"], public(row["data"]), str(row["window"]), over)
        rows.append((public(row["model"]), *place, f"{row['perplexity']:.3f}"))
    note = "Windows do not overlap; each is scored on its own. Only equal definitions, texts and windows compare."
    return Table(("model", "definition", "text", "window, tokens", "over", "perplexity"), rows, note, words=3)


def zero_shot(evaluation: Mapping[str, Any]) -> Table:
    """Accuracies of lm-eval's tasks, in percent, with one standard error."""
    rows = [
        (task, found["split"], *(str(found[key]) for key in ("version", "shots", "items")), *_accuracies(found))
        for task, found in evaluation["tasks"].items()
    ]
    if mean := evaluation.get("mean_acc"):
        rows.append((f"mean of {len(mean['tasks'])}", "", "", "", "", *_accuracies(mean)))
    note = f"lm-eval {evaluation['lm_eval']}, {evaluation['date']}. Percent, ± one standard error."
    return Table(("task", "split", "version", "shots", "items", "accuracy", "normalised accuracy"), rows, note, words=2)


def _accuracies(found: Mapping[str, Any]) -> Iterator[str]:
    """Plain and length-normalised; a task may lack one."""
    for name in ("acc", "acc_norm"):
        value, error = found.get(name), found.get(f"{name}_stderr")
        yield "" if value is None else f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


def sizes(record: Mapping[str, Any]) -> Table:
    """Of the decoder's linear layers, where all zeros are."""
    found = layer_bytes(record)
    rows = [(name, size(count), f"{count / found['dense, bfloat16']:.2f}") for name, count in found.items()]
    note = "Computed: losa pack stores a bit for every weight and a number for every weight that is not zero. "
    return Table(("linear layers of the decoder", "size", "of dense"), rows, note + "Embeddings and head come on top.")


def speed(bench: Mapping[str, Any]) -> Table:
    """What `losa bench` measured, beside the physical limit."""
    dense = _dense(bench)
    rows = [
        (
            row["name"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}x",
            f"{row['limit_tokens_per_second']:.1f}",
            f"{row['first_token_seconds']:.3f} s",
            size(row["resident_bytes"]),
            f"{row['resident_bytes'] / dense['resident_bytes']:.2f}" if dense["resident_bytes"] > 0 else "",
        )
        for row in bench["rows"]
    ]
    note = (
        f"{bench['prompt']} tokens of prompt, {bench['new']} generated, batch 1, on {bench['machine']}. Limit: reading every "
        f"weight once a token, at the {bench['bandwidth'] / 1e9:.1f} GB/s measured on this memory."
    )
    if "zeros" in bench:  # files of earlier versions do not say
        note += f" Of the blocks' weights {bench['zeros']:.0%} are zero."
    stepping = [row["name"] for row in bench["rows"] if row.get("road") == "compiled step"]
    if stepping:
        note += f" Decoded by the compiled step: {', '.join(stepping)}; the others by transformers."
    return Table(("model", "tokens/s", "speed-up", "limit", "first token", "resident", "of dense"), rows, note)


def _dense(bench: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in bench["rows"] if row["name"] == "dense")


def times(record: Mapping[str, Any]) -> Table:
    """Wall-clock time of every stage of the run."""
    seconds = record["seconds"]
    total = sum(seconds.values())
    rows = [(stage, f"{value:.1f}", f"{value / total:.0%}") for stage, value in seconds.items()]
    return Table(("stage", "seconds", "share"), [*rows, ("total", f"{total:.1f}", "")])


def origin(record: Mapping[str, Any]) -> Table:
    """What computed the result, and from which text."""
    rows = [*record["versions"].items(), ("processes", str(record.get("processes", 1)))]
    return Table(("made with", "version"), [*rows, ("text, SHA-256", record["text_sha256"])], words=2)
