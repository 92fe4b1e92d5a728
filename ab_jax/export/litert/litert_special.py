"""Functions that LiteRT has no operators for, put together of others in a LiteRT file."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ab_jax.export.litert.litert_elementwise import Write, each, entries
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.traced import Operation
from ab_jax.export.traced.carrying import NotCarriedError

# XLA's erf of float32: x times one polynomial of x**2 by another, the highest powers first.
_ERF_END = 3.832506856900711
_ERF_ABOVE = (
    *(0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861),
    *(0.18520832239976145, 1.128379143519084),
)
_ERF_BELOW = (
    *(-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885),
    *(0.014070470171167667, 0.11098505178285362, 0.49746925110067538, 1.0),
)
_LOG_SERIES = (2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)


def _polynomial(file: LitertFile, x: Tensor, factors: Sequence[float]) -> Tensor:
    """By Horner's rule; the factor of the highest power first."""
    total = each(file, "MUL", x, np.float32(factors[0]))
    for factor in factors[1:-1]:
        total = each(file, "MUL", each(file, "ADD", total, np.float32(factor)), x)
    return each(file, "ADD", total, np.float32(factors[-1]))


def _erf_of(file: LitertFile, x: Tensor) -> Tensor:
    if x.dtype != np.float32:
        raise NotCarriedError(f"of {x.dtype}")
    x = each(file, "MAXIMUM", x, np.float32(-_ERF_END))
    x = each(file, "MINIMUM", x, np.float32(_ERF_END))
    square = each(file, "MUL", x, x)
    above, below = (_polynomial(file, square, of) for of in (_ERF_ABOVE, _ERF_BELOW))
    return each(file, "DIV", each(file, "MUL", x, above), below)


@entries
def _erf(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return _erf_of(file, x)


@entries
def _erfc(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return each(file, "SUB", kind(1), _erf_of(file, x))


@entries
def _log1p(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    """Near 0 by the series 2 (s + s**3 / 3 + ...) with s = x / (2 + x)."""
    ratio = each(file, "DIV", x, each(file, "ADD", x, kind(2)))
    series = _polynomial(file, each(file, "MUL", ratio, ratio), _LOG_SERIES)
    near = each(file, "MUL", ratio, series)
    far = each(file, "LOG", each(file, "ADD", x, kind(1)))
    small = each(file, "LESS", each(file, "ABS", x), kind(0.3), dtype=np.bool_)
    return each(file, "SELECT_V2", small, near, far, dtype=x.dtype)


@entries
def _expm1(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    """Near 0 by the hyperbolic tangent: 2 t / (1 - t) with t = tanh(x / 2)."""
    half = each(file, "TANH", each(file, "MUL", x, kind(0.5)))
    near = each(file, "DIV", each(file, "ADD", half, half), each(file, "SUB", kind(1), half))
    far = each(file, "SUB", each(file, "EXP", x), kind(1))
    small = each(file, "LESS", each(file, "ABS", x), kind(0.5), dtype=np.bool_)
    return each(file, "SELECT_V2", small, near, far, dtype=x.dtype)


SPECIAL: dict[str, Write] = {
    "erf": _erf,
    "erfc": _erfc,
    "log1p": _log1p,
    "expm1": _expm1,
}
