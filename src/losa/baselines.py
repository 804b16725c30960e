"""What the method is compared with, made of its own parts, so that a row of a comparison differs in one thing at a time: pruning
once, without training; and plain LoRA on what that leaves, trained, merged and verified like any other.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from losa.adapter import masked_linears
from losa.bits import pack_bits
from losa.config import LosaConfig
from losa.method import prune_to, put_on_grid, reconstruct, sparsify
from losa.planning.work import evaluations
from losa.rates import allot
from losa.rules import get_rule
from losa.session import Phase, Session


def one_shot(config: LosaConfig) -> list[Phase]:
    """Pruning once, straight to the target, without training, as phases; with reconstruction and rounding where these are asked
    for."""
    pruning = {"importance": 1.0, "pruning": 1.0}
    phases = [
        Phase("00-dense", partial(Session.measure, name="dense"), {"evaluation": 1 / evaluations(config, training=False)}),
        Phase("01-pruned", partial(sparsify, step=config.steps), pruning),
    ]
    if config.reconstruct.epochs:
        phases.append(Phase("01-reconstructed", reconstruct, {"reconstruction": 1.0}))
    if config.values:
        phases.append(Phase("01-rounded", put_on_grid, {"rounding": 1.0}))
    return phases


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
        prune_to(session, rates, share=1.0, with_errors=False)
    session.measure("pruned")
    for name, layer in masked_linears(session.model).items():
        layer.reset(before[name])


@torch.no_grad()
def lift_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain LoRA on a pruned model: the pruned weights become the base, and adapters are masked no more. What comes out of the
    merge is dense.

    Returns:
        The keep-masks that were lifted, by parameter name.
    """
    masks = {}
    for name, layer in masked_linears(model).items():
        masks[f"{name}.weight"] = layer.keep_OI
        layer.settle(layer.merged())
        layer.keep_bits.copy_(pack_bits(torch.ones_like(masks[f"{name}.weight"])))
    return masks


@torch.no_grad()
def mask_again(model: PreTrainedModel, masks: dict[str, Tensor]) -> None:
    """Sets what `masks` prune to zero again, in a model after its merge."""
    for name, keep_OI in masks.items():
        model.get_parameter(name).masked_fill_(~keep_OI.to(model.device), 0)
