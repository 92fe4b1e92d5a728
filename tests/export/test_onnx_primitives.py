"""Each primitive of JAX that ONNX files carry, run beside JAX at a batch that was never traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ab_jax.export.onnx import function_to_onnx
from ab_jax.export.onnx.onnx_function import CARRIED
from ab_jax.export.traced import trace
from ab_jax.export.traced.layouts import SAME
from tests.export.onnx_answers import answers, check_close, evaluate
from tests.export.primitive_cases import CASES, PrimitiveCase


def seen_by_numpy(dtype: Any) -> Any:
    """ONNX Runtime takes no bfloat16 from NumPy, and gives it none."""
    return jnp.float32 if dtype == jnp.bfloat16 else dtype


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.long] * c.is_further) for c in CASES],
)
def test_a_primitive_gives_what_jax_gives(case: PrimitiveCase, rng: np.random.Generator) -> None:
    drawn = case.drawn(rng, 3)
    kinds = [x.dtype for x in drawn]
    inputs = [x.astype(seen_by_numpy(x.dtype)) for x in drawn]
    opened = [
        {axis: "batch" for axis, size in enumerate(shape) if not size} for shape, _ in case.inputs
    ]

    def f(params: Any, *xs: Any) -> Any:
        results = case.f(*(x.astype(kind) for x, kind in zip(xs, kinds, strict=True)))
        return jax.tree.map(lambda y: y.astype(seen_by_numpy(y.dtype)), results)

    graph = trace(f, {}, *inputs, open_axes=opened).graph
    assert case.primitive in {operation.primitive for operation in graph.all_operations()}
    model = function_to_onnx(f, {}, *inputs, open_axes=opened)
    wanted = evaluate(lambda *xs: f({}, *xs), *map(jnp.asarray, inputs))
    narrow = any(np.dtype(kind).itemsize == 2 and kind.kind not in "iu" for kind in kinds)
    relative = 1e-2 if narrow else case.relative
    check_close(answers(model, *inputs), wanted, relative=relative, absolute=1e-12)


#: Those of `jax.lax` that files do not carry. (What depends on no input is evaluated anyway.)
REFUSED = {
    *("all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum"),
    *("ragged_all_to_all", "after_all", "create_token", "dce_sink", "stage"),
    *("bessel_i0e", "bessel_i1e", "digamma", "erf_inv", "igamma", "igamma_grad_a", "igammac"),
    *("lgamma", "polygamma", "regularized_incomplete_beta", "zeta", "nextafter"),
    *("complex", "conj", "real", "imag", "fft"),
    *("bitcast_convert_type", "clz", "population_count", "mulhi"),
    *("linear_solve", "rng_bit_generator", "rng_uniform"),
    *("reduce", "reduce_window", "select_and_gather_add", "select_and_scatter"),
    *("select_and_scatter_add", "scatter_sub"),
}
#: Those that are gone before anything is written, and those that are written under other names.
ELSEWHERE = {*SAME, "broadcast_in_dim"}


def test_each_primitive_that_is_carried_has_a_case() -> None:
    ours = {"size", "quantize", "quantize_tokens", "add_any", "expand_dims"}
    ours |= {"softmax", "log_softmax", "layer_norm", "gelu"}  # of test_named_functions
    tried = {case.primitive.replace("-", "_") for case in CASES}
    assert {name.replace("-", "_") for name in CARRIED} - ours <= tried


def test_the_list_of_primitives_is_that_of_jax() -> None:
    carried = {name.replace("-", "_") for name in CARRIED}
    named = {name.removesuffix("_p") for name in dir(lax) if name.endswith("_p")}
    assert named - carried - ELSEWHERE == REFUSED & named
    assert not carried & REFUSED


def refused(f: Any, *inputs: Any, open_axes: Any = None) -> str:
    with pytest.raises(ValueError, match="ONNX has no counterpart of") as raised:
        function_to_onnx(lambda _, *xs: f(*xs), {}, *inputs, open_axes=open_axes)
    return str(raised.value)


def test_a_primitive_that_is_not_carried_is_named_with_its_line_and_the_weight() -> None:
    x = jnp.ones((2, 4))

    def f(params: Any, x: jax.Array) -> jax.Array:
        return lax.lgamma(x) + lax.nextafter(x, params["layer"]["w"])

    with pytest.raises(ValueError, match="ONNX has no counterpart of") as raised:
        function_to_onnx(f, {"layer": {"w": jnp.ones((1, 4))}}, x)
    line = f.__code__.co_firstlineno + 1
    told = str(raised.value)
    assert f"lgamma, at {__file__}:{line}" in told
    assert f"nextafter of layer/w, at {__file__}:{line}" in told


def test_a_size_that_is_wanted_and_not_known_is_named_with_its_line() -> None:
    def f(_: Any, x: jax.Array) -> jax.Array:
        x = x[:, ::2]
        return jnp.broadcast_to(x[..., None], (*x.shape, 3))

    line = f.__code__.co_firstlineno + 2
    told = rf"broadcast_in_dim, at {__file__}:{line}: A size is 7 at batch=7 and length=13"
    with pytest.raises(ValueError, match=told) as raised:
        function_to_onnx(f, {}, jnp.ones((2, 4)), open_axes=({0: "batch", 1: "length"},))
    assert "no sum of products" in str(raised.value)
    with_known = function_to_onnx(f, {}, jnp.ones((2, 4)))
    check_close(answers(with_known, np.ones((3, 4), np.float32)), np.ones((3, 2, 3), np.float32))


def test_random_keys_and_complex_numbers_are_refused_by_what_they_are() -> None:
    x = jnp.ones((2, 4))
    assert "the dtype complex64 of the output" in refused(lambda x: x * 1j, x)
    assert "random_bits" in refused(lambda x: x + jax.random.uniform(jax.random.key(0), x.shape), x)
    told = refused(lambda x, k: x, x, jax.random.key(0))
    assert "the dtype key<fry> of 1" in told


@pytest.mark.parametrize(
    ("f", "told"),
    [
        (lambda x: lax.cummax(x, axis=0), "cummax along an axis of batch, which is open"),
        (
            lambda x: lax.conv_general_dilated(x.T[None], jnp.ones((1, 4, 3)), (2,), "SAME"),
            "with a padding of (1 at batch=7, 0 at batch=12), which is open (trace at multiples",
        ),
        (lambda x: lax.reduce_precision(x, 4, 3), "to 4 bits of exponent and 3 of mantissa"),
        (lambda x: jnp.fft.fft(x), "fft"),
        (lambda x: lax.reduce_or(x.astype(int), (1,)), "reduce_or of int32"),
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
def test_forms_that_are_not_carried_are_named(f: Any, told: str) -> None:
    open_axes = [{0: "batch"}] if "which is open" in told else [None]
    assert told in refused(f, jnp.ones((2, 4)), open_axes=open_axes)
