"""Packed codes: bytes as written out by hand and by arithmetic on integers, and what is refused."""

import numpy as np
import pytest

from ab_jax.export.packed.bits import Packing

ALL = [Packing(1), *(Packing(bits, affine) for bits in range(2, 9) for affine in (False, True))]


def codes_of(packing: Packing, rng: np.random.Generator, count: int) -> np.ndarray:
    lowest, highest = packing.levels
    codes = rng.integers(lowest, highest + 1, count).astype(np.int8)
    return np.where(codes == 0, 1, codes).astype(np.int8) if packing.bits == 1 else codes


def by_arithmetic(packing: Packing, codes: np.ndarray) -> bytes:
    """The same bytes, from one large integer."""
    if packing.bits == 2 and not packing.affine:
        groups = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum((int(code) + 1) * 3**i for i, code in enumerate(g)) for g in groups)
    if packing.bits == 1:
        digits = [(int(code) + 1) // 2 for code in codes]
    else:
        digits = [int(code) + 2 ** (packing.bits - 1) for code in codes]
    number = sum(digit << (packing.bits * i) for i, digit in enumerate(digits))
    return number.to_bytes((packing.bits * len(codes) + 7) // 8, "little")


def test_bytes_written_out_by_hand() -> None:
    def packed(bits: int, codes: list[int], affine: bool = False) -> list[int]:
        return Packing(bits, affine).pack(np.array(codes, np.int8)).tolist()

    assert packed(1, [1, -1, -1, 1, 1, 1, 1, -1, 1]) == [0b01111001, 0b1]
    assert packed(2, [-1, 0, 1, 1, 0, 1]) == [0 + 3 + 2 * 9 + 2 * 27 + 81, 2]
    assert packed(2, [-2, -1, 0, 1], affine=True) == [0b11_10_01_00]
    assert packed(3, [-3, 3, 0]) == [0b00_111_001, 0b1]
    assert packed(4, [-7, 7]) == [0xF1]
    assert packed(8, [-127, 127]) == [1, 255]


@pytest.mark.parametrize("packing", ALL, ids=str)
def test_packing_is_arithmetic_and_unpacking_its_inverse(
    packing: Packing, rng: np.random.Generator
) -> None:
    for count in (0, 1, 2, 5, 7, 8, 9, 40, 41, int(rng.integers(42, 500))):
        codes = codes_of(packing, rng, count)
        packed = packing.pack(codes)
        assert packed.dtype == np.uint8
        assert packed.tobytes() == by_arithmetic(packing, codes)
        assert packing.size(count) == packed.size
        unpacked = packing.unpack(packed, count)
        assert unpacked.dtype == np.int8
        np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("packing", ALL, ids=str)
def test_bytes_are_unpacked_to_codes_that_pack_to_them_or_refused(
    packing: Packing, rng: np.random.Generator
) -> None:
    """Every byte pattern: no two stand for the same codes."""
    refused = 0
    for count in (3, 5, 8):
        for _ in range(200):
            packed = rng.integers(0, 256, packing.size(count)).astype(np.uint8)
            try:
                codes = packing.unpack(packed, count)
            except ValueError:
                refused += 1
                continue
            np.testing.assert_array_equal(packing.pack(codes), packed)
            assert packing.levels[0] <= codes.min() <= codes.max() <= packing.levels[1]
    # Only of the 256 affine codes of 8 bits does every byte hold one, with nothing left over.
    assert (refused == 0) == (packing == Packing(8, affine=True))


def test_the_kind_follows_from_width_and_zero_points() -> None:
    kinds = [(p.bits, p.affine, p.kind, p.levels) for p in ALL[:5]]
    assert kinds == [
        (1, False, "binary", (-1, 1)),
        (2, False, "ternary", (-1, 1)),
        (2, True, "uniform", (-2, 1)),
        (3, False, "uniform", (-3, 3)),
        (3, True, "uniform", (-4, 3)),
    ]


@pytest.mark.parametrize(
    ("packing", "code", "message"),
    [
        (Packing(1), 0, "binary codes of 1 bits are -1 and [+]1, not 0"),
        (Packing(2), -2, "ternary codes of 2 bits are -1 to 1, not -2"),
        (Packing(2, affine=True), 2, "uniform codes of 2 bits are -2 to 1, not 2"),
        (Packing(4), -8, "-7 to 7, not -8"),
        (Packing(8), -128, "-127 to 127, not -128"),
    ],
)
def test_codes_out_of_range_are_refused(packing: Packing, code: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packing.pack(np.array([1, code], np.int8))


@pytest.mark.parametrize(
    ("packing", "packed", "count", "message"),
    [
        (Packing(1), [1, 0], 8, r"8 binary codes of 1 bits take 1 bytes .* not uint8 of shape"),
        (Packing(1), [0b100], 2, "what is left of the last byte is not zero"),
        (Packing(2), [243], 5, "a byte of ternary codes is 243, above 242"),
        (Packing(2), [1 + 3 + 9], 2, "what is left"),
        (Packing(3), [0], 1, "-3 to 3, not -4"),
        (Packing(7), [1, 0x80], 2, "what is left"),
    ],
)
def test_bytes_that_are_no_codes_are_refused(
    packing: Packing, packed: list[int], count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        packing.unpack(np.array(packed, np.uint8), count)


@pytest.mark.parametrize(("bits", "affine"), [(0, False), (9, False), (True, False), (1, True)])
def test_widths_that_there_are_not(bits: int, affine: bool) -> None:
    with pytest.raises(ValueError, match=r"1 to 8 bits|no zero points"):
        Packing(bits, affine)
