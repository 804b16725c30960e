"""Promised: values of a grid are bfloat16 exactly, the nearest is found, and a chosen grid errs no more than the plain one."""

import pytest
import torch

from losa.pruning.grid import FORMATS, choose, snap
from losa.runtime.format import pack, unpack
from losa.runtime.values import TYPES

PACKABLE = [name for name, made in FORMATS.items() if made.sparse]


def grid_of(weight, name):
    """Step and `low` of every group of a weight."""
    kind = FORMATS[name]
    group = kind.group or weight.shape[1]
    parts = [choose(weight[:, start : start + group], kind) for start in range(0, weight.shape[1], group)]
    return [torch.stack(part, 1) for part in zip(*parts, strict=True)]


def nearest(weight, name, grid=None):
    """Of a grid, or of the one that is chosen for the weight."""
    kind, columns = FORMATS[name], weight.shape[1]
    parts = grid_of(weight, name) if grid is None else grid
    step, low = (part.repeat_interleave(kind.group or columns, 1)[:, :columns].to(weight.dtype) for part in parts)
    return snap(weight, step, low, kind.span)


def sample(rows=6, columns=160, scale=1.0):
    torch.manual_seed(0)
    return torch.randn(rows, columns).mul(scale) * torch.tensor([1.0, 3.0, 0.01, 100.0, 1e-6, 1.0])[:rows, None]


@pytest.mark.parametrize("name", FORMATS)
def test_snap_finds_the_nearest(name):
    weight, kind = sample(), FORMATS[name]
    grid, snapped = grid_of(weight, name), nearest(weight, name)
    group = kind.group or weight.shape[1]
    for row, column in ((0, 0), (1, 70), (2, 159), (3, 5), (4, 100)):
        step, low = (float(part[row, column // group]) for part in grid)
        values = step * (low + torch.arange(kind.span + 1, dtype=torch.float64))
        distance = (values - float(weight[row, column])).abs().min()
        found = float(snapped[row, column])
        assert abs(found - float(weight[row, column])) <= float(distance) * (1 + 1e-6)


@pytest.mark.parametrize("name", PACKABLE)
def test_values_are_bfloat16_and_have_no_negative_zeros(name):
    found = nearest(sample(), name)
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("name", FORMATS)
def test_a_chosen_grid_errs_no_more_than_the_plain_one(name):
    weight, kind = sample(columns=64), FORMATS[name]
    found = nearest(weight, name)
    assert (found - weight).square().sum() > 0
    if kind.low is None:
        low = weight.amin(1, keepdim=True)
        step = (weight.amax(1, keepdim=True) - low) / kind.span
        plain = snap(weight, step, (low / step).round(), kind.span)
    else:
        step = weight.abs().amax(1, keepdim=True) / -kind.low
        plain = snap(weight, step * (2 if kind.precision == 0 else 17 / 16), torch.full_like(step, kind.low), kind.span)
    assert ((found - weight).square().sum(1) <= 1.01 * (plain - weight).square().sum(1)).all()


def test_zeros_stay_zeros():
    for name in FORMATS:
        assert not nearest(torch.zeros(3, 64), name).any()


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("columns", [64, 100, 192])
def test_packing_what_is_on_the_grid_loses_nothing(name, columns):
    weight = sample(columns=columns) * (torch.rand(6, columns, generator=torch.Generator().manual_seed(1)) < 0.4)
    on_grid = nearest(weight, name).bfloat16()
    assert torch.equal(unpack(pack(on_grid, TYPES[name])), on_grid)
    few = on_grid * (torch.rand(6, columns, generator=torch.Generator().manual_seed(2)) < 0.05)  # the largest are gone
    assert torch.equal(unpack(pack(few, TYPES[name])), few)


@pytest.mark.parametrize(
    ("name", "density", "bits"), [("int4", 0.5, 3.125), ("int4", 0.4, 2.725), ("int8", 0.3, 3.4), ("dense3", 1.0, 3.25)]
)
def test_bits_of_a_weight(name, density, bits):
    assert FORMATS[name].bits_per_weight(density) == pytest.approx(bits)
    if name in TYPES:
        assert 8 * TYPES[name].bytes_per_weight(density) == pytest.approx(bits)
