"""What calibration text tells: redundancy of blocks, input statistics, reconstruction errors. And pruning, which needs them.

Hidden states stream through the decoder one block at a time (`walk.py`), and statistics exist for one block at a time.

Legend: `S` sequences, `T` tokens, `H` hidden, `L` blocks, `N` tokens of a batch, `I` in_features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import MaskedLinear, masked_linears
from losa.importance import CHUNK, gram
from losa.models import BlockInputs, block_inputs, block_linears, find_decoder, on_device
from losa.pruning import Pattern, Pruner, Solution, get_pruner
from losa.pruning.grid import Format
from losa.pruning.rounding import NEEDS as ROUNDING_NEEDS
from losa.pruning.rounding import round_to
from losa.system import distributed
from losa.system.progress import progress
from losa.walk import BlockKeeping, Stop, Visit, walk_blocks


@torch.no_grad()
def block_grams(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 8, device: torch.device | None = None) -> list[Tensor]:
    """Gram matrix `(S, S)` of the hidden states at each block's input, the features of `importance.cka_matrix`.

    Args:
        ids_ST: calibration sequences; each, flattened to `T*H` values, is one row of features.
        device: where blocks run, if not where the model is.

    Returns:
        `L` float64 matrices on the CPU.
    """
    stream = block_inputs(model, distributed.part(ids_ST), batch_size)
    grams, blocks = [], find_decoder(model).blocks
    for index, block in enumerate(progress(blocks, "importance")):
        features_nD = torch.cat([batch.flatten(1) for batch in stream.hidden])
        of_parts = [gram(distributed.gather(part_nD)) for part_nD in features_nD.split(CHUNK, 1)]
        grams.append(torch.stack(of_parts).sum(0).cpu())
        if index + 1 < len(blocks):
            with on_device(block, device):
                stream.advance(block, index)
    return grams


class _Enough(Exception):  # noqa: N818 - not an error
    """Ends a block's forward once all inputs that were wanted have been seen."""


