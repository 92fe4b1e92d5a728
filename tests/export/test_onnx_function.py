"""Networks of every framework as ONNX files: their answers are JAX's, in floats and in codes."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import ab_jax as ab
from ab_jax.export.onnx import function_to_onnx
from tests.export.exported_networks import LONG, NETWORKS, OPEN_AXES, coded
from tests.export.onnx_answers import answers, check_close


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in NETWORKS]
)
def test_a_file_answers_as_its_network(name: str, rng: np.random.Generator) -> None:
    """At a batch that was never traced: with float weights, and with codes of 8 and of 4 bits."""
    f, params, inputs = NETWORKS[name](rng)
    compiled = jax.jit(f)
    axis = 0 if name.startswith("equinox") else -1
    for given in (params, coded(params, 8, axis), coded(params, 4, axis, zero_point=True)):
        model = function_to_onnx(f, given, *inputs, open_axes=OPEN_AXES.get(name))
        dense = jax.tree.map(jnp.asarray, ab.dequantize(given))
        wanted = compiled(dense, *jax.tree.map(jnp.asarray, inputs))
        check_close(answers(model, *inputs), wanted)
        stored = {a.data_type for a in model.graph.initializer if "codes" in a.name}
        is_quantized = given is not params
        assert stored == (
            {onnx.TensorProto.INT8, onnx.TensorProto.INT4} & stored if is_quantized else set()
        )
        assert bool(stored) == is_quantized
