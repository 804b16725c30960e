"""`losa inspect` counts masks and zeros, and believes no header."""

import json
import shutil

import pytest
import torch
from packing import LAYER, change_header, change_tensors
from safetensors.torch import load_file

from losa.commands.inspect import inspect


def test_inspect_reads_the_header(llama):
    sparse, packed = inspect(llama / "sparse"), inspect(llama / "packed")
    assert {(layer.name, layer.zeros, layer.numel) for layer in sparse} == {
        (layer.name, layer.zeros, layer.numel) for layer in packed
    }


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_inspect_counts_the_masks(llama, tmp_path, kind):
    """What `config.json` claims is compared with them, and never believed."""
    copy = shutil.copytree(llama / kind, tmp_path / "copy")
    honest = {layer.name: layer.zeros for layer in inspect(copy)}
    if kind == "packed":
        assert honest == {layer.name: layer.zeros for layer in inspect(llama / "sparse")}
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]
    change_header(copy, layers={name: count for name, count in layers.items() if name != LAYER})
    with pytest.raises(ValueError, match=f"the files hold '{LAYER}' packed, which the header does not name"):
        inspect(copy)
    change_header(copy, layers=layers | {LAYER: 1})
    with pytest.raises(ValueError, match=r"is BF16 \[\d+\], expected BF16 \[1\]|is I8 \[\d+\], expected I8 \[1\]"):
        inspect(copy)
    change_tensors(copy, lambda found: found.update({f"{LAYER}.weight": found[f"{LAYER}.weight"][:1].clone()}))
    with pytest.raises(ValueError, match=rf"{LAYER}: the masks mark [\d,]+ weights, the header says 1"):
        inspect(copy)


def test_inspect_shows_what_is_not_packed_too(llama, tmp_path):
    """So that nobody hides dense layers behind a packed one."""
    copy = shutil.copytree(llama / "packed", tmp_path / "copy")
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]
    dense = load_file(llama / "sparse" / "model.safetensors")[f"{LAYER}.weight"]

    def unpack_one(found):
        for part in ("weight", "weight_mask", "weight_offsets"):
            del found[f"{LAYER}.{part}"]
        found[f"{LAYER}.weight"] = torch.ones_like(dense)

    change_tensors(copy, unpack_one)
    change_header(copy, layers={name: count for name, count in layers.items() if name != LAYER})
    zeros = {layer.name: layer.zeros for layer in inspect(copy)}
    assert len(zeros) == len(layers)
    assert zeros[f"{LAYER}.weight"] == 0
