"""Sparsity of a checkpoint, read from its safetensors tensor by tensor: no model is built, one tensor is in memory at a time."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losa.system.doors import read_tensors, weight_files
from losa.system.output import check_finished

PATTERNS = ((2, 4), (4, 8))
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # torch compares none
BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerSparsity:
    """One weight matrix of a decoder block."""

    name: str
    block: int
    zeros: int
    numel: int
    patterns: tuple[str, ...]  # the n:m patterns it satisfies

    @property
    def sparsity(self) -> float:
        """Ratio of zeros."""
        return self.zeros / self.numel


def inspect(directory: str | Path) -> list[LayerSparsity]:
    """Every matrix that belongs to a numbered block, in the order of blocks and names.

    Raises:
        ValueError: no safetensors there, as of a run that was interrupted, one that cannot be read, or none with numbered blocks.
    """
    from losa.models.opening import check_file  # it and the next need transformers
    from losa.runtime.files import is_packed, packed_layers

    if (Path(directory) / "config.json").is_file():
        check_file(Path(directory))
    files = weight_files(Path(directory))
    if not files:
        check_finished(Path(directory))
        raise ValueError(f"no .safetensors file in {directory}; expected the directory of a checkpoint")
    packed = packed_layers(Path(directory)) if is_packed(Path(directory)) else {}
    layers = [_packed_layer(name, count, numel) for name, (count, numel) in packed.items()]
    layers += [layer for file in files for layer in _layers(file, packed)]
    if not layers:
        raise ValueError(f"no weight matrix of a numbered decoder block in {directory}")
    return sorted(layers, key=lambda layer: (layer.block, layer.name))


def _packed_layer(name: str, count: int, numel: int) -> LayerSparsity:
    """A packed layer, from its masks; n:m patterns are not looked for."""
    block = BLOCK.search(name)
    return LayerSparsity(f"{name}.weight", int(block[1]) if block else 0, numel - count, numel, ())


def _layers(file: Path, packed: Collection[str]) -> Iterator[LayerSparsity]:
    """The layers of a file, but for packed ones."""

    def wanted(name: str, shape: list[int]) -> bool:
        return len(shape) == 2 and BLOCK.search(name) is not None and name.removesuffix(".weight_mask") not in packed

    for name, tensor in read_tensors(file, wanted):
        block = BLOCK.search(name)
        assert block is not None
        kept = (tensor.float() if tensor.dtype in EIGHT_BITS else tensor) != 0
        yield LayerSparsity(name, int(block[1]), int((~kept).sum()), tensor.numel(), _patterns(kept))


def _patterns(kept: Tensor) -> tuple[str, ...]:
    """Which n:m patterns hold in every group along the rows."""
    found = []
    for n, m in PATTERNS:
        if kept.shape[1] % m == 0 and bool((kept.view(kept.shape[0], -1, m).sum(2, dtype=torch.int8) <= n).all()):
            found.append(f"{n}:{m}")
    return tuple(found)
