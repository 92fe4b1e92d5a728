"""Each framework's guide, cut to a few steps: what it trains, what it exports, what it answers."""

from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax.export.dictionaries import to_dictionaries
from ab_jax.export.packed import read_packed
from examples import equinox_digits as equinox
from examples import haiku_digits as haiku
from examples import handwritten_digits as digits
from examples import linen_digits as linen
from examples import nnx_digits as nnx_guide
from tests.fast_compilation import fast_compilation

__all__ = ["fast_compilation"]
pytestmark = pytest.mark.usefixtures("fast_compilation")


def logits_linen(params: Any, variables: Any, images: jax.Array) -> jax.Array:
    collections = {"params": params, "batch_stats": variables["batch_stats"]}
    return linen.CNN().apply(collections, images)


def logits_nnx(params: Any, variables: Any, images: jax.Array) -> jax.Array:
    model = nnx_guide.CNN(nnx.Rngs(0))
    nnx.update(model, params)
    for name, value in variables["batch_stats"]["norm"].items():
        getattr(model.norm, name).set_value(value)
    model.eval()
    return model(images)


def logits_equinox(params: Any, variables: Any, images: jax.Array) -> jax.Array:
    _, static = eqx.partition(equinox.CNN(jax.random.key(0)), eqx.is_inexact_array)
    return jax.vmap(eqx.combine(params, static))(images)


def logits_haiku(params: Any, variables: Any, images: jax.Array) -> jax.Array:
    return hk.without_apply_rng(hk.transform(lambda x: haiku.CNN()(x))).apply(params, images)


GUIDES = {
    "linen": (linen, logits_linen, "Conv_0/kernel", (1, 1, 1, 32)),
    "nnx": (nnx_guide, logits_nnx, "conv/kernel", (1, 1, 1, 32)),
    "equinox": (equinox, logits_equinox, "conv/weight", (32, 1, 1, 1)),
    "haiku": (haiku, logits_haiku, "cnn/~/conv/w", (1, 1, 1, 32)),
}


def at(tree: dict[str, Any], path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.long
@pytest.mark.parametrize("name", GUIDES)
def test_guide(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide, logits, path, scale_shape = GUIDES[name]
    params, codes, accuracy = guide.run(float_steps=40, steps=50, out=tmp_path)

    assert path in capsys.readouterr().out  # the coverage report
    kernel = at(to_dictionaries(codes), path)
    assert set(np.unique(kernel.codes)) == {-1, 0, 1}
    assert kernel.scale.shape == scale_shape

    assert_same_bits(ab.blend(params, guide.RULES, 0.0), params)
    deployed = ab.blend(params, guide.RULES, 1.0)
    assert_same_bits(deployed, ab.dequantize(codes))

    network = read_packed(tmp_path / f"{name}.safetensors")
    assert_same_bits(network.variables["params"], to_dictionaries(codes))

    # 90 steps reach 90 % and more; chance is 10 %.
    assert accuracy > 0.75
    image = digits.load()[1][0][:1]
    image = image.transpose(0, 3, 1, 2) if name == "equinox" else image
    program = jax.export.deserialize((tmp_path / f"{name}.stablehlo").read_bytes())
    answer = jax.jit(logits)(deployed, network.variables, image)
    np.testing.assert_allclose(program.call(image), answer, rtol=1e-3, atol=1e-3)


def test_batches_are_drawn_from_the_training_part() -> None:
    train, test = digits.load()
    assert (len(train[1]), len(test[1])) == (1397, 400)
    rows = {image.tobytes() for image in np.asarray(train[0])}
    drawn = list(digits.batches(train, 3, seed=1))
    assert all(image.tobytes() in rows for image in np.asarray(drawn[2][0]))
    again = list(digits.batches(train, 3, seed=1))
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jnp.any(drawn[0][0] != drawn[1][0])