@dataclass
class InputStatistics:
    """Collects a pruner's statistic at the input of each linear layer of one block; layers fed by one tensor share it."""

    pruner: Pruner
    values: dict[int, Tensor] = field(default_factory=dict)  # by the id of the layer that owns it
    owner: dict[int, int] = field(default_factory=dict)

    def collect(self, block: nn.Module, index: int, stream: BlockInputs, advance: bool = False) -> None:
        """Runs the block over the stream and sums over processes. Unless the stream is to advance too, a forward after the first
        batch ends at the last layer's input: the last product, a quarter of a Llama block's flops, would serve nothing."""
        if self.pruner.collect is None:
            return
        layers = list(block_linears(block).values())
        seen: list[tuple[Tensor, int]] = []  # this batch's inputs, and which layer met each first
        calls, once = 0, False  # once: every layer was called, once, in the first batch; no experts that some tokens never reach

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal calls
            x = args[0]
            owner = next((first for tensor, first in seen if tensor is x), None)
            if owner is None:
                owner = id(layer)
                seen.append((x, owner))
                assert self.pruner.collect is not None
                self.values[owner] = self.pruner.collect(self.values.get(owner), x.flatten(0, -2))
            self.owner[id(layer)] = owner
            calls += 1
            if once and calls == len(layers):
                raise _Enough

        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
        try:
            for batch in range(len(stream.hidden)):
                seen.clear()
                calls = 0
                with suppress(_Enough):
                    output = stream.output(block, index, batch)
                    if advance:
                        stream.hidden[batch] = output.to(stream.hidden[batch].device)
                once = once or (batch == 0 and not advance and calls == len(self.owner) == len(layers))
        finally:
            for handle in handles:
                handle.remove()
        self._sum_over_processes(layers)

    def _sum_over_processes(self, layers: list[nn.Linear]) -> None:
        """Also where a process's tokens did not reach a layer (experts) and another's did."""
        if distributed.world_size() == 1:
            return
        assert self.pruner.collect is not None
        position = {id(layer): number for number, layer in enumerate(layers)}
        found = [position[self.owner[id(layer)]] if id(layer) in self.owner else -1 for layer in layers]
        owners = distributed.max_(torch.tensor(found, device=layers[0].weight.device)).tolist()
        self.owner = {id(layer): id(layers[owner]) for layer, owner in zip(layers, owners, strict=True) if owner >= 0}
        for number in sorted({owner for owner in owners if owner >= 0}):
            layer = layers[number]
            if id(layer) not in self.values:
                self.values[id(layer)] = self.pruner.collect(None, layer.weight.new_empty(0, layer.in_features))
            distributed.sum_(self.values[id(layer)])

    def groups(self, block: nn.Module) -> list[tuple[list[str], Tensor | None]]:
        """The block's layers, those that share a statistic together, and the statistic; None for pruners that need none. Scores
        from training are each layer's own.

        Raises:
            ValueError: no calibration token reached a layer.
        """
        groups: dict[int, list[str]] = {}
        for name, layer in block_linears(block).items():
            if self.pruner.collect is not None and id(layer) not in self.owner:
                raise ValueError(f"no calibration token reached {name}; use more calibration text or --pruner magnitude")
            groups.setdefault(self.owner.get(id(layer), id(layer)), []).append(name)
        if self.pruner.from_training:
            scores = {name: layer.score_OI for name, layer in masked_linears(block).items()}
            return [(names, scores[names[0]]) for names in groups.values()]
        return [(names, self.values.get(owner)) for owner, names in groups.items()]


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 8, device: torch.device | None = None
) -> dict[str, Tensor]:
    """What Wanda knows of every linear layer's input, on the model as it is now: one forward over the sequences, no pruning.

    Args:
        ids_ST: calibration sequences; of several processes, each takes a part.
        device: where blocks run, if not where the model is.

    Returns:
        By layer (`block.layer`), `sum_n X_ni^2` of each input feature, `(I,)` float64 on the CPU. Layers fed by one tensor share
        theirs.

    Raises:
        ValueError: no calibration token reached a layer, or activations are not finite.
    """
    stream = block_inputs(model, distributed.part(ids_ST), batch_size)
    norms: dict[str, Tensor] = {}
    for index, block in enumerate(progress(find_decoder(model).blocks, "input norms")):
        statistics = InputStatistics(get_pruner("wanda"))
        with on_device(block, device):
            statistics.collect(block, index, stream, advance=True)
        for names, sq_I in statistics.groups(block):
            assert sq_I is not None
            if not torch.isfinite(sq_I).all():
                raise ValueError(
                    f"calibration met non-finite activations at {index}.{names[0]}; check the model's weights and dtype"
                )
            norms |= dict.fromkeys((f"{index}.{name}" for name in names), sq_I.cpu())
    return norms


def pruning_visit(
    pruner: Pruner,
    rates: Mapping[str, float],
    pattern: Pattern,
    share: float = 1.0,
    on_solution: Callable[[str, Solution], None] | None = None,
) -> Visit:
    """Prunes every layer of a block to its rate, with the inputs that the already pruned blocks before it give it.

    What is pruned is the merged weight `M * (W + s B A)`. Masks only lose weights.

    Args:
        rates: ratio of zeros by layer name, `block.layer`; ignored for n:m patterns.
        share: n:m only, the ratio of the pattern's zeros to set now.
        on_solution: told each layer's name and the solver's answer.
    """

    def visit(stop: Stop) -> None:
        statistics = InputStatistics(pruner)
        statistics.collect(stop.block, stop.index, stop.sparse)
        for name, solution in _solve(stop.block, stop.index, statistics, rates, pattern, share).items():
            if on_solution is not None:
                on_solution(f"{stop.index}.{name}", solution)
            layer = block_linears(stop.block)[name]
            assert isinstance(layer, MaskedLinear)
            layer.set_solution(solution.keep_OI, solution.weight_OI if pruner.updates_weights else None)

    return visit


