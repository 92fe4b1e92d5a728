"""Each primitive of JAX that is carried into ONNX files, run beside JAX, at a batch never traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ab_jax.export.onnx import function_to_onnx
from ab_jax.export.onnx.onnx_function import CARRIED
from ab_jax.export.traced import trace
from tests.export.onnx_answers import answers, check_close, evaluate
from tests.export.primitive_cases import CASES, PrimitiveCase


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_primitive_gives_what_jax_gives(case: PrimitiveCase, rng: np.random.Generator) -> None:
    inputs = case.drawn(rng, 3)
    opened = [
        {axis: "batch" for axis, size in enumerate(shape) if not size} for shape, _ in case.inputs
    ]

    def f(params: Any, *xs: Any) -> Any:
        return case.f(*xs)

    graph = trace(f, {}, *inputs, open_axes=opened).graph
    assert case.primitive in {operation.primitive for operation in graph.all_operations()}
    model = function_to_onnx(f, {}, *inputs, open_axes=opened)
    wanted = evaluate(case.f, *map(jnp.asarray, inputs))
    narrow = any(np.dtype(leaf.dtype).itemsize == 2 for leaf in jax.tree.leaves(wanted))
    relative = 1e-2 if narrow else case.relative
    check_close(answers(model, *inputs), wanted, relative=relative, absolute=1e-12)
