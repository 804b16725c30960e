"""Promised: every rule meets the target exactly, by layer name, above previous rates; each looks at what its paper looks at."""

import random

import numpy as np
import pytest
import references
import torch
from conftest import make_tiny_model
from helpers import toy_model

from losa.adapter import attach, masked_linears
from losa.allocation import layer_rates, spread
from losa.calibration import input_norms, prune_blocks
from losa.importance import cka_matrix, gram, rmi_importance
from losa.models import block_linears, find_decoder
from losa.pruning import Pattern, get_pruner
from losa.rates import allot, decoder_layers, measure, rates
from losa.rules import RULES, get_rule, median_score, outlier_share, removal_curve

IDS = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(3))


def lively(**sizes):
    """Weights large enough for blocks to change what passes through them, and blocks that differ."""
    model = toy_model(**{"num_hidden_layers": 4, "num_key_value_heads": 2, "initializer_range": 0.3, **sizes})
    with torch.no_grad():
        for index, block in enumerate(find_decoder(model).blocks):
            for layer in block_linears(block).values():
                layer.weight.mul_(torch.randn_like(layer.weight).abs() ** (index * 0.4))
    return model


def layer_inputs(model, ids):
    """What each linear layer is given in the model's own forward, by layer name, flattened to `(N, I)`."""
    seen, handles = {}, []
    for index, block in enumerate(find_decoder(model).blocks):
        for name, layer in block_linears(block).items():
            hook = lambda _, args, key=f"{index}.{name}": seen.__setitem__(key, args[0].flatten(0, -2))  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def score(model, ids):
    """Wanda's scores by layer name, in float64, from the model's own forward."""
    inputs = layer_inputs(model, ids)
    linears = {f"{i}.{n}": layer for i, b in enumerate(find_decoder(model).blocks) for n, layer in block_linears(b).items()}
    return {name: references.wanda_scores(layer.weight.detach(), inputs[name]) for name, layer in linears.items()}


def mean(found, model):
    layers = decoder_layers(model)
    return sum(found[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)


def by_block(scores):
    blocks = {}
    for name, value in scores.items():
        blocks.setdefault(int(name.split(".")[0]), []).append(value)
    return [blocks[index] for index in sorted(blocks)]


# input norms


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_norms_are_those_of_the_models_own_forward(family, batch_size):
    model = make_tiny_model(family)
    expected = {name: x.double().square().sum(0) for name, x in layer_inputs(model, IDS).items()}
    found = input_norms(model, IDS, batch_size)
    assert list(found) == [layer.name for layer in decoder_layers(model)] and set(found) == set(expected)
    for name, sq_I in found.items():
        assert sq_I.dtype == torch.float64
        torch.testing.assert_close(sq_I, expected[name], rtol=1e-4, atol=1e-6)


def test_layers_fed_by_one_tensor_share_their_norms():
    found = input_norms(toy_model(), IDS)
    assert found["0.self_attn.q_proj"] is found["0.self_attn.v_proj"]
    assert found["1.mlp.gate_proj"] is found["1.mlp.up_proj"]


def alike(model, rate):
    return {layer.name: rate for layer in decoder_layers(model)}


def test_norms_are_of_the_model_as_it_is_now():
    model = attach(lively())
    prune_blocks(model, IDS, alike(model, 0.6), get_pruner("wanda"), Pattern())
    for layer in masked_linears(model).values():
        layer.lora_B.data.normal_(0, 0.1)
    expected = {name: x.double().square().sum(0) for name, x in layer_inputs(model, IDS).items()}
    for name, sq_I in input_norms(model, IDS, 4).items():
        torch.testing.assert_close(sq_I, expected[name], rtol=1e-4, atol=1e-6)


def test_activations_that_are_not_finite_are_refused():
    model = toy_model()
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"non-finite activations at 0\.self_attn"):
        input_norms(model, IDS)


# what the rules look at


def test_outlier_share_is_owls_plain_loop():
    scores = [torch.distributions.LogNormal(0.0, 1.5).sample((7, 11)), torch.rand(5, 3)]
    flat = [float(x) for part in scores for x in part.flatten()]
    average = sum(flat) / len(flat)
    for multiple in (1.0, 5.0, 7.0):
        expected = sum(1 for x in flat if x > multiple * average) / len(flat)
        assert outlier_share(scores, multiple) == expected


def test_owl_measures_the_share_of_each_block():
    model = lively()
    expected = [outlier_share(block) for block in by_block(score(model, IDS))]
    assert len(set(expected)) > 1
    assert measure(model, IDS, get_rule("owl")) == pytest.approx(expected, abs=1e-12)