def rounding_visit(format: Format) -> Visit:
    """Rounds every layer of a block to a grid under its mask, with the inputs that the already rounded blocks before it give it.

    What is rounded is the merged weight, as pruning, reconstruction or training left it.
    """

    def visit(stop: Stop) -> None:
        statistics, layers = InputStatistics(ROUNDING_NEEDS), masked_linears(stop.block)
        statistics.collect(stop.block, stop.index, stop.sparse)
        for names, G_II in statistics.groups(stop.block):
            assert G_II is not None
            group = [layers[name] for name in names]
            weights, masks = [layer.merged() for layer in group], [layer.keep_OI for layer in group]
            with _naming(stop.index, names):
                rounded = round_to(weights, masks, G_II, format)
            for layer, found in zip(group, rounded, strict=True):
                layer.settle(found.weight_OI)

    return visit


def prune_blocks(
    model: PreTrainedModel,
    ids_ST: Tensor,
    rates: Mapping[str, float],
    pruner: Pruner,
    pattern: Pattern,
    share: float = 1.0,
    *,
    then: Sequence[Visit] = (),
    batch_size: int = 8,
    error_sequences: int | None = None,
    device: torch.device | None = None,
    on_solution: Callable[[str, Solution], None] | None = None,
    keeping: BlockKeeping | None = None,
) -> list[float]:
    """A walk that prunes every block (`pruning_visit`) and then does what else is wanted there; see `walk_blocks`."""
    visits = [pruning_visit(pruner, rates, pattern, share, on_solution), *then]
    label = f"pruning ({pruner.name})"
    return walk_blocks(
        model,
        ids_ST,
        visits,
        label=label,
        dense_sequences=error_sequences,
        batch_size=batch_size,
        device=device,
        keeping=keeping,
    )


@contextmanager
def _naming(index: int, names: Sequence[str]) -> Iterator[None]:
    """Has what is refused inside say of which layers."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"block {index}, {', '.join(names)}: {error}") from error


def _solve(
    block: nn.Module, index: int, statistics: InputStatistics, rates: Mapping[str, float], pattern: Pattern, share: float
) -> dict[str, Solution]:
    """The solver's answers for all layers of a block. Each group of layers is solved by one process, which tells the others."""
    pruner, layers = statistics.pruner, masked_linears(block)
    solutions: dict[str, Solution] = {}
    groups = statistics.groups(block)
    for number, (names, statistic) in enumerate(groups):
        if number % distributed.world_size() == distributed.rank():
            weights, masks = [layers[name].merged() for name in names], [layers[name].keep_OI for name in names]
            with _naming(index, names):
                solved = pruner.solve(weights, masks, statistic, [rates[f"{index}.{name}"] for name in names], pattern, share)
            solutions |= dict(zip(names, solved, strict=True))
    if distributed.world_size() > 1:
        for number, (names, _) in enumerate(groups):
            for name in names:
                source = number % distributed.world_size()
                solutions[name] = _send(solutions.get(name), layers[name], pruner.updates_weights, source)
    return {name: solutions[name] for name in layers}


def _send(solution: Solution | None, layer: MaskedLinear, with_weight: bool, source: int) -> Solution:
    """One layer's solution from the process that has it."""
    if solution is None:
        solution = Solution(torch.empty_like(layer.weight, dtype=layer.exact), torch.empty_like(layer.keep_OI))
    damping = torch.tensor(solution.raised_damping or 0.0, dtype=torch.float64, device=layer.weight.device)
    distributed.send_(solution.keep_OI.view(torch.uint8), source)
    if with_weight:
        distributed.send_(solution.weight_OI, source)
    return Solution(solution.weight_OI, solution.keep_OI, distributed.send_(damping, source).item() or None)
