"""A walk through the blocks with two streams in lockstep, the dense model's and the sparse model's.

Two activations a sequence are alive, not one per block. (The release keeps every block's outputs: 69 GB of RAM for a 7B model.)
With `device` given and the model on the host, only the current block is on the device. What a walk did to the blocks can be
kept, for another process to go on from there.

Legend: `S` sequences, `T` tokens, `H` hidden.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import dense_mode
from losa.models import BlockInputs, block_inputs, find_decoder, on_device
from losa.system import distributed
from losa.system.progress import progress


class ReconstructionError:
    """`sum_channels(sum_tokens (Y_dense - Y_sparse)^2 / ||Y_dense||^2) / H`, LoSA section 3.3, accumulated in float64."""

    def __init__(self) -> None:
        self.difference_H: Tensor | float = 0.0
        self.norm_H: Tensor | float = 0.0

    def sum_over_processes(self) -> "ReconstructionError":
        """Adds what the other processes saw."""
        assert isinstance(self.difference_H, Tensor) and isinstance(self.norm_H, Tensor)
        distributed.sum_(self.difference_H)
        distributed.sum_(self.norm_H)
        return self

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Adds a batch of block outputs, `(b, T, H)` each."""
        dense, sparse = dense.flatten(0, -2).double(), sparse.flatten(0, -2).double()
        self.difference_H = self.difference_H + (dense - sparse).square().sum(0)
        self.norm_H = self.norm_H + dense.square().sum(0)

    def value(self) -> float:
        """The error, a ratio >= 0. Channels that are always zero in the dense model count as 0."""
        assert isinstance(self.difference_H, Tensor) and isinstance(self.norm_H, Tensor)
        return torch.where(self.norm_H > 0, self.difference_H / self.norm_H, 0.0).mean().item()


@dataclass
class Stop:
    """A block of a walk, on its device. The dense stream is past it already, the sparse one comes when the visit is over.

    Attributes:
        name: what the walk does, for its progress bar and errors.
        sparse: what the blocks before this one put out, as they are now: the block's inputs.
        dense: the dense model's outputs of this block, for the first sequences of `sparse`; perhaps of none.
    """

    name: str
    index: int
    block: nn.Module
    sparse: BlockInputs
    dense: BlockInputs


Visit = Callable[[Stop], None]


@dataclass
class BlockKeeping:
    """How a walk keeps what it did to the blocks, for another process to go on from there.

    Attributes:
        save: called with the first block that is not saved and the first that is not done; says whether it could.
        minutes: between two times.
        done: blocks that are done; at first those that an earlier process did, which the model has as that left them.
    """

    save: Callable[[int, int], bool]
    minutes: float
    done: int = 0

    @contextmanager
    def walking(self) -> Iterator["BlockKeeping"]:
        """While it lasts, blocks are done. Where it ends early, by a signal or an error, those that are done are saved."""
        self.saved, self.last = self.done, time.monotonic()
        try:
            yield self
        except BaseException:
            self._save()
            raise

    def did(self, index: int) -> None:
        """A block is as it will be; saves if it is time."""
        self.done = index + 1
        if time.monotonic() - self.last >= 60 * self.minutes:
            self._save()

    def _save(self) -> None:
        if self.done > self.saved and self.save(self.saved, self.done):
            self.saved = self.done
        self.last = time.monotonic()


@torch.no_grad()
def walk_blocks(
    model: PreTrainedModel,
    ids_ST: Tensor,
    visits: Sequence[Visit],
    *,
    label: str,
    dense_sequences: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    keeping: BlockKeeping | None = None,
) -> list[float]:
    """Takes two streams through the decoder in lockstep, the dense model's and the sparse model's, and stops at every block:
    there the visits, in their order, may change it, before the sparse stream goes through it.

    Args:
        model: after `adapter.attach`.
        ids_ST: calibration sequences; of several processes, each takes a part.
        visits: called with every block.
        label: of the progress bar.
        dense_sequences: how many of the sequences also go through the dense model; all when None. With 0 there is no dense
            stream, and no errors.
        device: where blocks run, if not where the model is.
        keeping: of what is done; the walk then visits only blocks that no earlier process did.

    Returns:
        The reconstruction error of each block.
    """
    sparse = block_inputs(model, distributed.part(ids_ST), batch_size)
    dense = sparse.first(len(distributed.part(ids_ST[:dense_sequences])))
    keeping = keeping or BlockKeeping(lambda begin, end: True, math.inf)
    errors = []
    with keeping.walking():
        for index, block in enumerate(progress(find_decoder(model).blocks, label)):
            with on_device(block, device):
                with dense_mode(block):
                    dense.advance(block, index)
                if index >= keeping.done:
                    for visit in visits:
                        visit(Stop(label, index, block, sparse, dense))
                    keeping.did(index)
                sparse.advance(block, index)
            if dense.hidden:
                error_of = ReconstructionError()
                for dense_batch, sparse_batch in zip(dense.hidden, sparse.hidden, strict=False):
                    error_of.add(dense_batch, sparse_batch[: len(dense_batch)])
                errors.append(error_of.sum_over_processes().value())
    return errors
