"""What calibration text tells: redundancy of blocks, input statistics, reconstruction errors. And pruning, which needs them.

Hidden states stream through the decoder one block at a time. Pruning runs two streams *in lockstep*, the dense model's and
the sparse model's, so two activations a sequence are alive, not one per block; statistics exist for one block at a time.
(The release keeps every block's outputs: 69 GB of RAM for a 7B model.) With `device` given and the model on the host, only
the current block is on the device.

Legend: `S` sequences, `T` tokens, `H` hidden, `L` blocks, `N` tokens of a batch, `I` in_features.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import MaskedLinear, dense_mode
from losa.importance import gram
from losa.models import BlockInputs, block_inputs, block_linears, find_decoder, on_device
from losa.progress import progress
from losa.pruning import Pattern, Pruner, Solution

logger = logging.getLogger(__name__)


@torch.no_grad()
def block_grams(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 8, device: torch.device | None = None) -> list[Tensor]:
    """Gram matrix `(S, S)` of the hidden states at each block's input, the features of `importance.cka_matrix`.

    Args:
        ids_ST: calibration sequences; each, flattened to `T*H` values, is one row of features.
        device: where blocks run, if not where the model is.

    Returns:
        `L` float64 matrices on the CPU.
    """
    stream = block_inputs(model, ids_ST, batch_size)
    grams = []
    for index, block in enumerate(progress(find_decoder(model).blocks, "importance")):
        grams.append(gram(torch.cat([batch.flatten(1) for batch in stream.hidden])).cpu())
        with on_device(block, device):
            stream.advance(block, index)
    return grams


@dataclass
class InputStatistics:
    """Collects a pruner's statistic at the input of each linear layer of one block; layers fed by one tensor share it."""

    pruner: Pruner
    values: dict[int, Tensor] = field(default_factory=dict)  # by the id of the layer that owns it
    owner: dict[int, int] = field(default_factory=dict)

    def of(self, layer: nn.Module) -> Tensor | None:
        """The statistic of a layer, None for pruners that need none.

        Raises:
            ValueError: no calibration token reached the layer.
        """
        if self.pruner.collect is None:
            return None
        if id(layer) not in self.owner:
            raise ValueError("no calibration token reached this layer; use more calibration text or --pruner magnitude")
        return self.values[self.owner[id(layer)]]

    def collect(self, block: nn.Module, index: int, stream: BlockInputs) -> None:
        """Runs the block over the stream, without advancing it."""
        if self.pruner.collect is None:
            return
        seen: list[tuple[Tensor, int]] = []  # this batch's inputs, and which layer met each first

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            owner = next((first for tensor, first in seen if tensor is x), None)
            if owner is None:
                owner = id(layer)
                seen.append((x, owner))
                assert self.pruner.collect is not None
                self.values[owner] = self.pruner.collect(self.values.get(owner), x.flatten(0, -2))
            self.owner[id(layer)] = owner

        handles = [layer.register_forward_pre_hook(hook) for layer in block_linears(block).values()]
        try:
            for _ in stream.outputs(block, index):
                seen.clear()
        finally:
            for handle in handles:
                handle.remove()


class ReconstructionError:
    """`sum_channels(sum_tokens (Y_dense - Y_sparse)^2 / ||Y_dense||^2) / H`, LoSA section 3.3, accumulated in float64."""

    def __init__(self) -> None:
        self.difference_H: Tensor | float = 0.0
        self.norm_H: Tensor | float = 0.0

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Adds a batch of block outputs, `(b, T, H)` each."""
        dense, sparse = dense.flatten(0, -2).double(), sparse.flatten(0, -2).double()
        self.difference_H = self.difference_H + (dense - sparse).square().sum(0)
        self.norm_H = self.norm_H + dense.square().sum(0)

    def value(self) -> float:
        """The error, a ratio >= 0. Channels that are always zero in the dense model count as 0."""
        assert isinstance(self.difference_H, Tensor) and isinstance(self.norm_H, Tensor)
        return torch.where(self.norm_H > 0, self.difference_H / self.norm_H, 0.0).mean().item()


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    ids_ST: Tensor,
    rates: Sequence[float],
    pruner: Pruner,
    pattern: Pattern,
    share: float = 1.0,
    batch_size: int = 8,
    device: torch.device | None = None,
    on_solution: Callable[[str, Solution], None] | None = None,
) -> list[float]:
    """Prunes every block to its rate, in order; a block sees what the already pruned blocks before it put out.

    What is pruned is the merged weight `M * (W + s B A)`. Masks only lose weights.

    Args:
        model: after `adapter.attach`.
        ids_ST: calibration sequences.
        rates: ratio of zeros of each block; ignored for n:m patterns.
        share: n:m only, the ratio of the pattern's zeros to set now.
        device: where blocks run, if not where the model is.
        on_solution: told each layer's name (`block.layer`) and the solver's answer.

    Returns:
        The reconstruction error of each block.
    """
    sparse = block_inputs(model, ids_ST, batch_size)
    dense = sparse.clone()
    errors = []
    for index, block in enumerate(progress(find_decoder(model).blocks, f"pruning ({pruner.name})")):
        with on_device(block, device):
            statistics = InputStatistics(pruner)
            statistics.collect(block, index, sparse)
            for name, layer in block_linears(block).items():
                assert isinstance(layer, MaskedLinear)
                try:
                    statistic = statistics.of(layer)
                    solution = pruner.solve(layer.merged(), layer.keep_OI, statistic, rates[index], pattern, share)
                except ValueError as error:
                    raise ValueError(f"block {index}, {name}: {error}") from error
                if on_solution is not None:
                    on_solution(f"{index}.{name}", solution)
                layer.set_solution(solution.keep_OI, solution.weight_OI if pruner.updates_weights else None)
            with dense_mode(block):
                dense.advance(block, index)
            sparse.advance(block, index)
        error_of = ReconstructionError()
        for dense_batch, sparse_batch in zip(dense.hidden, sparse.hidden, strict=True):
            error_of.add(dense_batch, sparse_batch)
        errors.append(error_of.value())
    return errors
