"""Promised: vLLM runs packed layers as transformers does, merged and cut as it pleases, and nothing is rounded on the way.

Most of it needs no vLLM: layers that load as vLLM's do stand in for them. What needs the engine runs where `vllm` can be imported
(`make test-vllm` makes such an environment), in processes of their own.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_packed_checkpoint import make_exact, make_sparse
from torch import nn

import losa
from losa.integrations.layers import PackedAfterLoading, PackedBefore, full_rows, multiply
from losa.runtime.files import pack_checkpoint
from losa.runtime.format import compress, expand, pack, unpack
from losa.runtime.header import Packing
from losa.runtime.memory import HugePages
from losa.runtime.values import BFLOAT16, INT4, INT8, TYPES

VALUES = [pytest.param(kind, id=name) for name, kind in TYPES.items()]


def sparse(rows: int, columns: int, sparsity: float = 0.7) -> torch.Tensor:
    W_OI = torch.randn(rows, columns).bfloat16()
    W_OI[torch.rand(rows, columns) < sparsity] = 0
    return W_OI


class Layer(nn.Module):
    """Loads as vLLM does: a matrix `shard` goes below the ones before it, and of each a process has its rows or columns."""

    def __init__(self, rows: list[int], columns: int, rank: int = 0, ranks: int = 1, by_columns: bool = False) -> None:
        super().__init__()
        self.rank, self.ranks, self.by_columns = rank, ranks, by_columns
        self.output_sizes, self.output_size, self.columns = rows, sum(rows), columns
        self.loaded: list[Any] = []

    def make(self, method: Any) -> None:
        self.quant_method = method
        rows = self.output_sizes if self.by_columns else [rows // self.ranks for rows in self.output_sizes]
        width = self.columns // self.ranks if self.by_columns else self.columns
        sizes = (width, rows, self.columns, self.output_size, torch.bfloat16)
        method.create_weights(self, *sizes, weight_loader=self.load)

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor, shard: int | None = None) -> None:
        target = parameter.data
        if self.by_columns and hasattr(parameter, "input_dim"):
            tensor = tensor.chunk(self.ranks, parameter.input_dim)[self.rank]
        elif not self.by_columns:
            tensor = tensor.chunk(self.ranks, parameter.output_dim)[self.rank]
        if shard is not None:
            start = sum(self.output_sizes[:shard]) // self.ranks
            target = target.narrow(parameter.output_dim, start, self.output_sizes[shard] // self.ranks)
        assert target.shape == tensor.shape
        target.copy_(tensor)

    def cut(self, W_OI: torch.Tensor) -> torch.Tensor:
        return W_OI.chunk(self.ranks, int(self.by_columns))[self.rank]


def open_packed(layer: Layer, kind, weights: list[torch.Tensor], **changes: Any) -> list[torch.Tensor]:
    """Loads packed matrices into a layer, part by part, as vLLM calls its loaders. Returns what they unpack to."""
    packed = [pack(W_OI, kind) for W_OI in weights]
    names = [f"model.layers.0.part{number}" for number in range(len(weights))]
    layer.make(PackedBefore(kind, HugePages(), names, changes.get("counts") or [weight.stored for weight in packed]))
    for shard, weight in enumerate(packed):
        for part, tensor in (weight.tensors() | changes.get("parts", {})).items():
            if tensor is not None:
                parameter = getattr(layer, part)
                parameter.weight_loader(parameter, tensor, *([shard] if len(weights) > 1 else []))
    layer.quant_method.process_weights_after_loading(layer)
    return [unpack(weight) for weight in packed]


@pytest.mark.parametrize("kind", VALUES)
def test_numbers_and_scales_can_be_cut_and_put_together(kind):
    first, second = pack(sparse(40, 200), kind), pack(sparse(24, 200), kind)
    numbers, scale, groups = expand(first)
    again = compress(numbers, scale, groups, kind)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), first.tensors().values(), strict=True))
    cut = compress(
        numbers[8:33, 64:192], None if scale is None else scale[8:33], None if groups is None else groups[8:33, 1:3], kind
    )
    assert torch.equal(unpack(cut), unpack(first)[8:33, 64:192])
    pairs = [None if a is None else torch.cat([a, b]) for a, b in zip(expand(first), expand(second), strict=True)]
    assert torch.equal(unpack(compress(*pairs, kind)), torch.cat([unpack(first), unpack(second)]))


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(
    ("rows", "ranks", "by_columns"),
    [([48, 24, 24], 1, False), ([48, 24, 24], 2, False), ([40], 1, False), ([40], 2, True)],
    ids=["merged", "rows", "one", "columns"],
)
def test_a_packed_checkpoint_is_merged_and_cut_without_rounding(kind, rows, ranks, by_columns):
    weights = [sparse(count, 128) for count in rows]
    for rank in range(ranks):
        layer = Layer(rows, 128, rank, ranks, by_columns)
        wanted = torch.cat([layer.cut(W_OI) for W_OI in open_packed(layer, kind, weights)])
        assert torch.equal(unpack(layer.sparse.packed), wanted)
        x, bias = torch.randn(3, wanted.shape[1]).bfloat16(), torch.randn(len(wanted)).bfloat16()
        exact = torch.nn.functional.linear(x.double(), wanted.double(), bias.double())
        torchs = (torch.nn.functional.linear(x, wanted, bias) - exact).abs().max()
        assert (layer.quant_method.apply(layer, x, bias) - exact).abs().max() <= 2 * torchs
        assert {name for name, _ in layer.named_parameters()} == {f"sparse.{part}" for part in layer.sparse.packed.tensors()}


@pytest.mark.parametrize("kind", VALUES)
def test_a_dense_layer_is_packed_when_it_is_loaded(kind):
    W_OI, layer = sparse(40, 128), Layer([40], 128)
    layer.make(PackedAfterLoading(kind, HugePages(), dense=lambda: None))
    layer.weight.weight_loader(layer.weight, W_OI)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as in vLLM
        layer.quant_method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(unpack(layer.sparse.packed), unpack(pack(W_OI, kind)))
    assert not unpack(layer.sparse.packed)[W_OI == 0].any()
    assert not hasattr(layer, "weight")


def test_a_layer_that_packing_would_not_make_smaller_stays_as_it_is():
    class Dense:
        done = False

        def process_weights_after_loading(self, layer):
            self.done = True

    for kind, sparsity, stays in ((BFLOAT16, 0.0, True), (BFLOAT16, 0.5, False), (INT8, 0.0, False)):
        layer = Layer([64], 128)
        layer.make(PackedAfterLoading(kind, HugePages(), Dense))
        layer.weight.weight_loader(layer.weight, W_OI := sparse(64, 128, sparsity))
        layer.quant_method.process_weights_after_loading(layer)
        assert hasattr(layer, "weight") == stays
        if stays:
            assert layer.quant_method.done
            assert torch.equal(layer.weight, W_OI)


def test_a_head_that_is_tied_leaves_the_embedding_its_weight():
    embedding, head = Layer([64], 128), Layer([64], 128)
    head.make(PackedAfterLoading(INT8, HugePages(), dense=lambda: None))
    embedding.weight = nn.Parameter(sparse(64, 128, 0), requires_grad=False)
    head.weight = embedding.weight
    head.quant_method.process_weights_after_loading(head)
    assert embedding.weight.shape == (64, 128)
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(multiply(head, x, None), losa.SparseLinear.from_packed(pack(embedding.weight.data, INT8))(x))


def test_rows_of_a_matrix_are_those_of_the_whole_model():
    attention = SimpleNamespace(total_num_heads=9, total_num_kv_heads=3, head_size=64, v_head_size=32)
    assert [full_rows(attention, shard) for shard in ("q", "k", "v", None)] == [576, 192, 96, 864]
    assert full_rows(SimpleNamespace(output_sizes=[40, 24]), 1) == 24
    assert full_rows(SimpleNamespace(output_size=128), None) == 128
    assert full_rows(SimpleNamespace(output_size=128, org_vocab_size=100), None) == 100


def test_damaged_parts_are_refused_by_name():
    W_OI = sparse(32, 64)
    with pytest.raises(ValueError, match=r"part1: the header claims 7 stored values, the masks mark"):
        open_packed(Layer([32, 32], 64), INT8, [W_OI, W_OI], counts=[pack(W_OI, INT8).stored, 7])
    with pytest.raises(ValueError, match=r"lacks a part of model\.layers\.0\.part0; it is damaged"):
        open_packed(Layer([32], 64), BFLOAT16, [sparse(32, 64)], parts={"weight_mask": None})
    with pytest.raises(ValueError, match=r"part0: offsets is torch.int64 of shape \(2,\), expected torch.int64 of \(3,\)"):
        open_packed(Layer([32], 64), BFLOAT16, [sparse(32, 64)], parts={"weight_offsets": torch.zeros(2, dtype=torch.int64)})


def test_columns_are_not_cut_inside_of_a_group():
    with pytest.raises(ValueError, match="part0 has 192 columns, 96 for each process, and int4 values share scales by 64"):
        open_packed(Layer([32], 192, ranks=2, by_columns=True), INT4, [sparse(32, 192)])


def test_pages_are_shared_and_their_copies_begin_empty():
    pages = HugePages(1 << 16)
    small, large = torch.randn(100), torch.randn(1 << 15)
    first, second, third = pages.copy(small), pages.copy(small), pages.copy(large)
    assert torch.equal(first, small)
    assert torch.equal(third, large)
    assert second.data_ptr() - first.data_ptr() == 448  # to the next cache line
    for again in (deepcopy(pages), pickle.loads(pickle.dumps(pages))):
        assert torch.equal(again.copy(small), small)


# ---- the engine itself -----------------------------------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vllm cannot be imported here: `make test-vllm` makes an environment that has it"
)
IDS = [list(range(3, 40)), list(range(50, 20, -1))]
NEW = 8
ENGINE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model, ids, new, options = sys.argv[1], *map(json.loads, sys.argv[2:])
    engine = LLM(model, dtype="bfloat16", enforce_eager=True, max_model_len=64, enable_prefix_caching=False, **options)
    wanted = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    found = engine.generate([{"prompt_token_ids": one} for one in ids], wanted, use_tqdm=False)
    scores = [next(iter(place.values())).logprob for one in found for place in one.prompt_logprobs[1:]]
    print("RESULT", json.dumps({"scores": scores, "tokens": [list(one.outputs[0].token_ids) for one in found]}), flush=True)
"""


