"""Each primitive of JAX that LiteRT files carry, beside JAX at a batch that was never traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ab_jax.export.litert import function_to_litert
from ab_jax.export.litert.litert_function import CARRIED
from tests.export.litert_answers import answers
from tests.export.onnx_answers import check_close, evaluate
from tests.export.primitive_cases import CASES, PrimitiveCase

#: Forms of carried primitives that are not.
WHOLE = {"int32", "int8", "uint8", "int16", "uint16", "uint32"}
REFUSED: dict[str, set[str]] = {
    **dict.fromkeys(("and", "or", "xor", "not"), WHOLE),
    **{name: {"by 0 and by -1", *WHOLE} for name in ("div", "rem")},  # by what is no constant
    "dot_general": {"int8", "int32"},
}
#: What the plain kernels end at the largest float32, where it is infinite.
ENDING = {"log1p, infinite", "reduce_window_max, wide padding"}


def carried() -> list[PrimitiveCase]:
    return [
        case
        for case in CASES
        if case.primitive in CARRIED and case.variant not in REFUSED.get(case.primitive, ())
    ]


def is_long(case: PrimitiveCase) -> bool:
    """All but the first of a primitive."""
    return next(c for c in carried() if c.primitive == case.primitive) is not case


def seen_by_numpy(dtype: Any) -> Any:
    """The interpreter takes no bfloat16 from NumPy, and gives it none."""
    return jnp.float32 if dtype == jnp.bfloat16 else dtype


def written(case: PrimitiveCase, drawn: list[Any]) -> tuple[Any, Any, list[Any]]:
    """A function of a case, its file, and the inputs."""
    kinds = [x.dtype for x in drawn]
    inputs = [x.astype(seen_by_numpy(x.dtype)) for x in drawn]
    opened = [
        {axis: "batch" for axis, size in enumerate(shape) if not size} for shape, _ in case.inputs
    ]

    def f(params: Any, *xs: Any) -> Any:
        results = case.f(*(x.astype(kind) for x, kind in zip(xs, kinds, strict=True)))
        return jax.tree.map(lambda y: y.astype(seen_by_numpy(y.dtype)), results)

    return f, function_to_litert(f, {}, *inputs, open_axes=opened), inputs


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.long] * is_long(c)) for c in carried()],
)
def test_a_primitive_gives_what_jax_gives(case: PrimitiveCase, rng: np.random.Generator) -> None:
    drawn = case.drawn(rng, 3)
    f, data, inputs = written(case, drawn)
    wanted = evaluate(lambda *xs: f({}, *xs), *map(jnp.asarray, inputs))
    narrow = any(x.dtype.itemsize == 2 and x.dtype.kind not in "iu" for x in drawn)
    relative = 1e-2 if narrow else case.relative
    for kernels in ("fast",) if case.name in ENDING else ("fast", "plain"):
        found = answers(data, *inputs, kernels=kernels)
        check_close(found, wanted, relative=relative, absolute=1e-12)


@pytest.mark.parametrize("primitive", REFUSED)
def test_forms_that_are_not_carried_are_named(primitive: str, rng: np.random.Generator) -> None:
    for case in CASES:
        if case.primitive == primitive and case.variant in REFUSED[primitive]:
            with pytest.raises(ValueError, match=r"LiteRT has no counterpart of \w+ of"):
                written(case, case.drawn(rng, 3))


def test_each_primitive_that_is_carried_has_a_case() -> None:
    ours = {"size", "quantize", "quantize_tokens", "add_any", "expand_dims"}
    ours |= {"softmax", "log_softmax", "layer_norm", "gelu"}  # of test_named_functions
    assert CARRIED.keys() - ours <= {case.primitive for case in carried()}


def test_primitives_that_are_not_carried_are_named_with_lines_and_weights() -> None:
    x = jnp.ones((2, 4))

    def f(params: Any, x: jax.Array) -> jax.Array:
        return lax.lgamma(x) + lax.nextafter(x, params["layer"]["w"])

    with pytest.raises(ValueError, match="LiteRT has no counterpart of") as raised:
        function_to_litert(f, {"layer": {"w": jnp.ones((1, 4))}}, x)
    line = f.__code__.co_firstlineno + 1
    told = str(raised.value)
    assert f"lgamma, at {__file__}:{line}" in told
    assert f"nextafter of layer/w, at {__file__}:{line}" in told


def test_dtypes_that_there_are_not_are_refused_by_the_name_of_the_input() -> None:
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="the dtype complex64 of the output"):
        function_to_litert(lambda _, x: x * 1j, {}, x)
    with pytest.raises(ValueError, match="the dtype key<fry> of 1"):
        function_to_litert(lambda _, x, k: x, {}, x, jax.random.key(0))


@pytest.mark.parametrize(
    ("f", "told"),
    [
        (lambda x: lax.top_k(x, 2, axis=0), "top_k along another axis than the last"),
        (lambda x: lax.reduce_or(x.astype(int), (1,)), "reduce_or of int32"),
        (lambda x: jnp.floor(x).astype(int) // x.astype(int), "div of integers by what may be 0"),
        (
            lambda x: lax.conv(
                x[:, None, None].astype(int), jnp.ones((2, 1, 1, 2), int), (1, 1), "SAME"
            ),
            "conv_general_dilated of int32",
        ),
        (
            lambda x: lax.conv_general_dilated(
                x[:, None], jnp.ones((2, 1, 2)), (1,), "SAME", batch_group_count=2
            ),
            "conv_general_dilated with groups of the batch",
        ),
    ],
)
def test_more_forms_that_are_not_carried_are_named(f: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"LiteRT has no counterpart of {told}"):
        function_to_litert(lambda _, x: f(x), {}, jnp.ones((2, 4)), open_axes=[None])


def test_a_size_that_is_wanted_and_not_known_is_told() -> None:
    def f(_: Any, x: jax.Array) -> jax.Array:
        x = x[:, ::2]
        return jnp.broadcast_to(x[..., None], (*x.shape, 3))

    with pytest.raises(ValueError, match="A size is 7 at batch=7 and length=13"):
        function_to_litert(f, {}, jnp.ones((2, 4)), open_axes=({0: "batch", 1: "length"},))
    with_known = function_to_litert(f, {}, jnp.ones((2, 4)))
    check_close(answers(with_known, np.ones((3, 4), np.float32)), np.ones((3, 2, 3), np.float32))
