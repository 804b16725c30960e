"""`losa eval`: a checkpoint, texts and tasks, a result that can be kept beside the checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.config import LosaConfig
from losa.data import (
    EvaluationText,
    evaluation_documents,
    is_wikitext,
    read_evaluation,
    read_held_out,
    training_source,
)
from losa.evaluation.perplexity import perplexity
from losa.evaluation.zeroshot import mean_accuracy
from losa.models import load, max_length
from losa.models.opening import open_config, open_tokenizer
from losa.models.precision import computing
from losa.system.doors import door, read_json
from losa.system.environment import resolve_device
from losa.system.output import EVALUATION, RECORD, check_finished, read_record
from losa.system.writing import replace, to_json

TRIAL_BYTES = 1 << 16  # written before measuring, to see that they can be; a result has fewer
BY_TOKEN, BY_ANSWER, BY_WORD = "token, windowed", "answer token, windowed", "word, lm-eval"
HELD_OUT = "held out of the training text"


@dataclass(frozen=True)
class RecordedText:
    """The text that the run which made a checkpoint was evaluated on.

    Attributes:
        run: the run's resolved configuration.
        source: of the text, or of the training text that it was held out of.
        fingerprint: of what was held out; None for a text of its own.
    """

    run: LosaConfig
    source: str
    fingerprint: str | None

    def __str__(self) -> str:
        return self.source if self.fingerprint is None else HELD_OUT

    def read(self, tokenizer: PreTrainedTokenizerBase) -> EvaluationText:
        """The text again, rendered and counted as in the run.

        Raises:
            ValueError: it is not there or not the same.
        """
        if self.fingerprint is None:
            return read_evaluation(self.source, tokenizer, self.run.train.loss_on, self.run.skip_bad_records)
        return read_held_out(self.run, self.source, tokenizer, self.fingerprint)


logger = logging.getLogger(__name__)


def default_lengths(longest: int) -> list[int]:
    """The window lengths that papers report, 2048 and 4096, as far as the model allows; else the longest it allows."""
    return [length for length in (2048, 4096) if length <= longest] or [longest]


def evaluate_checkpoint(
    config: LosaConfig,
    data: str | RecordedText | None = None,
    lengths: Sequence[int] = (),
    most: int | None = None,
    words: bool = False,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Perplexity of the checkpoint `config.model` on a text, and its accuracy on tasks.

    Args:
        data: the text; no perplexity when None.
        lengths: window lengths in tokens; when empty `default_lengths`, or of a held-out text the run's.
        most: use at most so many windows of each.
        words: word perplexity too, through lm-eval.
        tasks: names of lm-eval's tasks.
        task_data: local folder with their data; the hub when None.
        limit: at most so many items of each task.

    Returns:
        The content of `eval.json`:

        - `perplexity`: one dict a length and definition: `model`, `data`, `definition`, `window` (tokens), `windows` or
          `documents` (their number), `perplexity`;
        - `tasks`: by name, what `harness.score` returns, where the `data` came from, `hub` or `local`, and the `limit`;
        - `mean_acc`: see `zeroshot.mean_accuracy`;
        - `lm_eval`: its version, None when it measured nothing; `date`.

    Raises:
        ValueError: nothing to measure, a text or task that is not there, a length beyond the model's, a text shorter than a
            window, or lm-eval is needed and not installed, or the tokenizer lacks what it needs.
    """
    if words and data is None:
        raise ValueError("--words measures a text; give one with --data")
    if (limit is not None or task_data is not None) and not tasks:
        raise ValueError("--limit and --task-data are for tasks; give some with --tasks, such as --tasks paper")
    device = resolve_device(config.device)
    longest = max_length(open_config(config.model, config.trust_remote_code))
    if isinstance(data, RecordedText) and data.fingerprint is not None:
        lengths = lengths or [data.run.eval.length or longest]
    lengths = lengths or default_lengths(longest)
    if max(lengths) > longest:
        raise ValueError(f"window length {max(lengths)} is beyond the model's {longest} tokens")
    lm_eval = harness() if words or tasks else None
    loaded = lm_eval.load_tasks(tasks, task_data) if lm_eval and tasks else {}
    tokenizer = open_tokenizer(config.model, config.trust_remote_code)
    if lm_eval:
        lm_eval.check_tokenizer(tokenizer)
    text = None if data is None else _read(data, tokenizer, config)
    measured = {} if text is None else {length: text.windows(tokenizer, length, most) for length in lengths}
    model, tokenizer = load(config)
    model.to(device)
    rows: list[dict[str, Any]] = []
    with computing(model, device, config.dtype):
        for length, shown in measured.items():
            about = {"model": config.model, "data": str(data), "window": length}
            value = perplexity(model, shown.ids_ST, label=f"perplexity at {length}", counted_ST=shown.counted_ST)
            definition = BY_ANSWER if shown.counts == "answers" else BY_TOKEN
            rows.append({**about, "definition": definition, "windows": len(shown.ids_ST), "perplexity": value})
            if lm_eval and words:
                documents = evaluation_documents(str(data), text)
                value = lm_eval.word_perplexity(lm_eval.Scorer(model, tokenizer, length), documents, is_wikitext(str(data)))
                rows.append({**about, "definition": BY_WORD, "documents": len(documents), "perplexity": value})
        scores = score_tasks(model, tokenizer, loaded, limit) if loaded else {}
    about_tasks = {"data": "hub" if task_data is None else "local", "limit": limit}
    return _result(rows, {name: scored | about_tasks for name, scored in scores.items()}, lm_eval.version if lm_eval else None)