def ask_engine(model: Path, processes: bool = False, **options: Any) -> dict[str, Any]:
    """Log-probabilities of the prompts, and greedy tokens, from a vLLM in a process of its own; asked once for each question."""
    return _ask_engine(model, processes, json.dumps(options))


@cache
def _ask_engine(model: Path, processes: bool, options: str) -> dict[str, Any]:
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": "1"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", ENGINE, str(model), json.dumps(IDS), str(NEW), options]
    if processes:  # vLLM starts them by importing the main module, which must be a file
        script = model.parent / "engine.py"
        script.write_text(ENGINE)
        command[1:3] = [str(script)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A sparse checkpoint whose shapes two processes can share, and its packed ones."""
    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_sparse("llama", folder / "sparse", **sizes)
    for values in TYPES:
        pack_checkpoint(folder / "sparse", folder / values, values)
    return folder


def check_scores(directory, found: dict[str, Any]) -> None:
    """At most twice as far from float64 as transformers in bfloat16 is."""
    model, _ = losa.load(directory)
    exact = make_exact(model.dequantize() if isinstance(model.lm_head, losa.SparseLinear) or directory.name in TYPES else model)
    model, _ = losa.load(directory)

    def scores(network):
        with torch.no_grad():
            rows = [network(torch.tensor([one])).logits[0, :-1].double().log_softmax(-1) for one in IDS]
        return torch.cat([row.gather(1, torch.tensor(one[1:])[:, None])[:, 0] for row, one in zip(rows, IDS, strict=True)])

    want = scores(exact)
    theirs = (scores(model) - want).abs().max()
    assert (torch.tensor(found["scores"], dtype=torch.float64) - want).abs().max() <= 2 * theirs


@needs_vllm
@pytest.mark.parametrize("values", list(TYPES))
def test_vllm_opens_and_packs_with_the_same_result(toys, values):
    opened = ask_engine(toys / values)
    check_scores(toys / values, opened)
    name = "losa" if values == "bfloat16" else f"losa_{values}"
    assert ask_engine(toys / "sparse", quantization=name) == opened


@needs_vllm
def test_vllm_takes_a_header_by_its_overrides(toys):
    header = {"quant_method": "losa", "values": "int8", "head": "keep"}
    found = ask_engine(toys / "sparse", hf_overrides={"quantization_config": header})
    assert found["tokens"]
    assert found["scores"] != ask_engine(toys / "int8")["scores"]  # its head is int8


@needs_vllm
def test_two_processes_of_vllm_share_a_packed_model(toys):
    alone, together = ask_engine(toys / "int8"), ask_engine(toys / "int8", processes=True, tensor_parallel_size=2)
    check_scores(toys / "int8", together)
    assert torch.allclose(torch.tensor(alone["scores"]), torch.tensor(together["scores"]), atol=0.05)


@needs_vllm
def test_the_header_decides_which_layers_of_vllm_are_packed():
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    from losa.integrations.vllm import SparseInt4, SparseInt8, SparseQuantization

    load_general_plugins()
    made = {"losa": SparseQuantization, "losa_int8": SparseInt8, "losa_int4": SparseInt4}
    assert {name: get_quantization_config(name) for name in made} == made
    assert SparseInt4().packing == Packing("int4")
    header = {"quant_method": "losa", "values": "int8", "layers": {"a.0.gate_proj": 3, "a.0.up_proj": 4, "a.1.up_proj": 5}}
    config = SparseQuantization.from_config(header)
    assert pickle.loads(pickle.dumps(config)).packing == config.packing
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    layer = LinearBase.__new__(LinearBase)
    method = config.get_quant_method(layer, "a.0.gate_up_proj")
    assert (method.names, method.counts) == (["a.0.gate_proj", "a.0.up_proj"], [3, 4])
    assert isinstance(config.get_quant_method(layer, "a.0.down_proj"), UnquantizedLinearMethod)
    with pytest.raises(ValueError, match=r"a part of a\.1\.gate_up_proj, but not a\.1\.gate_proj"):
        config.get_quant_method(layer, "a.1.gate_up_proj")
