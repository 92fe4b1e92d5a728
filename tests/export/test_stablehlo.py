"""A network as a StableHLO program: our integers inside, and the same numbers elsewhere."""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.stablehlo import to_stablehlo
from ab_jax.linen import RANGES, WithQuantizedInputs, plain_convolutions
from ab_jax.models.mobilenet import MobileNet
from ab_jax.products import ActivationRules
from tests.export.small_networks import make

RULES = ab.Rules(
    [
        (r"(stem|head)/kernel", ab.Uniform(bits=8)),
        (r"(.*/)?depthwise/kernel", ab.Ternary()),
        (r"(.*/)?kernel", ab.Uniform(bits=4)),
        (r".*", None),
    ]
)
INPUTS = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, signed=True)),
        (".*", ActivationQuantizer(bits=8, signed=False)),
    ]
)
SHAPE = (16, 16, 3)

# Another process, which has JAX alone.
ELSEWHERE = """
import sys
import jax
import numpy as np
inputs = np.load(sys.argv[2])
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.savez(sys.argv[3], **{name: program.call(images) for name, images in inputs.items()})
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"ab_jax", "flax", "optax", "orbax"}, loaded
"""


@pytest.fixture
def network(rng: np.random.Generator) -> tuple[WithQuantizedInputs, dict[str, Any]]:
    """A small MobileNet with 8-bit activations, of random parameters, statistics and ranges."""
    plain = MobileNet(num_classes=5, width=1 / 16, stem=32, cpu_convolutions=False)
    model = WithQuantizedInputs(plain, INPUTS)
    images = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes.pop("params")
    )
    rest = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), shapes)
    assert set(rest) == {"batch_stats", RANGES}
    return model, {"params": ab.quantize(params, RULES), **rest}


def apply_to(model: WithQuantizedInputs) -> Any:
    """From uint8 images, which are normalized inside."""
    return lambda variables, images: model.apply(
        variables, images.astype(jnp.float32) / 127.5 - 1, train=False
    )


def integers_in(module: str) -> Iterator[bytes]:
    """The int8 constants of a module's text, by their bytes."""
    for value in re.findall(r"stablehlo\.constant dense<(.*?)> : tensor<[\dx]+xi8>", module):
        if value.startswith('"0x'):
            yield bytes.fromhex(value.strip('"')[2:])
        else:
            yield np.array(re.findall(r"-?\d+", value), np.int8).tobytes()


def test_the_integers_inside_are_ours(network: tuple[WithQuantizedInputs, dict[str, Any]]) -> None:
    model, variables = network
    data = to_stablehlo(apply_to(model), variables, SHAPE, dtype=jnp.uint8)
    module = str(jax.export.deserialize(bytearray(data)).mlir_module())
    found = list(integers_in(module))
    leaves = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, ab.Quantized))
    codes = [np.asarray(leaf.codes) for leaf in leaves if isinstance(leaf, ab.Quantized)]
    assert len(codes) == 28
    assert sorted(found) == sorted(one.tobytes() for one in codes)
    # Beside them a scale a channel, norms and ranges, and the program itself.
    rest = sum(4 * leaf.size for leaf in jax.tree.leaves(variables) if leaf.dtype != jnp.int8)
    assert len(data) < sum(one.size for one in codes) + rest + 100_000


