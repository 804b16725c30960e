"""The method on one page: a dense model becomes a sparse one in T dynamic steps. LoSA, algorithm 1.

for t = 1..T:
    target    s_t = s (1 - (1 - t/T)^3)                        allocation.cubic_sparsity
    importance of each block, by mutual information             rates.measure -> importance.rmi_importance
    layer rates that spend s_t on the least important blocks    rates.allot -> allocation.layer_rates
    prune the merged weights, block by block                    calibration.prune_blocks -> reconstruction errors
    adapter ranks by reconstruction error                       allocation.allocate_ranks
    reconstruct each block, in the last step                    reconstruction.reconstruction_visit
    round what is left to a grid, if values are int8 or int4    calibration.rounding_visit
    train adapters, or all weights, under the mask              training.train
merge; save; re-open; verify every zero                         session.Session.finish
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from losa.adapter import collect_scores, masked_linears, masked_sparsity
from losa.allocation import allocate_ranks, cubic_sparsity
from losa.calibration import prune_blocks, rounding_visit, walk_blocks
from losa.config import LosaConfig
from losa.data import RunData
from losa.output import claim
from losa.pruning import Pattern, Solution, get_pruner
from losa.pruning.grid import FORMATS
from losa.pruning.sparsegpt import DAMPING
from losa.rates import allot, block_means, get_rule, measure
from losa.reconstruction import reconstruction_visit
from losa.session import Phase, Session
from losa.training import train
from losa.work import MEASURED


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
        session = Session.start(model, tokenizer, config, kind="run", **options)
        first = Phase("00-baselines", measure_baselines, {"baseline": 1.0, "evaluation": 2 / MEASURED})
        session.go_through([first, *dynamic_steps(session.config)])
        return session.finish("losa")


def dynamic_steps(config: LosaConfig) -> list[Phase]:
    """The steps 1..T of `run`, as phases: pieces that are done whole, and resumed after."""
    phases = []
    for step, trained in enumerate(config.train.shares(config.steps), 1):
        alike = dict.fromkeys(("importance", "pruning"), 1 / config.steps)
        phases.append(Phase(f"{step:02d}-pruned", partial(sparsify, step=step), alike))
        if step == config.steps and config.reconstruct.epochs:
            phases.append(Phase(f"{step:02d}-reconstructed", reconstruct, {"reconstruction": 1.0}))
        if step == config.steps and config.values and config.train.whole:
            phases.append(Phase(f"{step:02d}-rounded", put_on_grid, {"rounding": 1.0}))
        phases.append(Phase(f"{step:02d}-trained", partial(adapt, step=step), {"training": trained}))
    if config.values and not config.train.whole:  # adapters do not see the grid; what they were merged to is rounded
        phases.append(Phase(f"{config.steps:02d}-rounded", put_on_grid, {"rounding": 1.0}))
    return phases


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LosaConfig,
    *,
    data: RunData | None = None,
    overwrite: bool = False,
    claimed: bool = False,
) -> PreTrainedModel:
    """Prunes once, straight to `config.sparsity`, without training: the baselines of the literature (with `delta: 0`).

    Takes, returns and raises what `run` does.
    """
    with claim(None if claimed else config.output):
        session = Session.start(model, tokenizer, config, kind="prune", data=data, overwrite=overwrite)
        session.measure("dense")
        sparsify(session, session.config.steps)
        if config.reconstruct.epochs:
            reconstruct(session)
        if config.values:
            put_on_grid(session)
        return session.finish("pruned")


def measure_baselines(session: Session) -> None:
    """Perplexity of the dense model, and of what one-shot pruning with the same pruner makes of it: a pruning of its own, which
    is then undone, or in a run of a single step that step's."""
    session.measure("dense")
    if session.config.steps == 1:
        return
    assert session.config.sparsity is not None
    before = {name: layer.keep_bits.clone() for name, layer in masked_linears(session.model).items()}
    with session.timed("baseline"):
        rates = allot(session.model, get_rule("uniform"), None, session.config.sparsity, 0.0, None, session.config.protect)
        _prune_to(session, rates, share=1.0, with_errors=False)
    session.measure("pruned")
    for name, layer in masked_linears(session.model).items():
        layer.reset(before[name])


