"""`losa eval`: a checkpoint, a text, a table."""

from pathlib import Path
from typing import Any

from losa.checkpoint import RECORD, read_record
from losa.config import LosaConfig
from losa.data import evaluation_text, windows
from losa.environment import resolve_device
from losa.evaluation.perplexity import perplexity
from losa.models import load, max_length


def default_lengths(longest: int) -> list[int]:
    """The window lengths that papers report, 2048 and 4096, as far as the model allows; else the longest it allows."""
    return [length for length in (2048, 4096) if length <= longest] or [longest]


def evaluate_checkpoint(config: LosaConfig, data: str, lengths: list[int], most: int | None) -> list[dict[str, Any]]:
    """Perplexity of the checkpoint `config.model` on the text `data` at each window length.

    Args:
        lengths: in tokens; `default_lengths` when empty.
        most: use at most so many windows of each.

    Returns:
        One dict a length: `model`, `data`, `window` (tokens), `windows` (their number), `perplexity`.

    Raises:
        ValueError: a length is beyond the model's, or the text is shorter than a window.
    """
    device = resolve_device(config.device)
    text = evaluation_text(data)
    model, tokenizer = load(config)
    longest = max_length(model.config)
    lengths = lengths or default_lengths(longest)
    if max(lengths) > longest:
        raise ValueError(f"window length {max(lengths)} is beyond the model's {longest} tokens")
    model.to(device)
    results = []
    for length in lengths:
        ids_ST = windows(text, tokenizer, length, most)
        value = perplexity(model, ids_ST, label=f"perplexity at {length}")
        results.append({"model": config.model, "data": data, "window": length, "windows": len(ids_ST), "perplexity": value})
    return results


def recorded_text(directory: str) -> str:
    """The text that the run which made a checkpoint was evaluated on.

    Raises:
        ValueError: no record of a run there, or it used a part of its training text.
    """
    record = Path(directory) / RECORD
    text = read_record(Path(directory))["config"]["eval"]["data"] if record.is_file() else None
    if text is None:
        raise ValueError(f"{directory} names no evaluation text; give one with --data")
    return str(text)
