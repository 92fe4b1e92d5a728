"""Codes packed to their true width, and back: which bits of which byte hold which code.

    binary   8 codes to a byte: bit i (1 << i) is set where code i is +1, clear where it is -1
    ternary  5 codes to a byte: the digits code + 1 of a number in base 3, the first the lowest
    uniform  a stream without gaps: each code less -2**(bits-1), the lowest bit first

A stream begins at the lowest bit of the first byte, so that codes of 2, 4 and 8 bits share bytes
evenly, and those of 3, 5, 6 and 7 cross from one byte into the next. What is left of the last byte
is zero: the same codes always give the same bytes.
"""

import dataclasses
from typing import Literal

import numpy as np

from ab_jax.quantized import TERNARY_DIGITS, packed_size

Kind = Literal["binary", "ternary", "uniform"]

_POWERS = (3 ** np.arange(TERNARY_DIGITS)).astype(np.uint8)
_CODES_OF_BYTE = (np.arange(3**TERNARY_DIGITS)[:, None] // _POWERS % 3 - 1).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the codes of one weight are packed.

    Attributes:
      bits: width of a code as `Quantized` has it, 1 to 8.
      affine: whether there are zero points, and with them the lowest code of the width.

    Raises:
      ValueError: a width that there is not, or zero points for codes of 1 bit.
    """

    bits: int
    affine: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise ValueError(f"codes have 1 to 8 bits, not {self.bits!r}")
        if self.bits == 1 and self.affine:
            raise ValueError("codes of 1 bit, -1 and +1, have no zero points")

    @property
    def kind(self) -> Kind:
        """What the codes are, by their width and by whether there are zero points.

        That says it all: by the conventions of `ab_jax.quantizers`, 1 bit is -1 and +1, and 2 bits
        without zero points are -1, 0 and +1, of `Ternary` and of the symmetric `Uniform(bits=2)`
        alike, which have the same three levels and so the same bytes.
        """
        if self.bits == 1:
            return "binary"
        return "ternary" if self.bits == 2 and not self.affine else "uniform"

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.bits == 1:
            return -1, 1
        half = 2 ** (self.bits - 1)
        return (-half if self.affine else 1 - half), half - 1

    def size(self, count: int) -> int:
        """Bytes of so many codes."""
        return packed_size(count, self.bits, affine=self.affine)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes (int8, any shape) in C order as uint8 of shape [size].

        Raises:
          ValueError: a code that these bits do not have.
        """
        codes = codes.reshape(-1)
        self._check(codes)
        if self.kind == "ternary":
            digits = np.zeros((self.size(codes.size), TERNARY_DIGITS), np.uint8)
            digits.reshape(-1)[: codes.size] = codes + 1
            return digits @ _POWERS
        if self.kind == "binary":
            return np.packbits(codes > 0, bitorder="little")
        offsets = (codes.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)
        bits = np.unpackbits(offsets[:, None], axis=1, count=self.bits, bitorder="little")
        return np.packbits(bits, bitorder="little")

    def unpack(self, packed: np.ndarray, count: int) -> np.ndarray:
        """The first so many codes, int8 of shape [count], of what `pack` returned.

        Raises:
          ValueError: bytes that `pack` does not return for any so many codes.
        """
        if packed.dtype != np.uint8 or packed.shape != (self.size(count),):
            raise ValueError(
                f"{count} {self.kind} codes of {self.bits} bits take {self.size(count)} bytes "
                f"(uint8), not {packed.dtype} of shape {packed.shape}"
            )
        if self.kind == "ternary":
            if packed.max(initial=0) >= len(_CODES_OF_BYTE):
                raise ValueError(f"a byte of ternary codes is {packed.max()}, above 242")
            codes = _CODES_OF_BYTE[packed].reshape(-1)
            rest = codes[count:] != -1
        else:
            bits = np.unpackbits(packed, bitorder="little")
            rest, bits = bits[count * self.bits :], bits[: count * self.bits]
            if self.kind == "binary":
                codes = 2 * bits.view(np.int8) - 1
            else:
                rows = bits.reshape(count, self.bits)
                offsets = np.packbits(rows, axis=1, bitorder="little")[:, 0]
                codes = (offsets.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8)
        if rest.any():
            raise ValueError("what is left of the last byte is not zero")
        codes = codes[:count]
        self._check(codes)
        return codes

    def _check(self, codes: np.ndarray) -> None:
        lowest, highest = self.levels
        wrong = (codes < lowest) | (codes > highest)
        if self.kind == "binary":
            wrong |= codes == 0
        if wrong.any():
            between = "-1 and +1" if self.kind == "binary" else f"{lowest} to {highest}"
            raise ValueError(
                f"{self.kind} codes of {self.bits} bits are {between}, not {codes[wrong][0]}"
            )
