"""Weights move to huge pages as they are; embeddings that are only looked up stay in their file."""

import sys
from pathlib import Path

import pytest
import torch
from packing import make_sparse
from transformers import AutoModelForCausalLM

from losa import SparseConfig
from losa.runtime.files import pack_checkpoint
from losa.runtime.linear import SparseLinear
from losa.runtime.memory import move_to_huge_pages


def test_moving_to_huge_pages_moves_weights_and_keeps_ties():
    first, second = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    second.weight = first.weight
    model = torch.nn.ModuleList([first, second, SparseLinear.from_linear(torch.nn.Linear(40, 24, dtype=torch.bfloat16))])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    move_to_huge_pages(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not addresses & {parameter.data_ptr() for parameter in model.parameters()}
    assert first.weight is second.weight


def mapped_from(tensor: torch.Tensor) -> str:
    """The safetensors file whose mapping holds a tensor, as Linux says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(place, 16) for place in fields[0].split("-"))
        if first <= tensor.data_ptr() < last and fields[-1].endswith(".safetensors"):
            return fields[-1]
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("values", "shards"), [("bfloat16", False), ("int8", True)])
def test_embeddings_stay_in_their_file_unless_they_are_the_head(tmp_path, token_ids, values, shards, tied):
    dense = make_sparse("llama", tmp_path / "sparse", shards=shards, tie_word_embeddings=tied)
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed", values)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=SparseConfig(values))
    for model, folder in ((opened, "packed"), (packed, "sparse")):
        found = mapped_from(model.model.embed_tokens.weight)
        multiplied = tied and values == "bfloat16"  # else the head is packed, or has a weight of its own
        assert found == "" if multiplied else Path(found).parent.name == folder
        assert not any(mapped_from(weight) for name, weight in model.named_parameters() if "embed" not in name)
        assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight.bfloat16())
    assert torch.equal(opened(token_ids(1, 8)).logits, packed(token_ids(1, 8)).logits)
