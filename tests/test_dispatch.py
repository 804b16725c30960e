"""Every kernel against float64, on weights good and corrupt, and which of them is taken."""

import itertools
import os

import numpy as np
import pytest
import torch
from packing import DENSITIES, SHAPES, damaged, exact, sparse

from losa.runtime import dispatch
from losa.runtime.format import pack, unpack
from losa.runtime.linear import SparseLinear
from losa.runtime.values import INT4, TYPES

TOKENS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 65, 130]
VALUES = list(TYPES.values())
RUNNABLE = dispatch.available()
COMPILED = [name for name in RUNNABLE if name != dispatch.REFERENCE]
ROUNDING = {dispatch.ROUNDING[name]: name for name in COMPILED if name in dispatch.ROUNDING}


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


def in_bytes(x_TI):
    """Activations rounded to 8 bits with a scale for 64 columns, in float32 as the kernels do it."""
    columns = x_TI.shape[1]
    blocks = torch.nn.functional.pad(x_TI.float(), (0, -columns % 64)).view(len(x_TI), -1, 64)
    most = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    return ((blocks * (127 / most)).round().double() * (most / 127).double()).flatten(1)[:, :columns]


@pytest.mark.parametrize("values", [kind for kind in VALUES if kind.rounds])
@pytest.mark.parametrize("name", ROUNDING)
def test_activations_may_be_rounded_to_bytes(name, values):
    """Of few tokens; they lose what that rounding loses, and no more than any kernel may besides."""
    generator = torch.Generator().manual_seed(5)
    for shape, density, tokens in itertools.product([(64, 576), (100, 130), (33, 1000)], DENSITIES, (1, 2, 3)):
        packed = pack(sparse(*shape, density), values)
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        W, rounded = exact(packed), in_bytes(x)
        want = rounded @ W.T
        ours = (dispatch.linear(x, packed, None, name).double() - want).abs().max()
        torchs = (torch.nn.functional.linear(rounded.bfloat16(), unpack(packed)).double() - want).abs().max()
        assert ours <= 2 * max(torchs, want.abs().max() * 2**-9), (shape, density, tokens)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", ROUNDING)
def test_activations_that_rounding_would_spoil_are_not_rounded(name, values):
    """Those of many tokens, those that tower above the rest, those that are no numbers, those of values that are not rounded."""
    packed = pack(sparse(40, 640, 0.3), values)
    x = torch.randn(4, 640).bfloat16()
    cases = [x] if values.rounds else [x, x[:1]]
    for large in (1e4, float("inf"), float("nan")):
        one = x[:1].clone()
        one[0, 7] = large
        cases.append(one)
    for case in cases:
        want = dispatch.linear(case, packed, None, ROUNDING[name])
        assert torch.equal(dispatch.linear(case, packed, None, name).nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", [*COMPILED, *ROUNDING])
def test_opcheck(name, values):
    packed = pack(sparse(40, 24, 0.4), values)
    bias = torch.randn(40).bfloat16()
    number = dispatch.COMPILED.index(name)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 24).bfloat16()
        arguments = (x, *packed[:5], bias, 40, 24, values.number, number)
        torch.library.opcheck(torch.ops.losa.sparse_linear.default, arguments)


@pytest.mark.parametrize("values", VALUES)
def test_the_number_of_threads_changes_nothing(values):
    packed = pack(sparse(700, 600, 0.3), values)
    threads = torch.get_num_threads()
    try:
        # Past 16 tokens the portable kernels use torch's own product.
        for name, tokens in itertools.product([*COMPILED, *ROUNDING], (1, 4, 12, 16)):
            x = torch.randn(tokens, 600).bfloat16()
            torch.set_num_threads(1)
            one = dispatch.linear(x, packed, None, name)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(dispatch.linear(x, packed, None, name), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", [*COMPILED, *ROUNDING])
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
    lacking = [number for number, name in enumerate(dispatch.COMPILED) if name not in (*RUNNABLE, *ROUNDING)]
    for number in [*lacking, -1, 99]:
        with pytest.raises(RuntimeError, match="does not run kernel"):
            torch.ops.losa.sparse_linear(x, *packed[:5], None, 16, 16, 0, number)


def test_the_environment_forces_a_kernel(monkeypatch):
    for name in RUNNABLE:
        monkeypatch.setenv("LOSA_KERNELS", name)
        assert dispatch.choose() == name
        assert dispatch.choose(activations="int8") == dispatch.ROUNDING.get(name, name)
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
