"""What the stages of a run have alive at their peak: real operators on fake tensors, which have shapes and no bytes, on a few
blocks of the model. The blocks are alike, so the rest is a straight line.

Legend: `S` sequences, `T` tokens, `H` hidden, `V` vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from losa import loss
from losa.adapter import attach, dense_mode
from losa.adapter.function import PANEL_BYTES
from losa.calibration import InputStatistics
from losa.config import LosaConfig
from losa.loss import block_loss, causal_loss
from losa.models import Decoder, block_inputs, block_linears, find_decoder
from losa.planning.probe import BATCH, EVALUATION_BATCH
from losa.pruning import Pruner, get_pruner
from losa.pruning.rounding import NEEDS as ROUNDING_NEEDS
from losa.training.modes import activation_checkpointing, block_outputs, every_block

SOLUTION_BYTES = 5  # a weight of the block that is being pruned: float32 answers and masks, until all its layers are solved
SIMULATED_ROWS = 64  # of a training step; larger batches are scaled up from here


def trained_values(block: nn.Module, config: LosaConfig) -> int:
    """Numbers that are trained in a block."""
    linears = block_linears(block).values()
    if config.train.whole:
        return sum(linear.weight.numel() for linear in linears)
    return config.adapter.max_rank * sum(linear.in_features + linear.out_features for linear in linears)


class _Meter(TorchDispatchMode):
    """Bytes of the storages made since it was entered: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known | self.known:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@contextmanager
def _one_chunk() -> Iterator[None]:
    """Has the loss work on its first chunk of logits only, while it lasts: all are alike, and thousands of them take their time
    even on fake tensors."""
    chunk, seen = loss._chunk, False

    def first(student_CV: Tensor, *rest: Any) -> Tensor:
        nonlocal seen
        if seen:
            return torch.zeros((), dtype=torch.float64, device=student_CV.device)
        seen = True
        return chunk(student_CV, *rest)

    with patch.object(loss, "_chunk", first):
        yield


def _simulate(build: Callable[[], PreTrainedModel], config: LosaConfig, work: Callable[[PreTrainedModel], None]) -> int:
    """Bytes that `work` has alive at its peak, besides the model: measured on two and on three of its blocks."""

    def peak(count: int) -> int:
        with FakeTensorMode(), torch.device("cpu"):
            model = build()
            decoder = find_decoder(model)
            parent, _, leaf = decoder.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, decoder.blocks[:count])
            attach(model, config.adapter.max_rank, config.adapter.scale, whole=config.train.whole)
            # A GPU's panels: fewer of them take less time.
            with patch.dict(PANEL_BYTES, cpu=PANEL_BYTES["cuda"]), _Meter() as meter, _one_chunk():
                work(model)
            return int(meter.peak)

    with torch.device("meta"):
        blocks = len(find_decoder(build()).blocks)
    few = min(2, blocks)
    low = peak(few)
    return low if blocks == few else low + (blocks - few) * (peak(few + 1) - low)


