"""Sparsity of a checkpoint, read from its safetensors tensor by tensor: no model is built, one tensor is in memory at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PATTERNS = ((2, 4), (4, 8))


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
        ValueError: no safetensors there, one that cannot be read, or none with numbered blocks.
    """
    from losa.runtime.files import is_packed, packed_layers

    if is_packed(Path(directory)):
        return [_packed_layer(name, count, numel) for name, (count, numel) in packed_layers(Path(directory)).items()]
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no .safetensors file in {directory}; expected the directory of a checkpoint")
    layers = [layer for file in files for layer in _layers(file)]
    if not layers:
        raise ValueError(f"no weight matrix of a numbered decoder block in {directory}")
    return sorted(layers, key=lambda layer: (layer.block, layer.name))


def _packed_layer(name: str, count: int, numel: int) -> LayerSparsity:
    """A packed layer, from its header; n:m patterns are not looked for."""
    block = re.search(r"\.(\d+)\.", name)
    return LayerSparsity(f"{name}.weight", int(block[1]) if block else 0, numel - count, numel, ())


def _layers(file: Path) -> Iterator[LayerSparsity]:
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                block = re.search(r"\.(\d+)\.", name)
                if block and len(tensors.get_slice(name).get_shape()) == 2:
                    tensor = tensors.get_tensor(name)
                    yield LayerSparsity(name, int(block[1]), int((tensor == 0).sum()), tensor.numel(), _patterns(tensor))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    except Exception as error:
        raise ValueError(f"{file.name} is not a valid safetensors file: {error}") from error


def _patterns(tensor: Tensor) -> tuple[str, ...]:
    """Which n:m patterns hold in every group along the rows."""
    found = []
    for n, m in PATTERNS:
        if tensor.shape[1] % m == 0 and bool(((tensor.view(tensor.shape[0], -1, m) != 0).sum(2, dtype=torch.int8) <= n).all()):
            found.append(f"{n}:{m}")
    return tuple(found)
