"""The packed weight: the format against a reference that walks it bit by bit."""

import itertools

import pytest
import torch
from packing import DENSITIES, SHAPES, damaged, exact, sparse
from references import codes_by_hand, packed_by_hand

from losa.runtime.format import PackedWeight, check, pack, unpack
from losa.runtime.values import BFLOAT16, INT4, INT8, TYPES

VALUES = list(TYPES.values())


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
