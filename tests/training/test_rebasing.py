"""Re-based batch norm: the same function, whose running statistics are those of the images."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import resnet20
from ab_jax.training.rebasing import rebased


class Norms(nn.Module):
    """Two norms, of which the second has what `fields` say."""

    fields: Any = None

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.BatchNorm(not train, name="first")(x)
        return nn.BatchNorm(not train, name="second", **(self.fields or {}))(nn.relu(x))


def trained(rng: np.random.Generator, model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Variables with norms that differ from each other, as those of trained networks do."""
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        match path[-1].key:
            case "kernel":
                return leaf
            case "scale" | "var":
                return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, dict(variables))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: resnet20(num_classes=5, width=0.25), id="resnet20"),
        pytest.param(
            lambda: MobileNet(5, width=1 / 16, stem=32), id="mobilenet", marks=pytest.mark.long
        ),
    ],
)
def test_the_function_stays_and_a_batch_of_these_images_agrees_with_it(
    rng: np.random.Generator, make: Callable[[], nn.Module]
) -> None:
    model = make().clone(batch_stats_momentum=0.0)
    variables = trained(rng, model, (8, 8, 3))
    images = jnp.asarray(rng.normal(1, 0.5, size=(20, 8, 8, 3)), jnp.float32)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    found = rebased(model, variables, [images[:8], images[8:16], images[16:]], train=False)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    was, is_ = apply(variables, images), apply(found, images)
    size = float(jnp.std(was))
    np.testing.assert_allclose(is_, was, atol=1e-4 * size)
    # In training, where norms take the statistics of the batch, it is the same function now.
    training = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, measured = training(found, images)
    before, _ = training(variables, images)
    np.testing.assert_allclose(logits, was, atol=1e-3 * size)
    assert np.abs(before - was).max() > 0.05 * size
    jax.tree.map(
        lambda own, of_batch: np.testing.assert_allclose(own, of_batch, rtol=1e-3, atol=1e-4),
        *(found["batch_stats"], measured["batch_stats"]),
    )
    # Kernels, and what is no norm, are as they were.
    kernel = [n["params"]["head"]["kernel"] for n in (found, variables)]
    np.testing.assert_array_equal(*kernel)


def test_a_norm_is_that_of_the_formula(rng: np.random.Generator) -> None:
    model = Norms({"axis": 1, "epsilon": 0.25})
    variables = trained(rng, model, (4, 6))
    x = rng.normal(2, 3, size=(9, 4, 6)).astype(np.float32)
    found = rebased(model, variables, [jnp.asarray(x[:5]), jnp.asarray(x[5:])])
    old = {**variables["params"]["first"], **variables["batch_stats"]["first"]}
    old = jax.tree.map(np.float64, old)
    gain = old["scale"] / np.sqrt(old["var"] + 1e-5)
    mean, variance = np.float64(x).mean((0, 1)), np.float64(x).var((0, 1))
    new = {**found["params"]["first"], **found["batch_stats"]["first"]}
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], variance, rtol=1e-5)
    np.testing.assert_allclose(new["scale"], gain * np.sqrt(variance + 1e-5), rtol=1e-5)
    bias = old["bias"] + (mean - old["mean"]) * gain
    np.testing.assert_allclose(new["bias"], bias, rtol=1e-5, atol=1e-5)
    hidden = np.maximum((np.float64(x) - old["mean"]) * gain + old["bias"], 0)
    np.testing.assert_allclose(found["batch_stats"]["second"]["var"], hidden.var((0, 2)), rtol=1e-4)
    np.testing.assert_allclose(
        model.apply(found, x), model.apply(variables, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_scale": False}, "The batch norm second has no scale, .*Omit --rebase_norm"),
        ({"use_bias": False}, "The batch norm second has no bias, .*Omit --rebase_norm"),
    ],
)
def test_a_norm_that_cannot_be_rebased_is_named(fields: dict[str, Any], message: str) -> None:
    model = Norms(fields)
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=message):
        rebased(model, model.init(jax.random.key(0), x), [x])


def test_a_network_without_norms_and_no_images_are_refused() -> None:
    model, x = nn.Dense(2), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"no batch norm to re-base\. Omit --rebase_norm"):
        rebased(model, variables, [x])
    with pytest.raises(ValueError, match="no images to re-base batch norm on"):
        rebased(model, variables, [])


def test_a_norm_within_a_transformation_is_refused() -> None:
    class Checkpointed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.remat(Norms)(name="inner")(x)

    model, x = Checkpointed(), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"within a transformation .*Omit --rebase_norm"):
        rebased(model, model.init(jax.random.key(0), x), [x])
