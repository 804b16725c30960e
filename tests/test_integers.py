"""Rounding to integers: little more error than the best scales of all leave. Codes of any number of bits."""

import pytest
import torch
from packing import exact, sparse
from references import codes_by_hand

from losa.runtime.format import pack, unpack
from losa.runtime.integers import to_codes, to_numbers
from losa.runtime.values import INT4


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


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_the_numbers_again(bits):
    half = 2 ** (bits - 1)
    q = torch.tensor([number for number in range(-half, half + 1) if number] * 5 + [half], dtype=torch.int8)
    codes = to_codes(q, bits)
    assert codes.numel() == -(-q.numel() * bits // 8)
    assert codes_by_hand(codes.tolist(), bits, q.numel()) == q.tolist()
    assert torch.equal(to_numbers(codes, bits, q.numel()), q)
