"""Promised: statistics of the right inputs, pruning block after block on what the pruned blocks before put out,
reconstruction errors as defined, memory that does not grow with depth."""

import copy

import pytest
import references
import torch
from conftest import FAMILIES, make_tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losa import calibration
from losa.adapter import attach, masked_linears
from losa.calibration import InputStatistics, block_grams
from losa.models import BlockInputs, block_inputs, block_linears, find_decoder
from losa.models.blocks import Call
from losa.pruning import PRUNERS, Pattern, get_pruner
from losa.walk import ReconstructionError

UNSTRUCTURED = Pattern()


def zeros_of_blocks(model):
    """Ratio of zeros of each block, by its masks."""
    ratios = []
    for block in find_decoder(model).blocks:
        masks = [layer.keep_OI for layer in block_linears(block).values()]
        ratios.append(sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    return ratios


def lively(**sizes):
    """A tiny llama with weights large enough for blocks to change what passes through them."""
    return make_tiny_model("llama", initializer_range=0.3, **sizes)


# importance


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_grams_are_those_of_each_blocks_input(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids(5, 16)
    inputs = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
        for block in find_decoder(model).blocks
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    expected = [references.gram(x.flatten(1)) for x in inputs]
    for got, want in zip(block_grams(model, ids, batch_size=2), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def prune_blocks(model, ids_ST, rates, *more, **options):
    """With one rate for all layers of a block."""
    names = [(index, name) for index, block in enumerate(find_decoder(model).blocks) for name in block_linears(block)]
    return calibration.prune_blocks(model, ids_ST, {f"{i}.{name}": rates[i] for i, name in names}, *more, **options)


# pruning, any family


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_reach_their_rate(tiny_model, token_ids, family, pruner):
    model = attach(tiny_model(family))
    errors = prune_blocks(model, token_ids(), [0.5] * 3, get_pruner(pruner), UNSTRUCTURED)
    assert zeros_of_blocks(model) == pytest.approx([0.5] * 3, abs=1e-3)
    assert all(0 < error < float("inf") for error in errors)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_a_second_pruning_is_nested_in_the_first(tiny_model, token_ids, family, pruner):
    model = attach(tiny_model(family))
    prune_blocks(model, token_ids(), [0.3, 0.4, 0.5], get_pruner(pruner), UNSTRUCTURED)
    first = {name: layer.keep_OI.clone() for name, layer in masked_linears(model).items()}
    prune_blocks(model, token_ids(), [0.5, 0.6, 0.7], get_pruner(pruner), UNSTRUCTURED)
    assert not any((layer.keep_OI & ~first[name]).any() for name, layer in masked_linears(model).items())
    assert zeros_of_blocks(model) == pytest.approx([0.5, 0.6, 0.7], abs=1e-3)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pattern_is_completed_in_steps(tiny_model, token_ids, pruner):
    model = attach(tiny_model("llama"))
    for share in (0.5, 0.9, 1.0):
        prune_blocks(model, token_ids(), [0.0] * 3, get_pruner(pruner), Pattern(2, 4), share)
        assert zeros_of_blocks(model) == pytest.approx([0.5 * share] * 3, abs=5e-3)
    assert all(layer.keep_OI.view(-1, 4).sum(1).eq(2).all() for layer in masked_linears(model).values())


@pytest.mark.parametrize("pruner", PRUNERS)
def test_errors_are_zero_at_rate_zero(token_ids, pruner):
    assert prune_blocks(attach(lively()), token_ids(), [0.0] * 3, get_pruner(pruner), UNSTRUCTURED) == [0.0] * 3


def test_errors_grow_with_the_rate(token_ids):
    low, high = (
        prune_blocks(attach(lively()), token_ids(), [rate] * 3, get_pruner("wanda"), UNSTRUCTURED)[-1] for rate in (0.3, 0.8)
    )
    assert 0 < low < high


def test_the_batch_size_does_not_change_the_masks(token_ids):
    masks = []
    for batch_size in (1, 2, 5):
        model = attach(lively())
        prune_blocks(model, token_ids(), [0.5] * 3, get_pruner("magnitude"), UNSTRUCTURED, batch_size=batch_size)
        masks.append(torch.cat([layer.keep_OI.flatten() for layer in masked_linears(model).values()]))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_a_failing_layer_is_named(token_ids):
    with pytest.raises(ValueError, match=r"block 0, self_attn\.q_proj, .*in_features is 32, expected a multiple of 5"):
        prune_blocks(attach(lively()), token_ids(), [0.5] * 3, get_pruner("wanda"), Pattern(2, 5))


# statistics


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox", "phi3"])
def test_shared_statistics_equal_separate_ones(tiny_model, token_ids, family, pruner):
    model, pruner = tiny_model(family), get_pruner(pruner)
    stream, block = block_inputs(model, token_ids(), 2), find_decoder(model).blocks[0]
    shared = InputStatistics(pruner)
    separate = {}

    def hook(layer, args):
        separate[layer] = pruner.collect(separate.get(layer), args[0].flatten(0, -2))

    with torch.no_grad():
        shared.collect(block, 0, stream)
        handles = [layer.register_forward_pre_hook(hook) for layer in block_linears(block).values()]
        for batch in range(len(stream.hidden)):
            stream.output(block, 0, batch)
    for handle in handles:
        handle.remove()
    layers = block_linears(block)
    found = {name: statistic for names, statistic in shared.groups(block) for name in names}
    assert found.keys() == layers.keys()
    assert all(torch.equal(found[name], separate[layer]) for name, layer in layers.items())


def test_layers_with_one_input_share_one_statistic(token_ids):
    model = lively()
    statistics, block = InputStatistics(get_pruner("sparsegpt")), find_decoder(model).blocks[0]
    with torch.no_grad():
        statistics.collect(block, 0, block_inputs(model, token_ids(), 2))
    groups = [[name.split(".")[-1] for name in names] for names, _ in statistics.groups(block)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_collecting_ends_a_forward_at_the_last_input(token_ids):
    """Counted in products: seven in the first batch, six in each of the others."""
    model, calls = lively(), []
    block, stream = find_decoder(model).blocks[0], block_inputs(model, token_ids(6), 2)
    for layer in block_linears(block).values():
        layer.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        InputStatistics(get_pruner("wanda")).collect(block, 0, stream)
    assert len(calls) == 7 + 6 + 6


class Experts(nn.Module):
    """A block whose second layer sees only some sequences: those that begin with a large number."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, hidden):
        hidden = self.first(hidden)
        chosen = hidden[:, 0, 0] > 0
        if chosen.any():
            hidden = hidden.clone()
            hidden[chosen] = self.second(hidden[chosen])
        return self.third(hidden)


def test_layers_that_some_batches_do_not_reach_miss_nothing():
    block, pruner = Experts(), get_pruner("wanda")
    stream = BlockInputs(list(torch.randn(24, 5, 4).split(2)), [Call()])
    inputs = {layer: [] for layer in block_linears(block).values()}
    handles = [layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0])) for layer in inputs]
    with torch.no_grad():
        for batch in range(12):
            stream.output(block, 0, batch)
        for handle in handles:
            handle.remove()
        statistics = InputStatistics(pruner)
        statistics.collect(block, 0, stream)
    assert 0 < len(inputs[block.second]) < 12
    for names, statistic in statistics.groups(block):
        expected = torch.cat([x.flatten(0, -2) for x in inputs[block_linears(block)[names[0]]]]).double().square().sum(0)
        torch.testing.assert_close(statistic, expected)


def test_errors_may_be_measured_on_some_sequences(token_ids):
    """The masks come from all of them."""
    ids = token_ids(6, 16)
    models = [attach(lively()) for _ in range(3)]
    whole, some, none = (
        prune_blocks(model, ids, [0.6] * 3, get_pruner("wanda"), UNSTRUCTURED, batch_size=4, error_sequences=count)
        for model, count in zip(models, (None, 5, 0), strict=True)
    )
    assert none == [] and some != whole
    assert some == pytest.approx(whole, rel=0.3)
    for one, other in zip(masked_linears(models[0]).values(), masked_linears(models[1]).values(), strict=True):
        assert torch.equal(one.keep_OI, other.keep_OI)
    dense = lively()
    with torch.no_grad():
        states = [model.model(ids[:5], output_hidden_states=True).hidden_states[1] for model in (dense, models[1])]
    assert some[0] == pytest.approx(references.reconstruction_error(*states), rel=1e-4)


def test_collecting_leaves_no_hook(token_ids):
    model = lively()
    block = find_decoder(model).blocks[0]
    with torch.no_grad():
        InputStatistics(get_pruner("wanda")).collect(block, 0, block_inputs(model, token_ids(), 2))
    assert not any(layer._forward_pre_hooks for layer in block_linears(block).values())


def sequential_wanda_masks(model, ids, rate, prune_before=True):
    """Wanda block after block by full forward passes: blocks before are pruned, or, for comparison, still dense."""
    masks, model = {}, copy.deepcopy(model)
    decoder = find_decoder(model)
    for index, block in enumerate(decoder.blocks):
        seen = {}

        def hook(layer, args, seen=seen):
            seen[layer] = args[0].flatten(0, -2).double()

        handles = [layer.register_forward_pre_hook(hook) for layer in block_linears(block).values()]
        with torch.no_grad():
            model(input_ids=ids)
            for handle in handles:
                handle.remove()
            for name, layer in block_linears(block).items():
                full = torch.ones_like(layer.weight, dtype=torch.bool)
                mask = references.keep_rows(references.wanda_scores(layer.weight, seen[layer]), full, rate)
                masks[f"{decoder.name}.{index}.{name}"] = mask
                if prune_before:
                    layer.weight.mul_(mask)
    return masks


def disagreement(masks, others):
    different = sum(int((masks[name] != others[name]).sum()) for name in masks)
    return different / sum(mask.numel() for mask in masks.values())


def test_a_block_sees_what_the_pruned_blocks_before_put_out(token_ids):
    model, ids = lively(), token_ids(6, 16)
    expected = sequential_wanda_masks(model, ids, 0.6)
    of_dense_inputs = sequential_wanda_masks(model, ids, 0.6, prune_before=False)
    prune_blocks(attach(model), ids, [0.6] * 3, get_pruner("wanda"), UNSTRUCTURED, batch_size=4)
    masks = {name: layer.keep_OI for name, layer in masked_linears(model).items()}
    assert disagreement(masks, expected) < 1e-3  # rounding may swap two equal scores
    assert disagreement(masks, of_dense_inputs) > 0.02


def test_what_is_pruned_is_the_merged_weight(token_ids):
    model = attach(lively())
    for layer in masked_linears(model).values():
        nn.init.normal_(layer.lora_B, std=1.0)
    merged = {name: layer.effective().detach() for name, layer in masked_linears(model).items()}
    prune_blocks(model, token_ids(), [0.5] * 3, get_pruner("magnitude"), UNSTRUCTURED)
    for name, layer in masked_linears(model).items():
        expected = references.keep_rows(merged[name].abs(), torch.ones_like(layer.keep_OI), 0.5)
        assert torch.equal(layer.keep_OI, expected)


# reconstruction errors


def test_the_reconstruction_error_equals_the_formula_over_all_batches():
    dense, sparse = torch.randn(7, 5, 12) * torch.rand(12), torch.randn(7, 5, 12)
    error = ReconstructionError()
    for batch in (slice(0, 3), slice(3, 4), slice(4, 7)):
        error.add(dense[batch], sparse[batch])
    assert error.value() == pytest.approx(references.reconstruction_error(dense, sparse), rel=1e-12)


def test_a_channel_that_is_always_zero_counts_as_zero():
    dense, sparse = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    dense[..., 2] = 0.0
    error = ReconstructionError()
    error.add(dense, sparse)
    assert error.value() == pytest.approx(references.reconstruction_error(dense, sparse), rel=1e-12)


def test_pruning_reports_the_error_of_dense_against_pruned_blocks(token_ids):
    model, ids = lively(), token_ids(6, 16)
    dense_model = copy.deepcopy(model)
    errors = prune_blocks(attach(model), ids, [0.6] * 3, get_pruner("sparsegpt"), UNSTRUCTURED, batch_size=4)
    with torch.no_grad():
        dense = dense_model.model(ids, output_hidden_states=True).hidden_states
        sparse = model.model(ids, output_hidden_states=True).hidden_states
    # the last hidden state is after the final norm, so blocks 0 and 1 are compared
    expected = [references.reconstruction_error(dense[i], sparse[i]) for i in (1, 2)]
    assert errors[:2] == pytest.approx(expected, rel=1e-4)


def test_the_teacher_stays_dense_in_later_steps(token_ids):
    model, ids = lively(), token_ids(6, 16)
    dense_model = copy.deepcopy(model)
    attach(model)
    prune_blocks(model, ids, [0.4] * 3, get_pruner("sparsegpt"), UNSTRUCTURED)
    errors = prune_blocks(model, ids, [0.6] * 3, get_pruner("sparsegpt"), UNSTRUCTURED)
    with torch.no_grad():
        dense = dense_model.model(ids, output_hidden_states=True).hidden_states
        sparse = model.model(ids, output_hidden_states=True).hidden_states
    assert errors[0] == pytest.approx(references.reconstruction_error(dense[1], sparse[1]), rel=1e-4)


def test_no_layer_is_left_dense(token_ids):
    model = attach(lively())
    prune_blocks(model, token_ids(), [0.5] * 3, get_pruner("wanda"), UNSTRUCTURED)
    assert not any(layer.dense for layer in masked_linears(model).values())


# devices and memory


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_blocks_end_where_they_were(token_ids, device):
    model = attach(lively())
    prune_blocks(model, token_ids(), [0.5] * 3, get_pruner("wanda"), UNSTRUCTURED, device=device)
    block_grams(model, token_ids(), device=device)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_for_blocks_gives_the_same_masks_and_hands_them_back(token_ids):
    masks = []
    for device in (None, torch.device("cuda")):
        model = attach(lively())
        prune_blocks(model, token_ids(), [0.5] * 3, get_pruner("wanda"), UNSTRUCTURED, device=device)
        assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
        masks.append({name: layer.keep_OI for name, layer in masked_linears(model).items()})
    assert disagreement(*masks) < 5e-3


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive, after any operation, in storages made since it was entered."""

    def __enter__(self):
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in self.storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self.storages(result):
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

    @staticmethod
    def storages(tree):
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_memory(blocks, work):
    """Bytes of tensors alive at once during `work`, on a model of so many blocks whose activations outweigh its weights."""
    model = attach(make_tiny_model("llama", num_hidden_layers=blocks))
    ids = torch.randint(3, 64, (16, 64), generator=torch.Generator().manual_seed(0))
    with PeakMemory() as memory:
        work(model, ids)
    return memory.peak


def grams(model, ids):
    block_grams(model, ids, batch_size=2)


def pruning(model, ids):
    prune_blocks(model, ids, [0.5] * len(find_decoder(model).blocks), get_pruner("wanda"), UNSTRUCTURED, batch_size=2)


@pytest.mark.parametrize("work", [grams, pruning])
def test_memory_does_not_grow_with_depth(work):
    shallow, deep = peak_memory(2, work), peak_memory(8, work)
    assert shallow >= 16 * 64 * 32 * 4  # at least one stream of hidden states was seen
    assert deep <= 1.1 * shallow


@torch.no_grad()
def test_collecting_keeps_the_inputs_of_one_batch():
    peaks, model = [], make_tiny_model("llama")
    for sequences in (4, 32):
        ids = torch.randint(3, 64, (sequences, 64), generator=torch.Generator().manual_seed(0))
        stream = block_inputs(model, ids, batch_size=2)
        with PeakMemory() as memory:
            InputStatistics(get_pruner("wanda")).collect(find_decoder(model).blocks[0], 0, stream)
        peaks.append(memory.peak)
    assert peaks[1] <= 1.1 * peaks[0]


def test_the_memory_meter_notices_what_is_kept():
    def keep_everything(model, ids):
        model.model(ids, output_hidden_states=True)

    with torch.no_grad():
        assert peak_memory(8, keep_everything) > 1.5 * peak_memory(2, keep_everything)
