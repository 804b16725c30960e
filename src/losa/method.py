"""The method on one page: a dense model becomes a sparse one in T dynamic steps. LoSA, algorithm 1.

for t = 1..T:
    target    s_t = s (1 - (1 - t/T)^3)                        allocation.cubic_sparsity
    importance of each block, by mutual information             rates.measure -> importance.rmi_importance
    layer rates that spend s_t on the least important blocks    rates.allot -> allocation.layer_rates
    prune the merged weights, block by block                    calibration.prune_blocks -> reconstruction errors
    adapter ranks by reconstruction error                       allocation.allocate_ranks
    reconstruct each block, in the last step                    reconstruction.reconstruction_visit
    train adapters, or all weights, under the mask              training.train
round what is left to a grid, if values are int8 or int4        calibration.rounding_visit
merge; save; re-open; verify every zero                         session.Session.finish

Every step is two phases of a session, which a killed run resumes between. `api.run` takes a session through them.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from losa.adapter import collect_scores, masked_sparsity
from losa.allocation import allocate_ranks, cubic_sparsity
from losa.calibration import prune_blocks, rounding_visit
from losa.config import LosaConfig
from losa.planning.work import evaluations
from losa.pruning import Pattern, Solution, get_pruner
from losa.pruning.grid import FORMATS
from losa.rates import allot, block_means, measure
from losa.reconstruction import reconstruction_visit
from losa.rules import get_rule
from losa.session import Phase, Session
from losa.training import train
from losa.walk import walk_blocks


def dynamic_steps(config: LosaConfig) -> list[Phase]:
    """The steps 1..T of `run`, as phases: pieces that are done whole, and resumed after."""
    phases, once = [], 1 / evaluations(config)
    for step, trained in enumerate(config.train.shares(config.steps), 1):
        alike = dict.fromkeys(("importance", "pruning"), 1 / config.steps)
        if config.steps == 1:
            alike["evaluation"] = once  # what is pruned only
        phases.append(Phase(f"{step:02d}-pruned", partial(sparsify, step=step), alike))
        if step == config.steps and config.reconstruct.epochs:
            phases.append(Phase(f"{step:02d}-reconstructed", reconstruct, {"reconstruction": 1.0, "evaluation": once}))
        phases.append(Phase(f"{step:02d}-trained", partial(adapt, step=step), {"training": trained}))
    if config.values:
        phases.append(Phase(f"{config.steps:02d}-rounded", put_on_grid, {"rounding": 1.0, "evaluation": once}))
    return phases


def sparsify(session: Session, step: int) -> None:
    """First half of dynamic step `step`: target, layer rates, pruning, reconstruction errors, ranks."""
    config = session.config
    assert config.sparsity is not None and config.rate_band is not None
    target, rule, measured = cubic_sparsity(step, config.steps, config.sparsity), get_rule(config.rates), None
    if config.rate_band > 0:
        with session.timed("importance"):
            ids_ST = session.data.calibration[: config.calibration.rmi_sequences, : config.calibration.rmi_length]
            measured = measure(session.model, ids_ST, rule, session.device)
    previous = session.record["steps"][-1]["layer_rates"] if session.record["steps"] else None
    rates = allot(session.model, rule, measured, target, config.rate_band, previous, config.protect)
    with session.timed("pruning"):
        errors, damping = prune_to(session, rates, share=target / config.sparsity)
    mean_rank = config.adapter.mean_rank(step, config.steps)
    uniform = config.adapter.allocation == "uniform"
    ranks = allocate_ranks([1.0] * len(errors) if uniform else errors, mean_rank, config.adapter.max_rank)
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


def prune_to(
    session: Session, rates: Mapping[str, float], share: float, with_errors: bool = True
) -> tuple[list[float], dict[str, float]]:
    """Prunes to `rates`; returns the errors, and the damping of the layers where the solver had to raise it."""
    raised: dict[str, float] = {}
    keeping = session.keeping_blocks("pruning", raised)

    def note(name: str, solution: Solution) -> None:
        if solution.raised_damping is not None:
            raised[name] = solution.raised_damping

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
        keeping=keeping,
    )
    return errors, raised


def reconstruct(session: Session) -> None:
    """After the last pruning: each block's surviving weights learn to put out what the dense block does."""
    config = session.config
    length, ids_ST = config.reconstruct.length, session.data.calibration[: config.reconstruct.sequences]
    pieces_ST = ids_ST[:, : ids_ST.shape[1] // length * length].reshape(-1, length)
    with session.timed("reconstruction"):
        session.record["steps"][-1]["reconstructed"] = walk_blocks(
            session.model,
            pieces_ST,
            [reconstruction_visit(config.reconstruct, config.seed)],
            label="reconstruction",
            device=session.device,
            keeping=session.keeping_blocks("reconstruction"),
        )
    if session.kind == "run":
        session.measure("reconstructed")


def put_on_grid(session: Session) -> None:
    """Rounds the surviving weights to `config.values`."""
    config = session.config
    assert config.values is not None
    if session.kind != "prune":
        session.measure("unrounded")
    with session.timed("rounding"):
        walk_blocks(
            session.model,
            session.data.calibration[: config.calibration.sequences],
            [rounding_visit(FORMATS[config.values])],
            label=f"rounding to {config.values}",
            dense_sequences=0,
            device=session.device,
            keeping=session.keeping_blocks("rounding"),
        )


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