def score_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: Mapping[str, Any], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """What `harness.score` returns, by task, of tasks that `harness.load_tasks` loaded; in windows of the model's length."""
    lm_eval = harness()
    scorer = lm_eval.Scorer(model, tokenizer, max_length(model.config))
    return {name: lm_eval.score(scorer, task, limit) for name, task in loaded.items()}


def _read(data: str | RecordedText, tokenizer: PreTrainedTokenizerBase, config: LosaConfig) -> EvaluationText:
    if isinstance(data, RecordedText):
        return data.read(tokenizer)
    return read_evaluation(data, tokenizer, config.train.loss_on, config.skip_bad_records)


def harness() -> ModuleType:
    """`losa.evaluation.harness`, where lm-eval is; it is not installed with losa.

    Raises:
        ValueError: it is not there.
    """
    try:
        from losa.evaluation import harness as module
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError('tasks and word perplexity need lm-eval: pip install ".[eval]" in a clone of losa') from error
    return module


def _result(rows: list[dict[str, Any]], tasks: dict[str, Any], lm_eval: str | None) -> dict[str, Any]:
    today = date.today().isoformat()
    return {"perplexity": rows, "tasks": tasks, "mean_acc": mean_accuracy(tasks), "lm_eval": lm_eval, "date": today}


def check_savable(directory: str | Path, name: str = EVALUATION) -> None:
    """Before anything is measured, tries to write where `name` is to be kept.

    Raises:
        ValueError: not the directory of a finished checkpoint, or one that cannot be written to.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{directory} is not the directory of a finished checkpoint; --save keeps {name} in there")
    trial = Path(directory) / f".{name}.trial"
    with door(directory, "write to", f"; --save keeps {name} in there"):
        try:
            trial.write_bytes(bytes(TRIAL_BYTES))
        finally:
            trial.unlink(missing_ok=True)


def save_results(directory: str, result: dict[str, Any]) -> Path:
    """Adds a result to `eval.json` of a checkpoint: what was measured again, over no less, is replaced; the rest stays.

    Beside an `eval.json` that is damaged the result is kept as `eval-2.json`, or the next number that is free.
    """
    path = Path(directory) / EVALUATION
    if path.exists() or path.is_symlink():
        try:
            result = _merged(path, result)
        except ValueError as error:
            names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
            path = next(name for name in names if not name.exists() and not name.is_symlink())
            logger.warning("%s; the result is kept in %s", error, path.name)
    replace(path, to_json(result, EVALUATION))
    return path


def _merged(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What `path` holds with `result` on top.

    Raises:
        ValueError: it is damaged.
    """
    old = read_json(path)
    with door(path, "add to"):
        rows = _on_top(_by_measure(old), _by_measure(result))
        return _result([*rows.values()], _on_top(old["tasks"], result["tasks"]), result["lm_eval"] or old["lm_eval"])


def _by_measure(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Its perplexities by what they are of."""
    return {f"perplexity by {row['definition']} of {row['data']} at {row['window']}": row for row in result["perplexity"]}


def _on_top(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, by name, with `new` on top, but for what is over fewer windows, documents or items than it was."""
    found = dict(old)
    for name, now in new.items():
        over = next(key for key in ("windows", "documents", "items") if key in now)
        if name in old and old[name][over] > now[over]:
            hint = f"remove it from {EVALUATION} to keep that"
            logger.warning(
                "%s: kept what is there, over %d %s; this is over %d, so %s", name, old[name][over], over, now[over], hint
            )
        else:
            found[name] = now
    return found


def recorded_text(directory: str) -> RecordedText:
    """The text that the run which made a checkpoint was evaluated on. What was held out is looked for where it was as seen from
    the checkpoint, then where it was as seen from the run.

    Raises:
        ValueError: no record of a run there that names one; the run was interrupted.
    """
    check_finished(Path(directory))
    record = Path(directory) / RECORD
    with door(record, "use", "; give a text with --data"):
        content = read_record(Path(directory)) if record.is_file() else {}
        run = LosaConfig.from_dict(content.get("config", {}))
        held_out = content.get("evaluation", {}).get("held_out")
        where = None if held_out is None else (Path(directory, held_out["source"]), str(held_out["sha256"]))
    if run.eval.data is not None:
        return RecordedText(run, run.eval.data, None)
    if where is None:
        raise ValueError(f"{directory} names no evaluation text; give one with --data")
    beside, fingerprint = where
    return RecordedText(run, str(beside) if beside.exists() else training_source(run), fingerprint)
