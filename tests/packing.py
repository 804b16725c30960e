"""Sparse weights and checkpoints of tiny models, packed, and ways to damage what they say of themselves."""

import json

import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

from losa.commands.toy import toy_tokenizer
from losa.models import find_decoder
from losa.runtime.format import PackedWeight, unpack

LAYER = "model.layers.1.mlp.up_proj"
SHAPES = [(1, 1), (16, 2), (16, 4), (3, 5), (17, 33), (64, 64), (200, 130), (96, 1030), (33, 515), (32, 4096)]
DENSITIES = [0.0, 0.3, 1.0]


def sparse(rows: int, columns: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(rows, columns, generator=generator).bfloat16()
    return torch.where(torch.rand(rows, columns, generator=generator) < density, W_OI, 0)


def exact(packed: PackedWeight) -> torch.Tensor:
    """The weight in float64: stored values times their scales, not rounded to bfloat16."""
    if packed.scale is None:
        return unpack(packed).double()
    return unpack(packed._replace(scale=torch.ones_like(packed.scale))).double() * packed.scale.double()[:, None]


def damaged(packed: PackedWeight, **changes) -> PackedWeight:
    return packed._replace(**changes)


def make_sparse(family: str, directory, shards: bool = False, sparsity: float = 0.7, **changes):
    """A checkpoint of a tiny model in bfloat16 whose linear layers are `sparsity` zeros."""
    model = make_tiny_model(family, **changes).bfloat16()
    for linear in find_decoder(model).linears().values():
        linear.weight.data[torch.rand(linear.weight.shape) < sparsity] = 0
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "50GB")
    toy_tokenizer().save_pretrained(directory)
    return model


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first
    )


def change_header(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory, change):
    file = directory / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})
