"""`losa.run` and `losa.prune`: from a dense model to a verified sparse checkpoint with its documents."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from losa.baselines import measure_baselines, one_shot
from losa.config import LosaConfig
from losa.data import RunData
from losa.method import dynamic_steps
from losa.planning.work import evaluations
from losa.report.page import documents
from losa.session import Phase, Session
from losa.system.output import claim


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LosaConfig,
    *,
    data: RunData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    claimed: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Prunes `model` to `config.sparsity` and recovers its quality, in `config.steps` dynamic steps.

    Args:
        model: a dense causal language model; changed in place.
        tokenizer: its tokenizer.
        config: with `train.data`; without `output`, nothing is written.
        data: its texts, if `data.read_run` has read them already, before the model was loaded.
        resume: go on from the last complete stage in `config.output`, or from the last position inside the training after it.
        overwrite: replace a finished result or an interrupted run in `config.output`.
        claimed: the caller has `config.output` to itself already (`output.claim`).
        callbacks: `transformers.TrainerCallback`s, passed to every training.

    Returns:
        The sparse model, of the class it came with. What happened is in its attribute `losa_record`, the content of
        `losa.json`; its keep-masks, by parameter name, are in `losa_masks`.

    Raises:
        ValueError: something in the request is wrong; raised before the first pruning.
        FloatingPointError: training met a loss or gradient that is not finite.
        OSError: a stage or the result cannot be written; what was saved before is as it was.
        RuntimeError: a pruned weight of the saved file is not zero.
    """
    with claim(None if claimed else config.output):
        options: dict[str, Any] = {"data": data, "resume": resume, "overwrite": overwrite, "callbacks": callbacks}
        session = Session.start(model, tokenizer, config, kind="run", documents=documents, **options)
        baselines = 1 if session.config.steps == 1 else 2
        first = Phase("00-baselines", measure_baselines, {"baseline": 1.0, "evaluation": baselines / evaluations(session.config)})
        session.go_through([first, *dynamic_steps(session.config)])
        return session.finish("losa")


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LosaConfig,
    *,
    data: RunData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    claimed: bool = False,
) -> PreTrainedModel:
    """Prunes once, straight to `config.sparsity`, without training: the baselines of the literature, with `rates: uniform`.

    Takes, returns and raises what `run` does; `config` needs `calibration.data` or `train.data`, and there are no callbacks.
    """
    with claim(None if claimed else config.output):
        options: dict[str, Any] = {"data": data, "resume": resume, "overwrite": overwrite}
        session = Session.start(model, tokenizer, config, kind="prune", documents=documents, **options)
        session.go_through(one_shot(session.config))
        return session.finish("pruned")
