"""Weights move to huge pages as they are."""

import torch

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
