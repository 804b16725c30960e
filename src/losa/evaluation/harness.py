"""lm-eval, the evaluation harness of the field, over a model that is already loaded. The only module that imports it.

All that makes a number comparable is lm-eval's own: prompts, answers, tokenisation, scores, metrics. Added are a bar, a count of
the requests that did not fit the model's window, and data that need not come from the hub.
"""

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import __version__ as version
from lm_eval import evaluate
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.evaluation.zeroshot import SPLITS, local_rows
from losa.system.progress import Loop, progress

__all__ = ["Scorer", "check_tokenizer", "load_tasks", "score", "version", "word_perplexity"]

BATCH = 8


class Scorer(HFLM):
    """lm-eval's model class, with a window and a count.

    Attributes:
        truncated: requests that were longer than the window and lost their beginning, so far.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=length)
        self.truncated = 0

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole documents, one after the other, so that the bar moves."""
        rolling = super().loglikelihood_rolling
        return [value for request in requests for value in rolling([request], disable_tqdm)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        fitting = [self._fitting(*request) for request in requests]
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(fitting, *args, **kwargs)
        return scores

    def _fitting(self, texts: Any, context: list[int], answer: list[int]) -> tuple[Any, list[int], list[int]]:
        """A request with an answer that fits: of a longer one the last `max_length` tokens, after the token before them. lm-eval
        cuts contexts itself, and ends at such an answer."""
        beyond = len(answer) - self.max_length
        return (texts, answer[beyond - 1 : beyond], answer[beyond:]) if beyond > 0 else (texts, context, answer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Before anything is measured: lm-eval asks for the token that a text begins with, whatever it scores.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        found = "the tokenizer has neither BOS nor EOS, lm-eval expects one of them for tasks and word perplexity"
        raise ValueError(f"{found}; name one in tokenizer_config.json, or measure perplexity by token alone")


class _Ticks:
    """What lm-eval tells every answered request; it takes it for a cache."""

    def __init__(self, bar: Loop, task: Task) -> None:
        self.bar, self.task = bar, task

    def add_partial(self, *_: Any) -> None:
        self.bar.total = len(self.task.instances)
        self.bar.update()


@cache
def manager() -> TaskManager:
    """lm-eval's index of its tasks, thousands of files that take seconds to read."""
    return TaskManager()


def load_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Task]:
    """lm-eval's tasks with their data, by name; a group or tag stands for its tasks.

    Args:
        folder: read the data from here, see `zeroshot.local_rows`; from the hub when None.

    Raises:
        ValueError: a task that lm-eval does not know, or data that does not load.
    """
    known = manager().all_tasks
    for name in names:
        if name not in known:
            like = ", ".join(get_close_matches(name, known)) or "see `lm-eval ls tasks`"
            raise ValueError(f"lm-eval has no task {name!r}; did you mean: {like}")
    if folder is not None:
        return _load([_with_data(name, local_rows(name, folder), SPLITS.get(name, "validation")) for name in names])
    try:
        tasks: dict[str, Task] = manager().load(list(names))["tasks"]
        return tasks
    except Exception as error:
        found = f"the data of {', '.join(names)} does not load from the hub: {error}"
        raise ValueError(f"{found}; read it from a local folder with --task-data") from error


def _with_data(task: str, rows: Iterable[dict[str, Any]], split: str, **changes: Any) -> dict[str, Any]:
    """A registered task whose only data are `rows`, its split `split`."""
    data = {split: Dataset.from_list(list(rows))}
    splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
    return {"task": task, "custom_dataset": lambda **_: data, **splits, **changes}


def _load(changed: list[dict[str, Any]]) -> dict[str, Task]:
    """Registered tasks with some of their keys changed, which lm-eval offers to the members of a group."""
    with redirect_stderr(io.StringIO()):  # bars over data that are in memory
        tasks: dict[str, Task] = manager().load({"group": "local", "task": changed})["tasks"]
        return tasks


def score(scorer: Scorer, task: Task, limit: int | None = None) -> dict[str, Any]:
    """The result of one task.

    Args:
        limit: only so many items, the first.

    Returns:
        lm-eval's metrics by name, `acc` for one, and `acc_stderr` beside each that is a mean (None of one item); `items` (their
        number), `truncated` (requests that lost their beginning to the model's window), `split`, `shots`, `version`.
    """
    before, name = scorer.truncated, task.task_name
    results = _evaluate(scorer, task, limit)
    found: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        label = metric if kind == "none" else key
        found[label] = float(value)
        if task.aggregation().get(metric, mean) is mean:
            values = [sample[metric] for sample in results["samples"][name] if sample["filter"] == kind]
            found[f"{label}_stderr"] = float(mean_stderr(values)) if len(values) > 1 else None
    return found | {
        "items": results["n-samples"][name]["effective"],
        "truncated": scorer.truncated - before,
        "split": task.config.test_split or task.config.validation_split,
        "shots": task.config.num_fewshot,
        "version": task.VERSION,
    }


def word_perplexity(scorer: Scorer, documents: Sequence[str], wikitext: bool) -> float:
    """lm-eval's `wikitext` on any text: `exp(negative log-likelihood of all documents / their words)`.

    A document is scored in windows, every token once, after a beginning-of-text; one that the tokenizer adds itself is scored
    too, as lm-eval has it. Words are what white space separates, so that models with different tokenizers compare.

    Args:
        wikitext: the documents are raw WikiText, and scored without the spaces it has around punctuation.
    """
    as_it_is = {} if wikitext else {"doc_to_target": "page"}
    changed = _with_data("wikitext", ({"page": document} for document in documents), "test", **as_it_is)
    task = _load([changed])["wikitext"]
    return float(_evaluate(scorer, task)["results"]["wikitext"]["word_perplexity,none"])


def _evaluate(scorer: Scorer, task: Task, limit: int | None = None) -> dict[str, Any]:
    """One task, set up as lm-eval's own command does; without its bootstrap, which forks a process for every core."""
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with progress(None, task.task_name) as bar, redirect_stderr(io.StringIO()):  # lm-eval has bars that cannot be switched off
        scorer.set_cache_hook(_Ticks(bar, task))
        tasks = {"tasks": {task.task_name: task}}
        found: dict[str, Any] = evaluate(lm=scorer, task_dict=tasks, limit=limit, bootstrap_iters=0)
        return found
