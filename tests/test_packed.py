"""The packed weight: the format against a reference that walks it bit by bit, and every kernel against float64."""

import itertools
import os

import numpy as np
import pytest
import torch
from references import codes_by_hand, packed_by_hand

from losa.runtime import dispatch
from losa.runtime.format import PackedWeight, check, linear, pack, unpack
from losa.runtime.linear import SparseLinear
from losa.runtime.memory import move_to_huge_pages
from losa.runtime.values import BFLOAT16, INT4, INT8, TYPES

SHAPES = [(1, 1), (16, 2), (16, 4), (3, 5), (17, 33), (64, 64), (200, 130), (96, 1030), (33, 515), (32, 4096)]
DENSITIES = [0.0, 0.3, 1.0]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 65, 130]
VALUES = list(TYPES.values())
RUNNABLE = dispatch.available()
COMPILED = [name for name in RUNNABLE if name != dispatch.REFERENCE]


def sparse(rows: int, columns: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(rows, columns, generator=generator).bfloat16()
    return torch.where(torch.rand(rows, columns, generator=generator) < density, W_OI, 0)


def exact(packed: PackedWeight) -> torch.Tensor:
    """The weight in float64: stored values times their scales, not rounded to bfloat16."""
    if packed.scale is None:
        return unpack(packed).double()
    return unpack(packed._replace(scale=torch.ones_like(packed.scale))).double() * packed.scale.double()[:, None]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("shape", "density"), itertools.product(SHAPES, DENSITIES))
def test_format_equals_a_walk_by_hand_and_unpacks_to_itself(shape, density, values):
    W_OI = sparse(*shape, density)
    packed = pack(W_OI, values)
    check(packed)
    numbers = W_OI if packed.scale is None else exact(packed) / packed.scale.double()[:, None]
    if packed.groups is not None:
        numbers = numbers / group_scales(packed)
    mask, stored, offsets = packed_by_hand(numbers, values.name)
    assert packed.mask.flatten().tolist() == mask
    found = packed.values.tolist()
    assert (codes_by_hand(found, values.bits, packed.stored) if values.bits < 8 else found) == stored
    assert packed.offsets.tolist() == offsets
    if values == BFLOAT16:
        assert torch.equal(unpack(packed).view(torch.int16), W_OI.view(torch.int16))
    elif packed.groups is None:
        assert ((exact(packed) - W_OI.double()).abs() <= packed.scale.double()[:, None] / 2 * (1 + 1e-4)).all()


