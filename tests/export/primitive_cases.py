"""Functions of one primitive of JAX each, in the forms that networks have them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class PrimitiveCase:
    """A function of inputs with these shapes and dtypes; 0 in a shape stands for the batch."""

    primitive: str
    variant: str
    f: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    relative: float = 2e-6
    is_further: bool = False  # another kind of numbers of what a case has already

    @property
    def name(self) -> str:
        return f"{self.primitive}, {self.variant}" if self.variant else self.primitive

    def drawn(self, rng: np.random.Generator, batch: int) -> list[np.ndarray]:
        return [draw(rng, tuple(n or batch for n in shape), kind) for shape, kind in self.inputs]


def draw(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Any:
    """Numbers: `float32`, `int32`, ...; `unit` in [0, 1); `positive`; `index`: 0 to 3."""
    match kind:
        case "unit":
            return rng.random(shape, np.float32)
        case "positive":
            return (rng.random(shape, np.float32) * 4 + 0.1).astype(np.float32)
        case "bool":
            return rng.random(shape) < 0.5
        case "index":
            return rng.integers(0, 4, shape).astype(np.int32)
        case "wild":  # places in and out of range
            return rng.integers(-7, 8, shape).astype(np.int32)
    dtype = jnp.dtype(kind)
    if jnp.issubdtype(dtype, jnp.floating):
        return rng.normal(size=shape).astype(dtype)
    ends = jnp.iinfo(dtype)
    return rng.integers(ends.min, ends.max, shape, dtype=dtype, endpoint=True)


CASES: list[PrimitiveCase] = []
X = ((0, 5), "float32")
IMAGE = ((0, 6, 5, 4), "float32")


def add(
    primitive: str,
    f: Callable[..., Any],
    *inputs: Any,
    of: str = "",
    relative: float = 2e-6,
    is_further: bool = False,
) -> None:
    CASES.append(PrimitiveCase(primitive, of, f, inputs or (X,), relative, is_further))


def with_ends(x: Any) -> Any:
    """-inf, infinity, -0, 0 and NaN among some numbers, one after the other."""
    ends = jnp.array([-jnp.inf, jnp.inf, -0.0, 0.0, jnp.nan])
    places = jnp.arange(x.size).reshape(x.shape)
    return jnp.where(x > 0, x, ends[places % 5])


def of_kinds(primitive: str, f: Callable[..., Any], count: int, kinds: str) -> None:
    for i, kind in enumerate(kinds.split()):
        add(primitive, f, *[((0, 5), kind)] * count, of=kind, is_further=i > 0)


# On each entry

FLOATS = "float32 float16 bfloat16"
WHOLE = "int32 int8 uint8 int16 uint16 uint32"
for name in ("neg", "sign", "abs"):
    of_kinds(name, getattr(lax, name), 1, f"{FLOATS} int32 int8 int16")
for name in ("floor", "ceil", "exp", "tanh", "sin", "cos", "erf", "logistic", "is_finite"):
    of_kinds(name, getattr(lax, name), 1, FLOATS)
for name in ("sinh", "cosh", "tan", "asinh", "atan", "erfc", "cbrt", "exp2", "expm1", "square"):
    add(name, getattr(lax, name), X, relative=4e-6)
for name in ("log", "sqrt", "rsqrt", "log1p"):
    add(name, getattr(lax, name), ((0, 5), "positive"), relative=4e-6)
for name in ("asin", "acos", "atanh"):
    add(name, getattr(lax, name), ((0, 5), "unit"), relative=4e-6)
add("acosh", lambda x: lax.acosh(x + 1), ((0, 5), "positive"), relative=4e-6)
add("expm1", lambda x: lax.expm1(x * 1e-4), X, of="small", relative=1e-6)
add("log1p", lambda x: lax.log1p(x * 1e-4), X, of="small", relative=1e-6)
add("log1p", lambda x: lax.log1p(x * jnp.float32(jnp.inf)), ((0, 5), "positive"), of="infinite")
for mode in (lax.RoundingMethod.TO_NEAREST_EVEN, lax.RoundingMethod.AWAY_FROM_ZERO):
    add("round", lambda x, mode=mode: lax.round(x * 2, mode), X, of=mode.name)
    halves = lambda x, mode=mode: lax.round(lax.floor(x * 4) + 0.5, mode)
    add("round", halves, X, of=f"{mode.name}, halves")
for name in ("add", "sub", "mul", "max", "min"):
    of_kinds(name, getattr(lax, name), 2, f"{FLOATS} {WHOLE}")
of_kinds("div", lax.div, 2, FLOATS)
for kind in ("int32", "int8", "uint8", "int16"):
    for name in ("div", "rem"):
        by = lambda x, y, name=name: getattr(lax, name)(x, y | 1)
        add(name, by, *[((0, 5), kind)] * 2, of=kind, is_further=kind != "int32")
add("rem", lax.rem, X, ((0, 5), "positive"), of="float32")
for name in ("div", "rem"):
    by = lambda x, y, name=name: getattr(lax, name)(jnp.int32(-(2**31)) * (x > 0), y - 2)
    add(name, by, X, ((0, 5), "index"), of="by 0 and by -1")
    add(name, lambda x, name=name: getattr(lax, name)(x, 7), ((0, 5), "int32"), of="by a number")
add("max", lambda x: lax.max(x, jnp.log(x)), X, of="nan")
add("atan2", lax.atan2, X, X, relative=4e-6)
add("atan2", lambda x: lax.atan2(x, jnp.zeros_like(x)), X, of="of no length", relative=4e-6)
add("pow", lax.pow, ((0, 5), "positive"), X, relative=4e-6)
add("pow", lax.pow, X, ((0, 5), "index"), of="whole", relative=4e-6)
for power in (-3, -1, 0, 1, 2, 5, 40):
    add(
        "integer_pow",
        lambda x, power=power: lax.integer_pow(x, power),
        X,
        of=str(power),
        relative=4e-6,
    )
of_kinds("integer_pow", lambda x: lax.integer_pow(x, 3), 1, "int32 int8 uint32")
for name in ("and", "or", "xor"):
    of_kinds(name, getattr(lax, f"bitwise_{name}"), 2, f"bool {WHOLE}")
of_kinds("not", lax.bitwise_not, 1, f"bool {WHOLE}")
for kind in WHOLE.split():
    for name in ("shift_left", "shift_right_logical", "shift_right_arithmetic"):
        by = lambda x, n, name=name: getattr(lax, name)(x, (n * 11 % 40).astype(x.dtype))
        add(name, by, ((0, 5), kind), ((0, 5), "index"), of=kind, is_further=kind != "int32")
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    compared = lambda x, y, name=name: getattr(lax, name)(x, y)
    of_kinds(name, compared, 2, "float32 bfloat16 int32 uint8 uint32 bool")
    add(name, lambda x, name=name: getattr(lax, name)(x, x), X, of="equal")
of_kinds("clamp", lambda x: lax.clamp(x.dtype.type(1), x, x.dtype.type(2)), 1, f"{FLOATS} {WHOLE}")
add("clamp", lambda x, a: lax.clamp(-a, x, a), X, ((0, 5), "unit"), of="by arrays")
for kind in (*FLOATS.split(), "int32", "uint8", "bool"):
    add(
        "select_n",
        lambda w, x, y: lax.select_n(w, x, y),
        ((0, 5), "bool"),
        *[((0, 5), kind)] * 2,
        of=kind,
        is_further=kind != "float32",
    )
add("select_n", lambda w, *xs: lax.select_n(w, *xs), ((0, 5), "index"), X, X, X, X, of="of four")
for name in ("lt_to", "le_to", "eq_to"):
    ordered = lambda x, y, name=name: getattr(lax, f"{name}_p").bind(
        with_ends(x), with_ends(y.swapaxes(0, 1))
    )
    add(name, ordered, ((5, 5), "float32"), ((5, 5), "float32"))
    whole = lambda x, y, name=name: getattr(lax, f"{name}_p").bind(x, y)
    add(name, whole, *[((0, 5), "index")] * 2, of="whole", is_further=True)
add("le_to", lambda x: jnp.searchsorted(jnp.arange(-3.0, 3.0), x), X, of="searchsorted")
KINDS = ["float32", "float16", "bfloat16", "int32", "int8", "uint8", "uint32", "bool"]
for before in KINDS:
    for after in KINDS:
        floating = jnp.issubdtype(jnp.dtype(before), jnp.floating)
        signless = floating and after.startswith(("u", "b")) and after != "bfloat16"
        if before != after and after != "bool":
            add(
                "convert_element_type",
                lambda x, after=after, s=signless: lax.convert_element_type(
                    lax.abs(x) if s else x, jnp.dtype(after)
                ),
                ((0, 5), before),
                of=f"{before} to {after}",
                is_further="float32" not in (before, after),
            )
for bits in ((8, 23), (8, 7), (5, 10)):
    add("reduce_precision", lambda x, bits=bits: lax.reduce_precision(x, *bits), X, of=str(bits))
subnormal = lambda x: lax.reduce_precision(x * 1e-4, 5, 10)
add("reduce_precision", subnormal, X, of="subnormal")
behind = {"copy": jnp.copy, "barrier": lax.optimization_barrier, "stop_gradient": lax.stop_gradient}
for name, f in behind.items():
    add("add", lambda x, f=f: f(x) + 1, X, of=f"behind {name}")

# Layout

add("reshape", lambda x: x.reshape(x.shape[0], -1), IMAGE, of="flat")
add("reshape", lambda x: x.reshape(-1, 4), IMAGE, of="of the batch")
add("reshape", lambda x: x.reshape(x.shape[0] * 2, 3, 5 * x.shape[3]), IMAGE, of="twice the batch")
add("reshape", lambda x: x.reshape(2, x.shape[0], 60), IMAGE, of="with the batch inside")
add("transpose", lambda x: x.transpose(2, 0, 3, 1), IMAGE)
of_kinds("transpose", lambda x: x.T, 1, f"{FLOATS} {WHOLE} bool")
add("squeeze", lambda x: lax.squeeze(x, (1, 3)), ((0, 1, 5, 1), "float32"))
add("broadcast_in_dim", lambda x: jnp.broadcast_to(x[:, None, :, None], (x.shape[0], 3, 5, 2)))
add("broadcast_in_dim", lambda x: jnp.broadcast_to(x[:, :1], x.shape), X, of="of size 1")
add("broadcast_in_dim", lambda x: jnp.ones((x.shape[0], 3)), X, of="of a number")
add("rev", lambda x: lax.rev(x, (0, 2)), IMAGE)
add("slice", lambda x: x[:, 1:5:2, :, 2:], IMAGE)
add("slice", lambda x: x[1:], X, of="of the batch")
of_kinds("slice", lambda x: x[:, 1:3], 1, f"{FLOATS} {WHOLE} bool")
add("concatenate", lambda x, y: jnp.concatenate([x, y, x[:, :2]], 1), X, X)
of_kinds("concatenate", lambda x, y: jnp.concatenate([x, y]), 2, f"{FLOATS} {WHOLE} bool")
add("stack", lambda x, y: jnp.stack([x, y], 1), X, X)
add("unstack", lambda x: jnp.unstack(x, axis=1)[1:4], X)
add("split", lambda x: jnp.split(x, (1, 3), axis=1), X)
add("tile", lambda x: jnp.tile(x, (2, 3)), X)
add("iota", lambda x: jnp.arange(x.shape[0]) + x[:, 0].astype(int), X, of="of the batch")
add("iota", lambda x: lax.broadcasted_iota(jnp.float32, (3, x.shape[0]), 1) * 2, X, of="broadcast")
PADS = {
    "": ((0, 0, 0), (1, 2, 0), (0, 3, 0), (2, 0, 0)),
    "of the batch": ((1, 2, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)),
    "negative": ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (-1, -1, 0)),
    "between": ((0, 0, 0), (0, 0, 2), (1, 1, 1), (-1, 0, 3)),
    "between the batch": ((1, -1, 2), (0, 0, 0), (0, 0, 0), (0, 0, 0)),
}
for variant, config in PADS.items():
    add("pad", lambda x, config=config: lax.pad(x, x.dtype.type(7), config), IMAGE, of=variant)
for kind in (*FLOATS.split(), *WHOLE.split(), "bool"):
    add(
        "pad",
        lambda x: lax.pad(x, x.dtype.type(1), ((0, 0, 0), (2, 1, 1))),
        ((0, 5), kind),
        of=kind,
        is_further=kind != "float32",
    )

# Reductions and running ones

for name, f in {"sum": jnp.sum, "max": jnp.max, "min": jnp.min, "prod": jnp.prod}.items():
    add(f"reduce_{name}", lambda x, f=f: f(x, (1, 3)), IMAGE, relative=4e-6)
    # Of one sign: rounding shows in a sum of both that happens to be next to 0.
    add(f"reduce_{name}", lambda x, f=f: f(x), ((0, 5), "positive"), of="of all", relative=1e-5)
    for kind in ("bfloat16", "index", "int32", "uint8", "int8"):
        direct = {"sum": lax.reduce_sum, "max": lax.reduce_max, "min": lax.reduce_min}
        direct["prod"] = lax.reduce_prod
        reduced = lambda x, f=direct[name]: f(x, (1,))
        # Products of int32 may leave 64 bits, and sums of bfloat16 are rounded elsewhere.
        if name in ("max", "min") or (kind != "bfloat16" and (name, kind) != ("prod", "int32")):
            add(f"reduce_{name}", reduced, ((0, 5), kind), of=kind, is_further=True)
add("div", lambda x: x.mean(0), X, of="mean over the batch", relative=4e-6)
for name in ("and", "or", "xor"):
    reduced = getattr(lax, f"reduce_{name}")
    add(f"reduce_{name}", lambda x, f=reduced: f(x, (1,)), ((0, 5), "bool"))
for name in ("argmax", "argmin"):
    f = getattr(jnp, name)
    add(name, lambda x, f=f: f(x, -1), X)
    add(name, lambda x, f=f: f(jnp.round(x), 0), X, of="of the batch, with ties")
    add(name, lambda x, f=f: f(x), X, of="of all")
    of_kinds(name, lambda x, f=f: f(x, 1), 1, "int32 uint8 bool")
for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
    for reverse in (False, True):
        f = lambda x, n=name, r=reverse: getattr(lax, n)(x, axis=1, reverse=r)
        add(name, f, IMAGE, of="from behind" * reverse, relative=1e-5)
for name in ("cumsum", "cumprod", "cummax", "cummin"):
    of_kinds(name, lambda x, n=name: getattr(lax, n)(x, axis=1), 1, "int32")
add("cumsum", lambda x: lax.cumsum(x, axis=0), X, of="over the batch", relative=1e-5)
add("sort", lambda x: jnp.sort(x, 1), IMAGE)
add("sort", lambda x: jnp.argsort(jnp.round(x), 1), IMAGE, of="argsort, with ties")
add("sort", lambda x: jnp.sort(x, 0, descending=True), X, of="of the batch, falling")
add("sort", lambda x, y: lax.sort((jnp.round(x), y), num_keys=2), X, X, of="by two keys")
of_kinds("sort", lambda x: lax.sort(x), 1, "int32 uint8 bool")
add("top_k", lambda x: lax.top_k(x, 3), X)
add("top_k", lambda x: lax.top_k(lax.floor(lax.abs(x) * 2), 4), X, of="with ties")
add("approx_top_k", lambda x: lax.approx_max_k(x, 2), ((0, 9), "float32"))

# Windows

for name in ("max", "sum", "min"):
    kinds = {"max": (lax.max, -np.inf), "sum": (lax.add, 0.0), "min": (lax.min, np.inf)}
    op, start = kinds[name]

    def reduced(x, window, strides, padding, op=op, start=start, **options):
        return lax.reduce_window(x, x.dtype.type(start), op, window, strides, padding, **options)

    forms = {
        "": ((1, 2, 2, 1), (1, 2, 2, 1), "VALID", {}),
        "same": ((1, 3, 3, 1), (1, 1, 1, 1), "SAME", {}),
        "strided, same": ((1, 3, 2, 1), (1, 2, 2, 1), "SAME", {}),
        "wide padding": ((1, 2, 1, 1), (1, 1, 1, 1), ((0, 0), (3, 2), (0, 0), (0, 0)), {}),
        "of one axis": ((1, 1, 3, 1), (1, 1, 2, 1), "VALID", {}),
        "of three axes": ((1, 2, 2, 2), (1, 1, 2, 2), "VALID", {}),
        "of four axes": ((2, 2, 2, 2), (1, 1, 2, 2), "VALID", {}),
        "dilated": ((1, 2, 2, 1), (1, 1, 1, 1), "VALID", {"window_dilation": (1, 2, 3, 1)}),
        "dilated input": ((1, 2, 3, 1), (1, 1, 2, 1), "VALID", {"base_dilation": (1, 2, 2, 1)}),
    }
    for variant, (window, strides, padding, options) in forms.items():
        f = lambda x, a=(window, strides, padding), o=options, r=reduced: r(x, *a, **o)
        add(f"reduce_window_{name}", f, IMAGE, of=variant, relative=1e-5)


def whole_pool(x, op, start):
    return lax.reduce_window(x, x.dtype.type(start), op, (1, 3), (1, 2), "VALID")


add("reduce_window_max", lambda x: whole_pool(x, lax.max, -(2**31)), ((0, 8), "int32"), of="int32")
add("reduce_window_sum", lambda x: whole_pool(x, lax.add, 0), ((0, 8), "int32"), of="int32")
add(
    "reduce_window_sum",
    lambda x: jax.lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") / 4,
    IMAGE,
    of="average",
    relative=1e-5,
)

# Products

DOTS = {
    "matrix": (((1,), (0,)), ((), ()), (0, 5), (5, 3)),
    "turned": (((1,), (1,)), ((), ()), (0, 5), (3, 5)),
    "turned on the left": (((0,), (0,)), ((), ()), (5, 0), (5, 3)),
    "of vectors": (((0,), (0,)), ((), ()), (5,), (5,)),
    "vector and matrix": (((0,), (0,)), ((), ()), (5,), (5, 3)),
    "matrix and vector": (((1,), (0,)), ((), ()), (0, 5), (5,)),
    "outer": (((), ()), ((), ()), (0, 5), (3, 2)),
    "long": (((2,), (0,)), ((), ()), (0, 4, 5), (5, 3)),
    "long on both sides": (((2,), (1,)), ((), ()), (0, 4, 5), (2, 5, 3)),
    "over two axes": (((1, 2), (0, 1)), ((), ()), (0, 4, 5), (4, 5, 3)),
    "over two axes, crossed": (((2, 1), (0, 2)), ((), ()), (0, 4, 5), (5, 3, 4)),
    "batch": (((2,), (1,)), ((0,), (0,)), (0, 4, 5), (0, 5, 3)),
    "batches behind": (((0,), (1,)), ((2, 1), (0, 2)), (5, 3, 0, 2), (0, 5, 3, 6)),
    "of batches alone": (((), ()), ((0, 1), (0, 1)), (0, 5), (0, 5)),
    "heads": (((3,), (3,)), ((0, 2), (0, 2)), (0, 4, 2, 5), (0, 6, 2, 5)),
}
for variant, (contracted, batch, left, right) in DOTS.items():
    f = lambda x, y, n=(contracted, batch): lax.dot_general(x, y, n)
    kind = "positive" if variant == "of vectors" else "float32"  # one sum, which may not be near 0
    add("dot_general", f, (left, kind), (right, kind), of=variant, relative=1e-5)
add(
    "dot_general",
    lambda x: lax.dot_general(jnp.arange(15.0).reshape(3, 5), x, (((1,), (1,)), ((), ()))),
    X,
    of="constant on the left",
    relative=1e-5,
)
for kind, wide in (("int8", "int32"), ("bfloat16", "float32"), ("int32", "int32")):
    f = lambda x, y, w=wide: lax.dot(x, y, preferred_element_type=jnp.dtype(w))
    add("dot_general", f, ((0, 5), kind), ((5, 3), kind), of=kind, relative=1e-5)


def conv(strides=(1, 1), padding="SAME", numbers=("NHWC", "HWIO", "NHWC"), **options):
    return lambda x, k: lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=numbers, **options
    )


KERNEL = ((3, 2, 4, 8), "float32")
CONVS = {
    "": (conv(), IMAGE, KERNEL),
    "strided": (conv((2, 3)), IMAGE, KERNEL),
    "valid": (conv(padding="VALID"), IMAGE, KERNEL),
    "asymmetric": (conv(padding=((2, 0), (0, 3))), IMAGE, KERNEL),
    "negative padding": (conv(padding=((-1, 2), (1, -1))), IMAGE, KERNEL),
    "dilated": (conv(rhs_dilation=(2, 1)), IMAGE, KERNEL),
    "dilated input": (conv(padding=((1, 2), (2, 1)), lhs_dilation=(2, 3)), IMAGE, KERNEL),
    "dilated input, strided": (conv((2, 1), ((1, 2), (2, 1)), lhs_dilation=(3, 2)), IMAGE, KERNEL),
    "groups": (conv(feature_group_count=2), IMAGE, ((3, 3, 2, 6), "float32")),
    "depthwise": (conv(feature_group_count=4), IMAGE, ((3, 3, 1, 8), "float32")),
    "channels first": (
        conv(numbers=("NCHW", "OIHW", "NCHW")),
        ((0, 3, 6, 5), "float32"),
        ((4, 3, 3, 3), "float32"),
    ),
    "odd layout": (
        conv(numbers=("CHNW", "WIOH", "HNWC")),
        ((4, 6, 0, 5), "float32"),
        ((2, 4, 8, 3), "float32"),
    ),
    "1-D": (
        conv((2,), "SAME", ("NWC", "WIO", "NWC")),
        ((0, 9, 4), "float32"),
        ((3, 4, 5), "float32"),
    ),
    "3-D": (
        conv((1, 2, 1), "SAME", ("NDHWC", "DHWIO", "NDHWC")),
        ((0, 4, 5, 3, 2), "float32"),
        ((2, 3, 2, 2, 4), "float32"),
    ),
    "bfloat16": (
        conv(preferred_element_type=jnp.float32),
        ((0, 6, 5, 4), "bfloat16"),
        ((3, 2, 4, 8), "bfloat16"),
    ),
}
for variant, (f, *inputs) in CONVS.items():
    add("conv_general_dilated", f, *inputs, of=variant, relative=1e-5)


def upsampled(strides, padding, window=(3, 2), groups=1, out=6):
    kernel = np.random.default_rng(0).normal(size=(*window, 4 // groups, out)).astype(np.float32)
    if groups == 1:
        return lambda x: lax.conv_transpose(x, kernel, strides, padding)
    return lambda x: lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        lhs_dilation=strides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


for variant, f in {
    "transposed, valid": upsampled((2, 2), "VALID"),
    "transposed, same": upsampled((2, 3), "SAME"),
    "transposed, without overlap": upsampled((2, 2), "VALID", (2, 2)),
    "transposed, of one": upsampled((3, 2), "VALID", (1, 1)),
    "transposed, groups": upsampled((2, 2), ((2, 3), (1, 1)), groups=2),
}.items():
    add("conv_general_dilated", f, IMAGE, of=variant, relative=1e-5)

# Indexing

TABLE = ((6, 5, 4), "float32")
PICKED = ((0,), "index")
WILD = ((0,), "wild")
add("gather", lambda x, i: x[i], TABLE, PICKED, of="x[i]")
add("gather", lambda x, i: x[:, i], TABLE, PICKED, of="x[:, i]")
add("gather", lambda x, i: x[..., i], TABLE, PICKED, of="x[..., i]")
add("gather", lambda x, i: x[i, i], TABLE, PICKED, of="x[i, i]")
add("gather", lambda x, i: x[i, :, i], TABLE, PICKED, of="x[i, :, i]")
add("gather", lambda x, i: x[i[:, None], i[None, :]], TABLE, PICKED, of="x[i[:, None], i[None]]")
add("gather", lambda x, i: x[1:5, i], TABLE, PICKED, of="x[1:5, i]")
add("gather", lambda x, i: x[i, 1:3], TABLE, PICKED, of="x[i, 1:3]")
add("gather", lambda x, i: x[i.reshape(-1, 1)], TABLE, PICKED, of="x[i[:, None]]")
add("gather", lambda x, i: x.at[i].get(mode="clip"), TABLE, WILD, of="clipped")
add("gather", lambda x, i: x.at[i].get(mode="fill"), TABLE, WILD, of="filled with NaN")
add("gather", lambda x, i: x.at[i].get(mode="fill", fill_value=3), TABLE, WILD, of="filled with 3")
add("gather", lambda x, i: x.at[i, i].get(mode="fill"), ((6, 5), "int32"), WILD, of="filled, int32")
add("gather", lambda x, i: jnp.take(x, i, axis=1), TABLE, WILD, of="take")
add(
    "gather",
    lambda x, i: jnp.take_along_axis(x, i, 1),
    ((0, 5), "float32"),
    ((0, 3), "index"),
    of="take_along_axis",
)
add(
    "gather",
    lambda x, i: jnp.take_along_axis(x, i, 0),
    ((5, 0), "float32"),
    ((3, 0), "index"),
    of="take_along_axis in front",
)
add(
    "gather",
    lambda x, i: jax.vmap(lambda x, i: x[i])(x, i),
    ((0, 5, 2), "float32"),
    ((0, 3), "index"),
    of="of a batch",
)
add(
    "gather",
    lambda x, i: jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 1), (2, 2)))(x, i),
    ((0, 5, 4), "float32"),
    ((0,), "wild"),
    of="windows of a batch",
)
add(
    "gather",
    lambda x, i: jax.vmap(lambda i: lax.dynamic_slice(x, (i, i), (2, 3)))(i),
    ((6, 5), "float32"),
    ((0,), "wild"),
    of="windows at two places",
)
of_kinds("gather", lambda x: x[:, jnp.array([2, 0, 1, 2])], 1, f"{FLOATS} {WHOLE} bool")
UPDATE = ((0, 5, 4), "float32")
add("scatter", lambda x: x.at[:, 1].set(2.0), X, of="[:, 1].set")
add(
    "scatter",
    lambda x, y: x.at[:, 1].set(y),
    ((0, 5, 2), "float32"),
    ((0, 2), "float32"),
    of="[:, 1].set of arrays",
)
add("scatter", lambda x, i, y: x.at[i[0]].set(y), TABLE, PICKED, ((5, 4), "float32"), of="[i].set")
add(
    "scatter",
    lambda x, i: x.at[jnp.arange(x.shape[0]), i].set(9.0),
    X,
    PICKED,
    of="[arange, i].set",
)
add("scatter", lambda x, y: x.at[:, 1:3].set(y), X, ((0, 2), "float32"), of="[:, 1:3].set")
add("scatter", lambda x, y: x.at[:, ::2].set(y), X, ((0, 3), "float32"), of="[:, ::2].set")
add("scatter", lambda x, i: x.at[i[:1]].set(1.0), TABLE, WILD, of="dropped")
for name in ("add", "mul", "min", "max"):
    method = "multiply" if name == "mul" else name
    f = lambda x, i, y, n=method: getattr(x.at[i], n)(y)
    add(
        f"scatter-{name}",
        f,
        TABLE,
        WILD,
        UPDATE,
        relative=1e-5,
    )
add("scatter-add", lambda x, i: x.at[:, i].add(1.0), TABLE, PICKED, of="[:, i].add")
add("scatter-add", lambda x, i: x.at[i, 1, i].add(1.0), TABLE, PICKED, of="[i, 1, i].add")
add(
    "scatter-add",
    lambda x, i, y: jax.vmap(lambda x, i, y: x.at[i].add(y))(x, i, y),
    ((0, 5), "float32"),
    ((0, 3), "wild"),
    ((0, 3), "float32"),
    of="of a batch",
    relative=1e-5,
)
add(
    "scatter-add",
    lambda i, y: jax.ops.segment_sum(y, i, 4),
    PICKED,
    ((0, 5), "float32"),
    of="segment_sum",
    relative=1e-5,
)
of_kinds("scatter", lambda x: x.at[:, jnp.array([2, 0])].set(x[:, 3:]), 1, f"{FLOATS} {WHOLE} bool")
ONE = ((), "wild")
add("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i, 0, i), (2, 5, 3)), TABLE, ONE)
add(
    "dynamic_slice",
    lambda x, i: lax.dynamic_slice_in_dim(x, i, 3, 1),
    ((0, 5, 2), "float32"),
    ONE,
    of="with a batch",
)
add("dynamic_slice", lambda x, i: x[i], TABLE, ONE, of="x[i]")
add(
    "dynamic_update_slice",
    lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i, 0)),
    TABLE,
    ((2, 3, 4), "float32"),
    ONE,
)
add(
    "dynamic_update_slice",
    lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y, i, 1),
    ((0, 5, 2), "float32"),
    ((0, 2, 2), "float32"),
    ONE,
    of="with a batch",
)
add(
    "dynamic_update_slice",
    lambda x, y: lax.dynamic_update_slice(x, y, (0, 3)),
    X,
    ((0, 2), "float32"),
    of="at a known place",
)

# Loops and branches


def running(x):
    return lax.scan(lambda c, v: (c * 0.5 + v, c - v), jnp.zeros(x.shape[1:]), x)


add("scan", lambda x: running(x.T), ((0, 12), "float32"), of="long")
add("scan", running, ((0, 3), "float32"), of="over the batch")
add(
    "scan",
    lambda x: lax.scan(lambda c, v: (c + v, c * v), x[0], x, reverse=True),
    ((12, 0), "float32"),
    of="from behind",
)
add(
    "scan",
    lambda x: lax.fori_loop(0, 20, lambda i, y: y * 0.9 + i, x),
    X,
    of="counted",
    relative=1e-5,
)
add(
    "scan",
    lambda x: lax.scan(lambda c, _: (c * 0.9, c), x, None, length=20, reverse=True),
    X,
    of="counted from behind",
    relative=1e-5,
)
add(
    "while",
    lambda x: lax.while_loop(
        lambda s: s[1] < jnp.abs(x).sum(),
        lambda s: (s[0] * 2, s[1] + s[0].max()),
        (x * 0 + 1, jnp.float32(0)),
    ),
    X,
    of="",
    relative=1e-5,
)
add("while", lambda x, i: lax.fori_loop(0, i, lambda k, y: y * 0.5 + k, x), X, ONE, of="counted")
add("cond", lambda x: lax.cond(x[0, 0] > 0, jnp.sin, lambda x: x * 2, x), X)
add(
    "cond",
    lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, lambda x: x * 2, jnp.tanh], x),
    X,
    ONE,
    of="switch",
)
