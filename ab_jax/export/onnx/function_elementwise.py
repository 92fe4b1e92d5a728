"""Operations on each entry, written into an ONNX file of a function.

Numbers that ONNX Runtime has few kernels for are computed in wider ones and cast back: float16 and
bfloat16 in float32, integers below 32 bits in int32, uint32 in int64. Integers wrap as in JAX.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ab_jax.export.onnx.function_file import (
    FunctionFile,
    computed_in,
    onnx_type,
    orderable,
)
from ab_jax.export.traced import Constant, Operation
from ab_jax.export.traced.carrying import NotCarriedError

Write = Callable[[FunctionFile, Operation], Any]

_UNARY = {
    **{n: n.capitalize() for n in ("abs", "neg", "sign", "floor", "ceil", "exp", "log", "sqrt")},
    **{n: n.capitalize() for n in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh")},
    **{n: n.capitalize() for n in ("tanh", "asinh", "acosh", "atanh", "erf")},
    "logistic": "Sigmoid",
}
_BINARY = {
    **{n: n.capitalize() for n in ("add", "sub", "mul")},
    "add_any": "Add",
}
_COMPARED = {
    **{"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    "eq": "Equal",
}
_BITWISE = {
    "and": ("And", "BitwiseAnd"),
    "or": ("Or", "BitwiseOr"),
    "xor": ("Xor", "BitwiseXor"),
    "not": ("Not", "BitwiseNot"),
}
# Powers up to this are products, as in JAX.
_LARGEST_PRODUCT = 32


def computed(write: Callable[..., str]) -> Write:
    """An operation written in the numbers that its inputs are computed in.

    `write(file, operation, kind, *names)` is given these numbers, NumPy's scalar type, and gives
    its result in them.
    """

    @functools.wraps(write)
    def written(file: FunctionFile, operation: Operation) -> str:
        kind = computed_in(operation.inputs[0].dtype)
        names = [file.cast(file.name(x), x.dtype, computed_in(x.dtype)) for x in operation.inputs]
        result = write(file, operation, kind.type, *names)
        return file.cast(result, kind, operation.outputs[0].dtype)

    return written


def _plain(operator: str) -> Write:
    return computed(lambda file, operation, kind, *names: file.op(operator, *names))


def _bounded(operator: str) -> Write:
    """Max or Min; with a number as the operators that ONNX Runtime makes a part of a layer."""
    plain = _plain(operator)

    def write(file: FunctionFile, operation: Operation) -> str:
        x, bound = operation.inputs
        if isinstance(x, Constant):
            x, bound = bound, x
        number = np.asarray(bound.array) if isinstance(bound, Constant) else np.zeros(2)
        same = x.dtype == np.float32 and x.shape == operation.outputs[0].shape
        if not same or number.size != 1:
            return plain(file, operation)
        number = number.reshape(())
        if operator == "Min":
            return file.op("Clip", file.name(x), "", number)
        return file.op("Clip", file.name(x), number) if number else file.op("Relu", file.name(x))

    return write


def _compared(operator: str, *, negated: bool = False) -> Write:
    def write(file: FunctionFile, operation: Operation) -> str:
        names = []
        for x in operation.inputs:
            names.append(file.cast(file.name(x), x.dtype, orderable(x.dtype)))
        result = file.op(operator, *names)
        return file.op("Not", result) if negated else result

    return write


def _less_in_total_order(file: FunctionFile, a: str, b: str, kind: Any) -> str:
    """Whether one number lies below another, where -0 lies below 0 and NaN above all others."""
    nan = file.op("And", file.op("IsNaN", b), file.op("Not", file.op("IsNaN", a)))
    zeros = file.op("And", file.op("Equal", a, kind(0)), file.op("Equal", b, kind(0)))
    signs = file.op("Less", *(file.op("Div", kind(1), x) for x in (a, b)))
    by_sign = file.op("And", zeros, signs)
    return file.op("Or", file.op("Or", file.op("Less", a, b), nan), by_sign)


def _totally_ordered(file: FunctionFile, operation: Operation) -> str:
    (x, y), name = operation.inputs, operation.primitive
    kind = computed_in(x.dtype)
    a, b = (file.cast(file.name(v), v.dtype, kind) for v in (x, y))
    if kind.kind != "f":
        return file.op(_COMPARED[name.removesuffix("_to")], a, b)
    if name == "lt_to":
        return _less_in_total_order(file, a, b, kind.type)
    not_above = file.op("Not", _less_in_total_order(file, b, a, kind.type))
    if name == "le_to":
        return not_above
    return file.op("And", not_above, file.op("Not", _less_in_total_order(file, a, b, kind.type)))


def _bitwise(of_bools: str, of_integers: str) -> Write:
    def write(file: FunctionFile, operation: Operation) -> str:
        operator = of_bools if operation.inputs[0].dtype == bool else of_integers
        return file.op(operator, *map(file.name, operation.inputs))

    return write


@computed
def _integer_pow(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    power = int(operation.params["y"])
    if abs(power) > _LARGEST_PRODUCT:
        return file.op("Pow", x, kind(power))
    if power == 0:
        return file.op("Add", file.op("Mul", x, kind(0)), kind(1))
    result, square, left = "", x, abs(power)
    while True:
        if left & 1:
            result = file.op("Mul", result, square) if result else square
        left >>= 1
        if not left:
            break
        square = file.op("Mul", square, square)
    return result if power > 0 else file.op("Div", kind(1), result)


def _divided(file: FunctionFile, operation: Operation) -> str:
    """Quotients and remainders; those of integers in int64, where a division by 0 ends no process.

    By 0 the quotient is -1 and the remainder the dividend, as XLA has it.
    """
    x, y = operation.inputs
    kind = computed_in(x.dtype)
    if kind.kind in "iu":
        kind = np.dtype(np.int64)
    a, b = (file.cast(file.name(v), v.dtype, kind) for v in (x, y))
    quotient = operation.primitive == "div"
    is_known = isinstance(y, Constant) and bool(np.all(y.array))
    if kind.kind == "f" or is_known:
        found = file.op("Div", a, b) if quotient else file.op("Mod", a, b, fmod=1)
        return file.cast(found, kind, operation.outputs[0].dtype)
    zero = file.op("Equal", b, np.int64(0))
    b = file.op("Where", zero, np.int64(1), b)
    found = file.op("Div", a, b) if quotient else file.op("Mod", a, b, fmod=1)
    found = file.op("Where", zero, np.int64(-1) if quotient else a, found)
    return file.cast(found, kind, operation.outputs[0].dtype)


@computed
def _square(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    return file.op("Mul", x, x)


@computed
def _rsqrt(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    return file.op("Div", kind(1), file.op("Sqrt", x))


@computed
def _cbrt(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    root = file.op("Pow", file.op("Abs", x), kind(1 / 3))
    return file.op("Mul", file.op("Sign", x), root)


@computed
def _exp2(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    return file.op("Pow", kind(2), x)


@computed
def _erfc(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    return file.op("Sub", kind(1), file.op("Erf", x))


@computed
def _log1p(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    """With what 1 + x has lost (Kahan)."""
    sum_ = file.op("Add", x, kind(1))
    lost = file.op("Div", x, file.op("Sub", sum_, kind(1)))
    exact = file.op("Mul", file.op("Log", sum_), lost)
    infinite = file.op("IsInf", sum_, detect_negative=0)
    plain = file.op("Or", file.op("Equal", sum_, kind(1)), infinite)
    return file.op("Where", plain, x, exact)


@computed
def _expm1(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    """Near 0 by the hyperbolic tangent: 2 t / (1 - t) with t = tanh(x / 2)."""
    half = file.op("Tanh", file.op("Mul", x, kind(0.5)))
    near = file.op("Div", file.op("Add", half, half), file.op("Sub", kind(1), half))
    far = file.op("Sub", file.op("Exp", x), kind(1))
    return file.op("Where", file.op("Less", file.op("Abs", x), kind(0.5)), near, far)


@computed
def _round(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    if int(operation.params["rounding_method"]) == 1:  # half to even
        return file.op("Round", x)
    up = file.op("Floor", file.op("Add", file.op("Abs", x), kind(0.5)))
    return file.op("Mul", file.op("Sign", x), up)


@computed
def _atan2(file: FunctionFile, operation: Operation, kind: Any, y: str, x: str) -> str:
    below = file.op("Less", y, kind(0))
    half_turn = file.op("Where", below, kind(-math.pi), kind(math.pi))
    quarter = file.op("Mul", file.op("Sign", y), kind(math.pi / 2))
    zero = file.op("Equal", x, kind(0))
    angle = file.op("Atan", file.op("Div", y, file.op("Where", zero, kind(1), x)))
    turned = file.op("Add", angle, half_turn)
    sided = file.op("Where", file.op("Less", x, kind(0)), turned, angle)
    return file.op("Where", zero, quarter, sided)


@computed
def _clamp(file: FunctionFile, operation: Operation, kind: Any, *names: str) -> str:
    low, x, high = names
    return file.op("Min", file.op("Max", x, low), high)


def _pow(file: FunctionFile, operation: Operation) -> str:
    x, y = operation.inputs
    kind = computed_in(x.dtype)
    names = [file.cast(file.name(v), v.dtype, computed_in(v.dtype)) for v in (x, y)]
    return file.cast(file.op("Pow", *names), kind, operation.outputs[0].dtype)


def _is_finite(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    name = file.cast(file.name(x), x.dtype, computed_in(x.dtype))
    return file.op("Not", file.op("Or", file.op("IsNaN", name), file.op("IsInf", name)))


def _select(file: FunctionFile, operation: Operation) -> str:
    which, *cases = operation.inputs
    dtype = operation.outputs[0].dtype
    kind = orderable(dtype)
    names = [file.cast(file.name(case), dtype, kind) for case in cases]
    if len(cases) == 1:
        return file.name(cases[0])
    if which.dtype == bool:
        result = file.op("Where", file.name(which), names[1], names[0])
    else:
        result, chosen = names[0], file.name(which)
        for i, name in enumerate(names[1:], 1):
            is_it = file.op("Equal", chosen, np.asarray(i, which.dtype))
            result = file.op("Where", is_it, name, result)
    return file.cast(result, kind, dtype)


def _shifted(file: FunctionFile, operation: Operation) -> str:
    """Shifts in the unsigned numbers of as many bits; by all of them or more they leave nothing."""
    x, by = operation.inputs
    dtype = np.dtype(x.dtype)
    bits = dtype.itemsize * 8
    if bits > 32:
        raise NotCarriedError(f"of {dtype}")
    left = operation.primitive == "shift_left"
    wide = np.dtype(np.uint64)
    places = file.cast(file.name(by), by.dtype, np.dtype(f"uint{bits}"))
    places = file.cast(places, np.dtype(f"uint{bits}"), wide)
    places = file.op("Min", places, np.uint64(bits))
    plain = file.cast(file.name(x), dtype, np.dtype(f"uint{bits}"))
    plain = file.cast(plain, np.dtype(f"uint{bits}"), wide)
    moved = file.op("BitShift", plain, places, direction="LEFT" if left else "RIGHT")
    narrow = file.cast(moved, wide, np.dtype(f"uint{bits}"))
    return file.cast(narrow, np.dtype(f"uint{bits}"), dtype)


def _shifted_with_sign(file: FunctionFile, operation: Operation) -> str:
    """Rounded down after a division by a power of 2, in float64, which holds 32 bits.

    The highest bit is the sign, of unsigned numbers too.
    """
    x, by = operation.inputs
    bits = np.dtype(x.dtype).itemsize * 8
    if bits > 32:
        raise NotCarriedError(f"of {x.dtype}")
    double = np.dtype(np.float64)
    places = file.op("Min", file.cast(file.name(by), by.dtype, double), np.float64(63))
    # A count below 0 is a large one without its sign.
    places = file.op("Where", file.op("Less", places, np.float64(0)), np.float64(63), places)
    power = file.op("Pow", np.float64(2), places)
    signed = np.dtype(f"int{bits}")
    value = file.cast(file.cast(file.name(x), x.dtype, signed), signed, double)
    moved = file.op("Floor", file.op("Div", value, power))
    return file.cast(file.cast(moved, double, signed), signed, x.dtype)


def _converted(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    after = np.dtype(operation.params["new_dtype"])
    name, before = file.name(x), np.dtype(x.dtype)
    if before == after:
        return name
    # From narrow floats to integers by way of float32, for which there are kernels.
    kind = computed_in(before)
    if kind != before and np.issubdtype(kind, np.floating) and after != kind:
        name = file.cast(name, before, kind)
    return file.op("Cast", name, to=onnx_type(after))


@computed
def _reduced_precision(file: FunctionFile, operation: Operation, kind: Any, x: str) -> str:
    """By way of the narrower numbers, but where these are subnormal: there JAX gives zeros."""
    kinds = {(8, 23): "float32", (8, 7): "bfloat16", (5, 10): "float16", (11, 52): "float64"}
    bits = operation.params["exponent_bits"], operation.params["mantissa_bits"]
    if bits not in kinds:
        raise NotCarriedError(f"to {bits[0]} bits of exponent and {bits[1]} of mantissa")
    narrow, wide = np.dtype(kinds[bits]), np.dtype(kind)
    rounded = file.cast(file.cast(x, wide, narrow), narrow, wide)
    if narrow != np.float16 or operation.inputs[0].dtype == narrow:
        return rounded
    least = kind(2.0**-14 - 2.0**-26)  # is rounded to the smallest normal number
    is_less = file.op("Less", file.op("Abs", x), least)
    return file.op("Where", is_less, file.op("Mul", x, kind(0)), rounded)


ELEMENTWISE: dict[str, Write] = {
    **{name: _plain(operator) for name, operator in (_UNARY | _BINARY).items()},
    **{name: _compared(operator) for name, operator in _COMPARED.items()},
    **{name: _bitwise(*operators) for name, operators in _BITWISE.items()},
    "ne": _compared("Equal", negated=True),
    **dict.fromkeys(("lt_to", "le_to", "eq_to"), _totally_ordered),
    **{name: _bounded(name.capitalize()) for name in ("max", "min")},
    "integer_pow": _integer_pow,
    **dict.fromkeys(("div", "rem"), _divided),
    "square": _square,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "exp2": _exp2,
    "erfc": _erfc,
    "log1p": _log1p,
    "expm1": _expm1,
    "round": _round,
    "atan2": _atan2,
    "clamp": _clamp,
    "pow": _pow,
    "is_finite": _is_finite,
    "select_n": _select,
    "shift_left": _shifted,
    "shift_right_logical": _shifted,
    "shift_right_arithmetic": _shifted_with_sign,
    "convert_element_type": _converted,
    "reduce_precision": _reduced_precision,
}
