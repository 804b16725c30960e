"""A packed layer stands in for `nn.Linear`, for `torch.compile` too."""

import pytest
import torch

from losa.runtime import dispatch
from losa.runtime.format import linear, pack
from losa.runtime.linear import SparseLinear


@pytest.mark.skipif(len(dispatch.available()) == 1, reason="no compiled kernels in this installation")
def test_torch_compile_sees_one_operator():
    layer = SparseLinear.from_linear(torch.nn.Linear(24, 40, bias=False, dtype=torch.bfloat16))
    x = torch.randn(3, 24).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_layer_stands_in_for_a_linear():
    dense = torch.nn.Linear(40, 24, dtype=torch.bfloat16)
    dense.weight.data[torch.rand(24, 40) < 0.7] = 0
    layer = SparseLinear.from_linear(dense)
    layer.check("layer")
    x = torch.randn(2, 5, 40).bfloat16()
    torch.testing.assert_close(layer(x), linear(x, pack(dense.weight.data), dense.bias))
    back = layer.to_linear()
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    assert "in_features=40, out_features=24, bias=True" in repr(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(ValueError, match=r"computes in bfloat16, found torch\.float32"):
        layer(x.float())
