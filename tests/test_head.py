"""A head that stays dense: the compiled product of one token against float64, and what takes it."""

import copy

import pytest
import torch
from conftest import make_tiny_model
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from losa import SparseConfig, SparseLinear
from losa.runtime import dispatch
from losa.runtime.head import SLOWER, DenseHead, attach

COMPILED = [name for name in dispatch.available() if name != dispatch.REFERENCE]
SHAPES = [(1, 1), (5, 31), (16, 32), (49, 64), (33, 100), (130, 576), (1000, 40), (3, 8)]


def product(x, weight_VH, kernel):
    return torch.ops.losa.dense_linear(x, weight_VH, dispatch.COMPILED.index(kernel))


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("shape", SHAPES)
def test_errs_at_most_twice_as_much_as_torch(kernel, shape):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(shape, generator=generator).bfloat16(), torch.randn(1, shape[1], generator=generator).bfloat16()
    want = linear(x.double(), weight.double())[0]
    ours, torchs = ((found.double() - want).abs().max() for found in (product(x, weight, kernel), linear(x, weight)[0]))
    assert ours <= 2 * max(torchs, want.abs().max() * 2**-9)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("width", [31, 64, 200])
def test_nan_and_infinity_pass_as_they_do_through_torch(kernel, width):
    weight = torch.randn(40, width).bfloat16()
    weight[3, 5] = 0
    for special in (float("inf"), float("nan")):
        x = torch.randn(1, width).bfloat16()
        x[0, 5] = special
        assert product(x, weight, kernel)[3].isnan()
        assert torch.equal(product(x, weight, kernel).isfinite(), linear(x.float(), weight.float())[0].isfinite())


@pytest.mark.skipif(not COMPILED, reason="the CPU kernels were not built")
def test_threads_change_no_bit_and_wrong_sizes_are_refused():
    weight, x = torch.randn(5000, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    found, threads = product(x, weight, COMPILED[-1]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(product(x, weight, COMPILED[-1]), found)
    finally:
        torch.set_num_threads(threads)
    for wrong in (torch.zeros(1, 63), torch.zeros(2, 64)):
        with pytest.raises(RuntimeError, match="one token of 64 bfloat16 features"):
            product(wrong.bfloat16(), weight, COMPILED[-1])
    for other in (weight.float(), weight.t()):
        with pytest.raises(RuntimeError, match="must be a contiguous bfloat16"):
            product(x, other, COMPILED[-1])


@pytest.mark.skipif(not COMPILED or COMPILED[-1] in SLOWER, reason="no kernel here is faster than torch")
def test_a_packed_model_takes_it_for_one_token_only(tmp_path, token_ids, monkeypatch):
    make_tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig()).eval()
    head, hidden = packed.lm_head, torch.randn(1, 3, packed.config.hidden_size).bfloat16()
    asked, compiled = [], torch.ops.losa.dense_linear
    monkeypatch.setattr(torch.ops.losa, "dense_linear", lambda *args: asked.append(1) or compiled(*args))
    with torch.no_grad():
        packed(token_ids(1, 1))
        assert asked == [1]
        torch.testing.assert_close(head(hidden[:, :1]), linear(hidden[:, :1], head.weight), rtol=0.02, atol=0.02)
        head(hidden)
        head.float()
        head(hidden[:, :1].float())
        head.bfloat16()
    head(hidden[:, :1])  # somebody may want gradients
    assert len(asked) == 2
    other = copy.deepcopy(packed)
    assert isinstance(other.lm_head.forward, DenseHead) and other.lm_head.forward.head is other.lm_head
    assert not isinstance(vars(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head).get("forward"), DenseHead)


def test_a_packed_head_keeps_its_own(tmp_path):
    make_tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig("int8"))
    assert isinstance(packed.lm_head, SparseLinear) and not attach(packed)