@pytest.mark.long
def test_another_process_gets_the_same_logits_of_any_number_of_images(
    network: tuple[WithQuantizedInputs, dict[str, Any]], rng: np.random.Generator, tmp_path: Path
) -> None:
    model, variables = network
    apply = apply_to(model)
    data = to_stablehlo(apply, variables, SHAPE, dtype=jnp.uint8, platforms=["cpu", "tpu"])
    (tmp_path / "network").write_bytes(data)
    inputs = {
        name: rng.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
        for name, count in {"one": 1, "seven": 7}.items()
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    paths = [str(tmp_path / name) for name in ("network", "inputs.npz", "outputs.npz")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, cwd=tmp_path)
    outputs, apart = np.load(tmp_path / "outputs.npz"), []
    for name, images in inputs.items():
        expected = np.asarray(jax.jit(apply)(ab.dequantize(variables), images))
        assert outputs[name].shape == expected.shape == (len(images), 5)
        apart.append(np.abs(outputs[name] - expected) / np.max(np.abs(expected)))
    # A float in its last bit, and so, seldom, an activation in its last step.
    assert np.max(np.concatenate(apart)) < 0.05
    assert np.median(np.concatenate(apart)) < 1e-5


@pytest.mark.long
def test_activations_of_one_bit_take_any_number_of_images(rng: np.random.Generator) -> None:
    model, variables, shape = make("binarynet, sign", rng)
    apply = functools.partial(plain_convolutions(model).apply, train=False)
    program = jax.export.deserialize(bytearray(to_stablehlo(apply, variables, shape)))
    values, apart = ab.dequantize(variables), []
    for count in (1, 6):
        images = rng.normal(size=(count, *shape)).astype(np.float32)
        found, expected = program.call(images), model.apply(values, images, train=False)
        apart.append(np.abs(found - expected) / np.ptp(expected))
    # Seldom a sum next to zero has another sign, which all logits of its image show.
    assert np.median(np.concatenate(apart)) < 1e-5


def test_what_cannot_be_exported_is_refused(
    network: tuple[WithQuantizedInputs, dict[str, Any]],
) -> None:
    model, variables = network
    with pytest.raises(ValueError, match=r"no quantized leaf.*ab\.quantize"):
        to_stablehlo(apply_to(model), ab.dequantize(variables), SHAPE)
    with pytest.raises(ValueError, match=r"'gpu' is no platform\. Choose of cpu, cuda, rocm, tpu"):
        to_stablehlo(apply_to(model), variables, SHAPE, platforms=["cpu", "gpu"])


def test_codes_with_a_scale_for_each_bit_run_too(rng: np.random.Generator) -> None:
    kernel = ab.LeastSquaresBinary(bits=3).quantize(rng.normal(size=(2, 5)).astype(np.float32))
    data = to_stablehlo(
        lambda variables, images: jnp.tensordot(images, variables["kernel"], 1),
        {"kernel": kernel},
        (1, 1, 2),
        platforms=["cpu"],
    )
    # One channel at a time, so that the values of the codes come out as they are.
    images = np.eye(2, dtype=np.float32).reshape(2, 1, 1, 2)
    found = jax.export.deserialize(bytearray(data)).call(images)
    np.testing.assert_array_equal(found.reshape(2, 5), kernel.dequantize())


# Other inputs than images

TOKENS, FEATURES = 11, 6


def read_text(variables: dict[str, Any], text: dict[str, jax.Array], weights: jax.Array) -> Any:
    """Two logits for each token, [batch, length, 2], and their mean where the mask says so."""
    embedded = variables["embedding"][text["tokens"]] + variables["bias"][None, None]
    logits = jnp.einsum("blf,f,fc->blc", embedded, weights, variables["kernel"])
    mask = jnp.swapaxes(text["mask"], 0, 1)[..., None]
    return logits, {"mean": jnp.sum(logits * mask, 1) / jnp.sum(mask, 1)}


def text_of(batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    mask = rng.integers(0, 2, (5, batch)).astype(bool)
    mask[0] = True
    return {"tokens": rng.integers(0, TOKENS, (batch, 5)), "mask": mask}  # the mask: length first


@pytest.fixture
def text_variables(rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "embedding": normal(TOKENS, FEATURES),
        "kernel": normal(FEATURES, 2),
        "bias": normal(FEATURES),
    }
    rules = [("embedding", ab.LeastSquaresBinary(bits=2, axis=0)), ("kernel", ab.Ternary())]
    return ab.quantize(params, ab.Rules([*rules, (".*", None)]))


def test_trees_of_inputs_with_a_batch_where_it_is_said(
    text_variables: dict[str, Any], rng: np.random.Generator
) -> None:
    weights = rng.normal(size=FEATURES).astype(np.float32)
    data = to_stablehlo(
        read_text,
        text_variables,
        inputs=(text_of(2, rng), jax.ShapeDtypeStruct((FEATURES,), jnp.float32)),
        batch_axes=({"tokens": 0, "mask": -1}, None),
        platforms=["cpu"],
    )
    program = jax.export.deserialize(bytearray(data))
    assert len(list(integers_in(str(program.mlir_module())))) == 2
    for batch in (1, 2, 7):
        text = text_of(batch, rng)
        logits, rest = program.call(text, weights)
        assert logits.shape == (batch, 5, 2)
        expected, others = read_text(ab.dequantize(text_variables), text, weights)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rest["mean"], others["mean"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"args\[1\]"):  # no batch was said there
        program.call(text_of(2, rng), np.ones((2, FEATURES), np.float32))


def test_inputs_without_a_batch_and_codes_among_them(rng: np.random.Generator) -> None:
    kernel = ab.Uniform(bits=4, scale="absmax").quantize(rng.normal(size=(3, 2)).astype("float32"))
    other = ab.Uniform(bits=4, scale="absmax").quantize(rng.normal(size=(2, 5)).astype("float32"))
    data = to_stablehlo(
        lambda kernel, codes, x: x @ kernel @ codes.dequantize(),
        kernel,
        inputs=[other, jnp.zeros((1, 3))],
        batch_axes=[None, 0],
        platforms=["cpu"],
    )
    x = rng.normal(size=(4, 3)).astype(np.float32)
    found = jax.export.deserialize(bytearray(data)).call(other, x)
    expected = x @ kernel.dequantize() @ other.dequantize()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_images_are_given_as_ever(rng: np.random.Generator) -> None:
    kernel = ab.Binary().quantize(rng.normal(size=(2, 5)).astype(np.float32))
    images = rng.normal(size=(3, 1, 1, 2)).astype(np.float32)

    def apply(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.tensordot(images, kernel, 1)

    by_name = to_stablehlo(apply, kernel, image_shape=(1, 1, 2), platforms=["cpu"])
    as_input = to_stablehlo(apply, kernel, inputs=(images,), platforms=["cpu"])
    expected = jnp.tensordot(images, kernel.dequantize(), 1)
    for data in (by_name, as_input):
        found = jax.export.deserialize(bytearray(data)).call(images)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Give one of image_shape=\(H, W, C\).*and inputs="),
        ({"image_shape": (1, 1, 3), "inputs": (X,)}, "Give one of image_shape"),
        ({"inputs": (X,), "dtype": jnp.uint8}, "dtype= is that of images"),
        ({"image_shape": X}, r"image_shape is a ndarray, not the sizes .* inputs="),
        ({"image_shape": (0, 1, 3)}, r"sizes above 0, not \(0, 1, 3\)"),
        ({"inputs": X}, r"inputs is a ndarray, not a tuple.*inputs=\(x,\)"),
        (
            {"inputs": (X, {"flag": True})},
            r"inputs\[1\]\['flag'\] is a bool, not .*partial",
        ),
        (
            {"inputs": (X, np.float32(1))},
            r"inputs\[1\] has the shape \(\), and no axis 0.*None",
        ),
        ({"inputs": (X,), "batch_axes": 2}, r"inputs\[0\] has the shape \(2, 3\), and no axis 2"),
        ({"inputs": (X,), "batch_axes": 0.0}, r"batch axis of inputs\[0\] is 0.0, not an integer"),
        ({"inputs": (X,), "batch_axes": (0, 1)}, r"batch_axes=\(0, 1\) does not fit the 1 inputs"),
        (
            {"inputs": (X, X.T)},
            r"inputs\[0\] has a batch of 2 and inputs\[1\] one of 3.*None in batch_axes=",
        ),
    ],
)
def test_inputs_that_make_no_program_are_refused(given: dict[str, Any], message: str) -> None:
    kernel = ab.Binary().quantize(np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match=message):
        to_stablehlo(lambda kernel, x, *rest: x @ kernel, kernel, **given)