def group_scales(packed: PackedWeight) -> torch.Tensor:
    """Of every weight, in float64, without the rows' scales."""
    of = [[2.0 ** (byte // 16 - 15) * (1 + byte % 16 / 16) for byte in row] for row in packed.groups.flatten(0, 1).tolist()]
    by_group = torch.tensor(of, dtype=torch.float64).view(packed.groups.shape).transpose(1, 2).flatten(0, 1)
    return by_group.repeat_interleave(64, 1)[: packed.rows, : packed.columns]


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_int4_scales_leave_hardly_more_error_than_the_best_of_all(density):
    W_OI = sparse(40, 200, density, seed=3)
    W_OI[5, 64:128] = 0
    W_OI[6] = 0
    W_OI[7] *= 2.0**100
    W_OI[8] *= 2.0**-100
    packed = pack(W_OI, INT4)
    W, found = W_OI.double(), exact(packed)
    error = torch.nn.functional.pad((found - W).square(), (0, 56)).view(40, 4, 64).sum(2)
    best = torch.full_like(error, torch.inf)
    for byte in range(256):
        step = packed.scale.double()[:, None] * (2.0 ** (byte // 16 - 15) * (1 + byte % 16 / 16))
        tried = ((W / step).round().clamp(-8, 8) * step - W).square()
        best = torch.minimum(best, torch.nn.functional.pad(tried, (0, 56)).view(40, 4, 64).sum(2))
    usual = [row for row in range(40) if row not in (7, 8)]  # whose sizes would hide the others'
    assert error[usual].sum() <= 1.01 * best[usual].sum()
    assert (error.sum(1) <= 1.2 * best.sum(1)).all()
    assert torch.equal(unpack(packed).double(), found)  # a bfloat16 holds every one of these weights exactly
    assert ((found != 0) <= (W != 0)).all()


def test_negative_zero_is_a_zero_and_nan_is_kept():
    W_OI = torch.tensor([[-0.0, 1.0, float("nan")]], dtype=torch.bfloat16)
    packed = pack(W_OI)
    assert packed.values.numel() == 2
    assert unpack(packed).isnan().tolist() == [[False, False, True]]


def test_pack_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match=r"bfloat16 weight, found torch\.float32"):
        pack(torch.ones(2, 2))
    for values in (kind for kind in VALUES if kind.rounds):
        with pytest.raises(ValueError, match=f"to be rounded to {values.name} holds NaN or infinity"):
            pack(torch.full((2, 2), float("inf"), dtype=torch.bfloat16), values)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_err_at_most_twice_as_much_as_torch_in_the_same_precision(name, shape, values):
    generator = torch.Generator().manual_seed(1)
    for density, tokens in itertools.product(DENSITIES, TOKENS):
        packed = pack(sparse(*shape, density), values)
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        bias = torch.randn(shape[0], generator=generator).bfloat16() if tokens % 2 else None
        want = torch.nn.functional.linear(x.double(), exact(packed), None if bias is None else bias.double())
        ours = (dispatch.linear(x, packed, bias, name).double() - want).abs().max()
        torchs = (torch.nn.functional.linear(x, unpack(packed), bias).double() - want).abs().max()
        # Half a unit in the last place of the largest output is what rounding to bfloat16 alone can cost.
        rounding = want.abs().max() * 2**-9
        assert ours <= 2 * max(torchs, rounding), (density, tokens)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", RUNNABLE)
def test_empty_inputs_and_leading_dimensions(name, values):
    packed = pack(sparse(24, 40, 0.5), values)
    assert dispatch.linear(torch.empty(0, 40, dtype=torch.bfloat16), packed, None, name).shape == (0, 24)
    x = torch.randn(2, 3, 40).bfloat16()
    folded = dispatch.linear(x.view(6, 40), packed, None, name)
    assert torch.equal(dispatch.linear(x, packed, None, name).view(6, 24), folded)
    strided = torch.randn(40, 6).bfloat16().t()
    assert torch.equal(dispatch.linear(strided, packed, None, name), dispatch.linear(strided.contiguous(), packed, None, name))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
def test_nan_and_infinity_pass_as_they_do_through_torch(name, values):
    """Zeros of the weight times infinity are NaN, wherever the special number stands and however many tokens there are."""
    packed = pack(sparse(40, 200, 0.3), values)
    for special, tokens in itertools.product((float("inf"), -float("inf"), float("nan")), (1, 2, 4, 9, 16, 17, 40)):
        x = torch.randn(tokens, 200).bfloat16()
        x[tokens // 2, 7] = special
        # float32, for torch's own bfloat16 product may read over the end of a row that does not fill its tiles.
        want = torch.nn.functional.linear(x.float(), unpack(packed).float())
        y = dispatch.linear(x, packed, None, name).float()
        assert torch.equal(y.isnan(), want.isnan()), (special, tokens)
        assert torch.equal(y.isposinf(), want.isposinf()), (special, tokens)
        assert torch.equal(y.isneginf(), want.isneginf()), (special, tokens)


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_input_of_another_width_is_refused(name):
    """In all of its types a packed layer of 100 columns has as many words as one of 99."""
    for values in VALUES:
        layer = SparseLinear.from_linear(torch.nn.Linear(100, 24, dtype=torch.bfloat16), values)
        for width in (99, 101):
            with pytest.raises(ValueError, match=f"found {width} features in the input of a packed layer of 100"):
                layer(torch.randn(2, width).bfloat16())
        packed = layer.packed
        if name in COMPILED:
            with pytest.raises(RuntimeError, match="found 99 features in x, the weight has 100"):
                number = dispatch.COMPILED.index(name)
                torch.ops.losa.sparse_linear(torch.randn(1, 99).bfloat16(), *packed[:5], None, 24, 100, values.number, number)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(name, values, special):
    packed = pack(sparse(24, 40, 0.5), values)
    x = torch.randn(3, 40).bfloat16()
    y = dispatch.linear(x, packed, None, name)
    x[1, 7] = special
    with_special = dispatch.linear(x, packed, None, name)
    assert torch.equal(with_special[[0, 2]], y[[0, 2]])
    assert not with_special[1].isfinite().all()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
def test_activations_of_very_different_size_keep_their_precision(name, values):
    """One channel a thousand times larger than the others, as language models have them, and tiny or huge rows."""
    generator = torch.Generator().manual_seed(2)
    packed = pack(sparse(64, 512, 0.3), values)
    for factor in (1.0, 1e-30, 1e30):
        x = torch.randn(1, 512, generator=generator)
        x[0, 3] *= 1000
        x = (x * factor).bfloat16()
        want = x.double() @ exact(packed).T
        ours = (dispatch.linear(x, packed, None, name).double() - want).abs().max()
        torchs = (torch.nn.functional.linear(x, unpack(packed)).double() - want).abs().max()
        assert ours <= 2 * max(torchs, want.abs().max() * 2**-9)


@pytest.mark.parametrize("outliers", [1, 5])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
def test_activations_that_tower_above_the_rest_cost_no_row_its_precision(name, values, outliers):
    """Row by row: those that do not meet the outliers have outputs of the size of all other activations."""
    generator = torch.Generator().manual_seed(4)
    packed = pack(sparse(96, 640, 0.3), values)
    dense, W = unpack(packed), exact(packed)
    for ratio, tokens in itertools.product((10.0, 100.0, 3e3, 4e4, 1e5, 1e8, 1e20), (1, 3, 7)):
        x = torch.randn(tokens, 640, generator=generator)
        towering = torch.randperm(640, generator=generator)[:outliers]
        x[-1, towering] *= ratio
        x = x.bfloat16()
        want = x.double() @ W.T
        ours = (dispatch.linear(x, packed, None, name).double() - want).abs()
        torchs = (torch.nn.functional.linear(x, dense).double() - want).abs()
        without = (W[:, towering] == 0).all(1)
        assert 0 < without.sum() < 96
        for token, rows in itertools.product(range(tokens), (without, ~without)):
            rounding = want[token, rows].abs().max() * 2**-9
            assert ours[token, rows].max() <= 2 * max(torchs[token, rows].max(), rounding), (ratio, tokens, token)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
def test_opcheck(name, values):
    packed = pack(sparse(40, 24, 0.4), values)
    bias = torch.randn(40).bfloat16()
    number = dispatch.COMPILED.index(name)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 24).bfloat16()
        arguments = (x, *packed[:5], bias, 40, 24, values.number, number)
        torch.library.opcheck(torch.ops.losa.sparse_linear.default, arguments)


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels in this installation")
def test_torch_compile_sees_one_operator():
    layer = SparseLinear.from_linear(torch.nn.Linear(24, 40, bias=False, dtype=torch.bfloat16))
    x = torch.randn(3, 24).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("values", VALUES)
def test_the_number_of_threads_changes_nothing(values):
    packed = pack(sparse(700, 600, 0.3), values)
    threads = torch.get_num_threads()
    try:
        for name, tokens in itertools.product(COMPILED, (1, 4, 12, 16)):  # past 16 the portable kernels use torch's own product
            x = torch.randn(tokens, 600).bfloat16()
            torch.set_num_threads(1)
            one = dispatch.linear(x, packed, None, name)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(dispatch.linear(x, packed, None, name), one)
    finally:
        torch.set_num_threads(threads)


def damaged(packed: PackedWeight, **changes) -> PackedWeight:
    return packed._replace(**changes)


def test_check_says_what_disagrees():
    packed = pack(sparse(40, 24, 0.4))
    flipped = packed.mask.clone()
    flipped[0, 0] ^= 1
    moved = packed.offsets.clone()
    moved[1] += 1
    four = pack(sparse(40, 24, 0.4), INT4)
    for broken, message in [
        (damaged(packed, mask=flipped), "offsets do not count"),
        (damaged(packed, offsets=moved), "offsets do not count"),
        (damaged(packed, values=packed.values[:-1]), "masks mark"),
        (damaged(packed, values=packed.values.float()), "values are torch.float32"),
        (damaged(packed, type=INT8), "values are torch.bfloat16"),
        (damaged(packed, mask=packed.mask[:-1]), "mask is torch.uint8 of shape"),
        (damaged(packed, offsets=packed.offsets.int()), "offsets is torch.int32"),
        (damaged(packed, scale=torch.ones(40)), "bfloat16 values come without scale"),
        (damaged(pack(sparse(40, 24, 0.4), INT8), scale=torch.ones(39)), "scale is torch.float32"),
        (damaged(pack(sparse(40, 24, 0.4), INT8), scale=None), "int8 values come with scale"),
        (damaged(four, groups=None), "int4 values come with groups"),
        (damaged(four, groups=four.groups[:, :, :-1]), "groups is torch.uint8 of shape"),
        (damaged(four, values=four.values[:-1]), "masks mark"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(broken, "layer")


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", COMPILED)
def test_operator_survives_any_bytes(name, values):
    """Random masks and offsets: an error or wrong numbers, never a crash. (Under a sanitizer: test_csrc.py.)"""
    generator = np.random.default_rng(0)
    packed = pack(sparse(50, 70, 0.3), values)
    count = packed.stored
    x = {tokens: torch.randn(tokens, 70).bfloat16() for tokens in (1, 4, 20)}
    for _ in range(100):
        mask = torch.from_numpy(generator.integers(0, 256, packed.mask.shape, dtype=np.uint8))
        offsets = torch.from_numpy(generator.integers(-1, count + 2, packed.offsets.shape))
        for tokens in x:
            with pytest.raises(RuntimeError, match="losa::sparse_linear"):
                dispatch.linear(x[tokens], damaged(packed, mask=mask, offsets=offsets), None, name)


@pytest.mark.parametrize("name", COMPILED)
def test_operator_refuses_shapes_and_types_that_disagree(name):
    packed = pack(sparse(50, 70, 0.3))
    x = torch.randn(2, 70).bfloat16()
    for broken, message in [
        (damaged(packed, mask=packed.mask[:, :-1].contiguous()), "mask bytes"),
        (damaged(packed, offsets=packed.offsets[:-1]), "offsets"),
        (damaged(packed, values=packed.values.float()), "another dtype than their type has"),
        (damaged(packed, scale=torch.ones(50)), "without a scale per row"),
        (damaged(packed, groups=torch.ones(4, 2, 16, dtype=torch.uint8)), "without scales of groups"),
        (damaged(pack(sparse(50, 70, 0.3), INT4), groups=torch.ones(4, 1, 16, dtype=torch.uint8)), "128 scales of groups"),
        (damaged(packed, rows=-1), "negative"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            dispatch.linear(x, broken, None, name)
    with pytest.raises(RuntimeError, match="bfloat16"):
        dispatch.linear(x.float(), packed, None, name)
    with pytest.raises(RuntimeError, match="biases"):
        dispatch.linear(x, packed, torch.ones(50), name)


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels in this installation")
def test_a_kernel_that_this_cpu_lacks_is_refused():
    packed = pack(sparse(16, 16, 0.5))
    x = torch.randn(1, 16).bfloat16()
    lacking = [number for number, name in enumerate(dispatch.COMPILED) if name not in RUNNABLE]
    for number in [*lacking, -1, 99]:
        with pytest.raises(RuntimeError, match="does not run kernel"):
            torch.ops.losa.sparse_linear(x, *packed[:5], None, 16, 16, 0, number)


def test_the_environment_forces_a_kernel(monkeypatch):
    for name in RUNNABLE:
        monkeypatch.setenv("LOSA_KERNELS", name)
        assert dispatch.choose() == name
    monkeypatch.setenv("LOSA_KERNELS", "sse9")
    with pytest.raises(ValueError, match="LOSA_KERNELS is 'sse9'; this machine and installation run reference"):
        dispatch.choose()
    monkeypatch.delenv("LOSA_KERNELS")
    assert dispatch.choose() == RUNNABLE[-1]


def test_without_compiled_kernels_the_reference_runs_and_says_so_once(monkeypatch, tmp_path, caplog):
    uncached = dispatch.available.__wrapped__
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "runtime" / "dispatch.py"))
    assert uncached() == (dispatch.REFERENCE,)
    (tmp_path / "_kernels.abi3.so").write_text("no library")
    assert uncached() == (dispatch.REFERENCE,)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "were not built" in caplog.records[0].getMessage()
    assert "do not load" in caplog.records[1].getMessage()


def test_this_test_machine_has_the_compiled_kernels():
    """CI must not pass because nothing was built."""
    if os.uname().machine == "x86_64" and os.uname().sysname == "Linux":
        assert "portable" in RUNNABLE


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