def simulate_training(build: Callable[[], PreTrainedModel], config: LosaConfig, processes: int = 1) -> int:
    """Peak bytes of a training step's activations, gradients and transients: forward, teacher's forward, backward."""
    rows = -(-(config.train.batch_size or 1) // processes)
    simulated = min(rows, SIMULATED_ROWS)

    def step(model: PreTrainedModel) -> None:
        ids = torch.zeros(simulated, config.train.length or 0, dtype=torch.int64)
        teacher, dense, whole = None, [], bool(config.train.distill_blocks)
        if config.train.distill or whole:
            with torch.no_grad(), dense_mode(model), block_outputs(model, whole) as dense:
                teacher = model(input_ids=ids, use_cache=False).logits
        model.train()
        with activation_checkpointing(model, config.train.gradient_checkpointing), every_block(model):
            with block_outputs(model, whole) as sparse:
                logits = model(input_ids=ids, use_cache=False).logits
            total = causal_loss(logits, ids, teacher, config.train.distill, config.train.temperature)
            if whole:
                total = total + block_loss(sparse, dense, None)
            del logits, teacher
            total.backward()

    return _simulate(build, config, step) * rows // simulated


def simulate_evaluation(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of one batch of perplexity windows."""

    @torch.no_grad()
    def evaluate(model: PreTrainedModel) -> None:
        ids = torch.zeros(EVALUATION_BATCH, config.eval.length or 0, dtype=torch.int64)
        causal_loss(model(input_ids=ids, use_cache=False).logits, ids)

    return _simulate(build, config, evaluate)


def simulate_block(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of a block's forward over one batch of calibration sequences."""

    @torch.no_grad()
    def forward(model: PreTrainedModel) -> None:
        ids = torch.zeros(BATCH, config.calibration.length or 0, dtype=torch.int64)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return _simulate(build, config, forward)


def simulate_reconstruction(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of an update of the largest block: activations, and 16 a weight that is trained."""
    rows, length = config.reconstruct.batch_size, config.reconstruct.length
    with FakeTensorMode(), torch.device("cpu"):
        model = attach(build(), whole=True)
        index, block = _largest_block(model)
        stream = block_inputs(model, torch.zeros(rows, length, dtype=torch.int64), rows)
        with _Meter() as meter:
            difference = stream.output(block, index, 0).float() - stream.hidden[0].float()
            difference.square().mean().backward()
        trained = sum(linear.weight.numel() for linear in block_linears(block).values())
        return int(meter.peak) + 12 * trained  # gradients are in the peak


def _largest_block(model: PreTrainedModel) -> tuple[int, nn.Module]:
    decoder = find_decoder(model)
    sizes = decoder.sizes()
    index = sizes.index(max(sizes))
    return index, decoder.blocks[index]


def _solver_bytes(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Of the largest block: the statistic of every input, what solving the largest group of layers takes, all answers."""
    pruners = [get_pruner(config.pruner), *([ROUNDING_NEEDS] if config.values else [])]
    return max(_pruner_bytes(build, pruner) for pruner in pruners)


def _pruner_bytes(build: Callable[[], PreTrainedModel], pruner: Pruner) -> int:
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        model = attach(build(), whole=True)
        index, block = _largest_block(model)
        statistics = InputStatistics(pruner)
        statistics.collect(block, index, block_inputs(model, torch.zeros(1, 8, dtype=torch.int64), 1))
        linears = block_linears(block)
        groups = [[linears[name] for name in names] for names, _ in statistics.groups(block)]
    widths = [group[0].in_features for group in groups]
    counts = [sum(linear.weight.numel() for linear in group) for group in groups]
    solving = (
        pruner.square_copies * 4 * width**2 + pruner.weight_bytes * count for width, count in zip(widths, counts, strict=True)
    )
    return sum(pruner.statistic_bytes(width) for width in widths) + max(solving) + SOLUTION_BYTES * sum(counts)


def simulate_calibration(
    build: Callable[[], PreTrainedModel], config: LosaConfig, decoder: Decoder, hidden: int, itemsize: int, processes: int
) -> int:
    """Peak bytes of pruning and reconstruction: streams of hidden states, and what one block takes on top."""
    calibrating, reconstruct = config.calibration, config.reconstruct
    assert calibrating.sequences is not None
    state = (calibrating.length or 0) * hidden  # numbers of a sequence
    sparse = -(-calibrating.sequences // processes)
    dense = -(-min(calibrating.error_sequences, calibrating.sequences) // processes)
    pruning = (sparse + dense) * state * itemsize + max(simulate_block(build, config), _solver_bytes(build, config))
    if not reconstruct.epochs:
        return pruning
    pieces = -(-config.reconstructed_pieces // processes) * reconstruct.length * hidden  # numbers of a stream
    update = simulate_reconstruction(build, config)
    if config.train.whole:  # its values are what is trained anyway
        update -= 4 * max(decoder.sizes())
    # Two streams, their inputs and targets in one piece each beside them, targets in float64 and their squares.
    return max(pruning, 4 * pieces * itemsize + max(16 * pieces, update))
