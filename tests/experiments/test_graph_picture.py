"""The picture of a block: the operators of a file, and what ONNX Runtime makes of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.export.inference import inference
from ab_jax.export.onnx import function_to_onnx
from experiments.exported.graph_picture import Config, run, steps
from experiments.settings.config import FlagError
from tests.export.small_networks import make


def test_a_block_is_drawn_as_it_is_and_as_it_runs(rng: np.random.Generator, tmp_path: Path) -> None:
    model, variables, shape = make("mobilenet", rng)
    net, images = inference(model, variables), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    file = function_to_onnx(net.function, net.params, images, rules=net.rules, ranges=net.ranges)
    path = tmp_path / "net.onnx"
    path.write_bytes(file.SerializeToString())
    found = steps(path, "block3")
    written, computed = ([step.operator for step in column] for column in found.values())
    depthwise = ["Cast", "Transpose", "Conv", "QuantizeLinear", "Transpose"]
    assert written == [*depthwise, "DequantizeLinear", "MatMul", "Add", "QuantizeLinear"]
    assert "MatMulIntegerToFloat" in computed
    assert not {"MatMul", "DequantizeLinear"} & set(computed)
    (kernel,) = [step.arrays for step in found["in the file"] if step.operator == "Conv"]
    assert any("int4" in array for array in kernel)
    run(Config(model=path, part="block3", out=tmp_path / "block.png"))
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FlagError, match=r"begins with --part=blok3/. Names begin with .*block3"):
        steps(path, "blok3")