def sparsify(session: Session, step: int) -> None:
    """First half of dynamic step `step`: target, layer rates, pruning, reconstruction errors, ranks."""
    config = session.config
    assert config.sparsity is not None and config.delta is not None
    target, rule, measured = cubic_sparsity(step, config.steps, config.sparsity), get_rule(config.rates), None
    if config.delta > 0:
        with session.timed("importance"):
            ids_ST = session.data.calibration[: config.calibration.rmi_sequences, : config.calibration.rmi_length]
            measured = measure(session.model, ids_ST, rule, session.device)
    previous = session.record["steps"][-1]["layer_rates"] if session.record["steps"] else None
    rates = allot(session.model, rule, measured, target, config.delta, previous, config.protect)
    with session.timed("pruning"):
        errors, damping = _prune_to(session, rates, share=target / config.sparsity)
    omega = config.adapter.omega(step, config.steps)
    uniform = config.adapter.allocation == "uniform"
    ranks = allocate_ranks([1.0] * len(errors) if uniform else errors, omega, config.adapter.max_rank)
    session.set_ranks(ranks)
    session.record["steps"].append(
        {
            "step": step,
            "target": target,
            "achieved": masked_sparsity(session.model),
            "importance": measured if measured and not rule.by_layer else None,
            "rates": block_means(session.model, rates),
            "layer_rates": rates,
            "errors": errors,
            "ranks": None if config.train.whole else ranks,
            "raised_damping": damping,
        }
    )
    if config.steps == 1 and session.kind == "run":
        session.measure("pruned")


def _prune_to(
    session: Session, rates: Mapping[str, float], share: float, with_errors: bool = True
) -> tuple[list[float], dict[str, float]]:
    """Prunes to `rates`; returns the errors, and the damping of the layers where SparseGPT had to raise it."""
    raised: dict[str, float] = {}

    def note(name: str, solution: Solution) -> None:
        if solution.damping is not None and solution.damping > DAMPING:
            raised[name] = solution.damping

    config = session.config
    errors = prune_blocks(
        session.model,
        session.data.calibration[: config.calibration.sequences],
        rates,
        get_pruner(config.pruner),
        Pattern.parse(config.pattern),
        share,
        error_sequences=config.calibration.error_sequences if with_errors else 0,
        device=session.device,
        on_solution=note,
    )
    return errors, raised


def reconstruct(session: Session) -> None:
    """After the last pruning: each block's surviving weights learn to put out what the dense block does."""
    config = session.config
    with session.timed("reconstruction"):
        session.record["steps"][-1]["reconstructed"] = walk_blocks(
            session.model,
            session.data.calibration[: config.reconstruct.sequences],
            [reconstruction_visit(config.reconstruct, config.seed)],
            label="reconstruction",
            device=session.device,
        )
    if session.kind == "run":
        session.measure("reconstructed")


def put_on_grid(session: Session) -> None:
    """Rounds the surviving weights to `config.values`; a training after it has them rounded in every forward."""
    config = session.config
    assert config.values is not None
    with session.timed("rounding"):
        walk_blocks(
            session.model,
            session.data.calibration[: config.calibration.sequences],
            [rounding_visit(FORMATS[config.values])],
            label=f"rounding to {config.values}",
            dense_sequences=0,
            device=session.device,
        )
    if session.kind == "run" and config.train.whole:
        session.measure("rounded")


def adapt(session: Session, step: int) -> None:
    """Second half: trains the adapters under the mask, on this step's share of the rows."""
    config = session.config
    rows = session.data.step_rows(step, config.train.shares(config.steps))
    scores = collect_scores(session.model) if get_pruner(config.pruner).from_training else nullcontext()
    with session.timed("training"), session.whole_model() as model, TemporaryDirectory() as scratch, scores:
        session.record["steps"][-1]["loss"] = train(
            model,
            rows,
            config.train,
            name=f"training, step {step}/{config.steps}",
            seed=(config.seed * 1000 + step) % 2**32,
            work_dir=Path(config.output, "logs") if config.output and config.train.report_to != "none" else Path(scratch),
            eos=session.tokenizer.eos_token_id,
            dense_on_host=config.blocks_on_host,
            callbacks=session.callbacks,
            keeping=session.keeping(),
        )