def test_dlp_measures_the_median_of_each_block():
    model = lively()
    flat = [torch.cat([part.flatten() for part in block]).sort().values for block in by_block(score(model, IDS))]
    expected = [-float(values[(len(values) - 1) // 2]) for values in flat]
    assert measure(model, IDS, get_rule("dlp")) == pytest.approx(expected, rel=1e-4)


def test_owl_and_dlp_do_not_see_what_is_pruned():
    """Half of the weights gone at random: the zeros would halve the mean and send the median to 0."""
    dense, sparse = lively(), attach(lively())
    before, after = (measure(model, IDS, get_rule("dlp")) for model in (dense, sparse))
    assert after == pytest.approx(before, rel=1e-5)  # a fresh adapter changes nothing
    for layer in masked_linears(sparse).values():
        layer.set_solution(torch.rand_like(layer.weight) < 0.4)
    assert max(measure(sparse, IDS, get_rule("dlp"))) < 0
    scores = [torch.rand(10, 10) for _ in range(2)]
    assert outlier_share([s[s > 2] for s in scores]) == 0 and median_score([s[s > 2] for s in scores]) == 0  # nothing left


@pytest.mark.parametrize("points", [2, 5, 13, 201])
def test_removal_curve_is_the_energy_of_the_lowest_scores_of_every_row(points):
    S = torch.rand(5, 12).double()
    total = sum(float(x) ** 2 for x in S.flatten())
    for step, value in enumerate(removal_curve(S, points)):
        whole, part = divmod(12 * step / (points - 1), 1)
        expected = 0.0
        for row in S.tolist():
            squares = sorted(x * x for x in row)
            expected += sum(squares[: int(whole)]) + (part * squares[int(whole)] if part > 1e-12 else 0.0)
        assert value == pytest.approx(expected / total, abs=1e-12)


def test_removal_curve_is_the_error_of_wandas_mask_for_uncorrelated_inputs():
    X, W = torch.linalg.qr(torch.randn(40, 16).double())[0] * torch.rand(16).double(), torch.randn(6, 16).double()
    S = references.wanda_scores(W, X)
    keep = references.keep_rows(S, torch.ones_like(W, dtype=torch.bool), 0.5)
    error = (X @ (W - W * keep).T).square().sum() / (X @ W.T).square().sum()
    assert removal_curve(S, 9)[4] == pytest.approx(float(error), rel=1e-9)


def test_a_layer_without_energy_costs_nothing():
    assert removal_curve(torch.zeros(3, 4), 5) == [0.0] * 5


def test_error_measures_every_layer_and_finds_what_is_gone_free():
    model = attach(lively())
    prune_blocks(model, IDS, alike(model, 0.5), get_pruner("wanda"), Pattern())
    curves = measure(model, IDS, get_rule("error"))
    assert len(curves) == len(decoder_layers(model))
    assert all(curve[98] == 0 and curve[110] > 0 and curve[-1] == pytest.approx(1) for curve in curves)


# rates


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("target", [0.3, 0.55, 0.7, 0.93])
def test_every_rule_meets_the_target_by_layer_name(name, target):
    model, rule = lively(), get_rule(name)
    found = rates(model, IDS, name, target, rule.band(target))
    assert list(found) == [layer.name for layer in decoder_layers(model)]
    assert mean(found, model) == pytest.approx(target, abs=1e-12)
    assert all(0 <= rate < 1 and abs(rate - target) <= rule.band(target) + 1e-12 for rate in found.values())
    blocks = {layer.block: set() for layer in decoder_layers(model)}
    for layer in decoder_layers(model):
        blocks[layer.block].add(found[layer.name])
    assert rule.by_layer or all(len(values) == 1 for values in blocks.values())
    assert (name == "uniform") == (len(set(found.values())) == 1)


def test_rmi_is_the_papers_linear_programme_over_blocks():
    model, inputs = lively(), []
    blocks = find_decoder(model).blocks
    handles = [b.register_forward_pre_hook(lambda _, a, k: inputs.append(a[0]), with_kwargs=True) for b in blocks]
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    importance = rmi_importance(cka_matrix([gram(x.flatten(1)) for x in inputs])).tolist()
    expected = layer_rates(importance, find_decoder(model).sizes(), 0.7, 0.03)
    found = rates(model, IDS, "rmi", 0.7, 0.03)
    assert [found[f"{block}.mlp.up_proj"] for block in range(4)] == pytest.approx(expected, abs=1e-12)


def test_depth_prunes_late_blocks_more_and_reads_no_text():
    found = rates(lively(), None, "depth", 0.5, 0.01)
    assert [found[f"{block}.mlp.up_proj"] for block in range(4)] == pytest.approx([0.49, 0.49, 0.51, 0.51])


@pytest.mark.parametrize("name", ["owl", "dlp"])
def test_block_rates_are_spread_by_what_was_measured(name):
    model = lively()
    values = measure(model, IDS, get_rule(name))
    expected = spread(values, find_decoder(model).sizes(), 0.7, 0.08)
    found = rates(model, IDS, name, 0.7, 0.08)
    assert [found[f"{block}.self_attn.k_proj"] for block in range(4)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("delta", [0.02, 0.1])
def test_error_is_the_least_loss_that_scipy_finds(delta):
    model = lively()
    layers, curves = decoder_layers(model), measure(model, IDS, get_rule("error"))
    sizes = [layer.size for layer in layers]
    costs = [[size / sum(sizes) * lost for lost in curve] for size, curve in zip(sizes, curves, strict=True)]
    found = rates(model, IDS, "error", 0.6, delta)

    def lost(rate_of):
        grid = np.linspace(0, 1, len(costs[0]))
        return sum(float(np.interp(rate_of[layer.name], grid, cost)) for layer, cost in zip(layers, costs, strict=True))

    best = references.linprog_curves(costs, sizes, 0.6, delta, [0.0] * len(sizes))
    assert lost(found) == pytest.approx(best, abs=1e-8)
    assert lost(found) < lost(dict.fromkeys(found, 0.6))


@pytest.mark.parametrize("name", RULES)
def test_a_delta_of_zero_is_uniform_and_reads_no_text(name):
    assert set(rates(toy_model(), None, name, 0.6, 0.0).values()) == {0.6}


@pytest.mark.parametrize("name", RULES)
def test_steps_stay_above_the_rates_before_while_the_model_changes(name):
    model, rule = attach(lively()), get_rule(name)
    previous = None
    for target in (0.3, 0.5, 0.5, 0.7):
        found = rates(model, IDS, rule, target, rule.band(0.7), previous)
        assert mean(found, model) == pytest.approx(target, abs=1e-9)
        assert previous is None or all(found[layer] >= rate for layer, rate in previous.items())
        prune_blocks(model, IDS, found, get_pruner("wanda"), Pattern())
        previous = found


@pytest.mark.parametrize("seed", range(10))
def test_a_rule_by_block_takes_over_from_one_by_layer(seed):
    """Layers of a block then differ where they had more before, and only there."""
    model, draw = toy_model(), random.Random(seed)
    before = rates(model, IDS, "error", 0.4, 0.2)
    found = allot(model, get_rule("owl"), [draw.random(), draw.random()], 0.4 + 0.1 * draw.random(), 0.05, before)
    assert all(found[name] >= rate for name, rate in before.items())
    usual = [min(rate for name, rate in found.items() if name.startswith(f"{block}.")) for block in range(2)]
    assert all(rate == before[name] or rate == usual[int(name[0])] for name, rate in found.items())


@pytest.mark.parametrize("name", RULES)
def test_protected_blocks_keep_all(name):
    model, rule = lively(), get_rule(name)
    found = rates(model, IDS, rule, 0.3, rule.band(0.3), protected=[0, 2])
    assert all((rate == 0) == (layer[0] in "02") for layer, rate in found.items())
    assert mean(found, model) == pytest.approx(0.3, abs=1e-9)


def test_the_device_and_batches_change_nothing():
    model = lively()
    one, other = (measure(model, IDS, get_rule("error"), torch.device("cpu"), size) for size in (1, 6))
    assert torch.tensor(one).sub(torch.tensor(other)).abs().max() < 1e-5


def test_an_unknown_rule_is_refused_with_the_names():
    with pytest.raises(ValueError, match="rule of layer rates is 'olw', expected one of rmi, depth, uniform, owl, dlp, error"):
        rates(toy_model(), IDS, "olw", 0.5, 0.1)


def test_what_is_missing_is_refused():
    model = toy_model()
    with pytest.raises(ValueError, match="rule owl needs calibration sequences"):
        rates(model, None, "owl", 0.5, 0.1)
    with pytest.raises(ValueError, match=r"name different layers: 0\.mlp\.down_proj"):
        rates(model, None, "depth", 0.5, 0.1, previous={"0.x": 0.1})
    with pytest.raises(ValueError, match="rule error has measured nothing"):
        allot(model, get_rule("error"), None, 0.5, 0.1)
