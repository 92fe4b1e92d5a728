"""Codes in checkpoints that are not ours: Flax's state dicts and msgpack, and Orbax."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import ab_jax as ab
from ab_jax import nnx as ab_nnx

ROOT = Path(__file__).parents[1]
RULES = ab.Rules(
    [
        ("layers/0/.*", ab.Uniform(bits=3, symmetric=False, scale="absmax")),
        ("layers/1/.*", ab.LeastSquaresBinary(bits=2)),
        ("layers/2/.*", ab.Binary()),
        ("half", ab.Uniform(bits=4, scale="absmax")),
        (".*", None),
    ]
)


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layers = [{"kernel": normal(6, 4)} for _ in range(3)]
    return {"layers": layers, "half": normal(6, 4).astype(jnp.bfloat16), "bias": normal(4)}


@pytest.fixture
def codes(params: dict[str, Any]) -> dict[str, Any]:
    return ab.quantize(params, RULES)


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def like(codes: Any) -> Any:
    """Shapes, dtypes and what is static; no number."""
    return jax.eval_shape(lambda: codes)


def test_flax_state_dicts_hold_arrays_by_name(codes):
    state = serialization.to_state_dict(codes)
    layers = state["layers"]
    assert layers["0"]["kernel"].keys() == {"codes", "scale", "zero_point"}
    assert layers["1"]["kernel"].keys() == layers["2"]["kernel"].keys() == {"codes", "scale"}
    np.testing.assert_array_equal(
        layers["1"]["kernel"]["scale"], codes["layers"][1]["kernel"].scale
    )
    for target in (codes, like(codes)):
        assert_same_bits(serialization.from_state_dict(target, state), codes)


def test_flax_bytes_are_codes_again(codes):
    data = serialization.to_bytes(codes)
    for target in (codes, like(codes)):
        found = serialization.from_bytes(target, data)
        assert_same_bits(found, codes)
        assert_same_bits(ab.dequantize(found), ab.dequantize(codes))
    # A byte a code: they were not turned into floats.
    state = serialization.msgpack_restore(data)
    assert state["layers"]["1"]["kernel"]["codes"].dtype == np.int8


def test_orbax_gives_codes_for_a_target_and_arrays_without(codes, tmp_path: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "codes", codes)
        checkpointer.wait_until_finished()
        for target in (codes, like(codes)):
            assert_same_bits(checkpointer.restore(tmp_path / "codes", target), codes)
        arrays = checkpointer.restore(tmp_path / "codes")
    found = arrays["layers"][0]["kernel"]
    assert found.keys() == {"codes", "scale", "zero_point"}
    np.testing.assert_array_equal(found["codes"], codes["layers"][0]["kernel"].codes, strict=True)
    # Lists come back as lists, which are no state dict of Flax's.
    arrays["layers"] = {str(i): layer for i, layer in enumerate(arrays["layers"])}
    assert_same_bits(serialization.from_state_dict(like(codes), arrays), codes)


def test_codes_of_nnx_modules_travel_too(tmp_path: Path):
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    rules = ab.Rules([("kernel", ab.LeastSquaresBinary(bits=2)), (".*", None)])
    state = ab_nnx.quantize(model, rules)
    plain = nnx.to_pure_dict(state)
    found = serialization.from_bytes(like(plain), serialization.to_bytes(plain))
    assert_same_bits(found, plain)
    nnx.replace_by_pure_dict(state, found)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "codes", state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "codes", like(state))
    deployed = ab_nnx.with_params(model, state)
    np.testing.assert_array_equal(deployed.kernel[...], plain["kernel"].dequantize())


def test_importing_the_linen_room_is_enough(codes, tmp_path: Path):
    (tmp_path / "data").write_bytes(serialization.to_bytes(codes["layers"][0]))
    command = (
        "import pathlib, sys, flax, numpy, ab_jax as ab, ab_jax.linen\n"
        "w = numpy.zeros((6, 4), numpy.float32)\n"
        "like = ab.Uniform(bits=3, symmetric=False, scale='absmax').quantize(w)\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "found = flax.serialization.from_bytes({'kernel': like}, data)['kernel']\n"
        "print(found.codes.tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "data")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == codes["layers"][0]["kernel"].codes.tolist()


def test_a_target_that_does_not_fit_is_refused(codes):
    data = serialization.to_bytes(codes)

    def restore(layer: int, **changed: Any) -> None:
        layers = list(codes["layers"])
        kernel = layers[layer]["kernel"]
        layers[layer] = {"kernel": dataclasses.replace(kernel, **changed)}
        serialization.from_bytes({**codes, "layers": layers}, data)

    with pytest.raises(ValueError, match=r"layers/0/kernel has codes, scale, zero_point where the"):
        restore(0, zero_point=None)
    with pytest.raises(ValueError, match=r"layers/0/kernel has codes of more .* 2 bits.*rules"):
        restore(0, bits=2)
    with pytest.raises(ValueError, match=r"scale of \S*1/kernel would be float32\[1, 4, 2\]"):
        restore(1, scale=jnp.ones((1, 4, 3)), bits=3)
    with pytest.raises(ValueError, match=r"codes of \S*2/kernel would be int8\[6, 4\]"):
        restore(2, codes=jnp.ones((4, 6), jnp.int8))
    with pytest.raises(ValueError, match=r"half has codes in the target, but a ndarray is given"):
        serialization.from_state_dict(
            codes, {**serialization.to_state_dict(codes), "half": np.ones((6, 4))}
        )
