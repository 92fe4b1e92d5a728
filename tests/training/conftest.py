"""A network, images and rules small enough to compile and train in a second.

The network has what a step must handle: a convolution, batch norm, a ReLU and a dense layer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from jax.typing import ArrayLike

import ab_jax as ab
from ab_jax.data import Images
from ab_jax.training.parallel import AXIS
from ab_jax.training.train_step import Preprocessing

SIZE, CLASSES = 4, 5  # pixels, classes
MEAN, STD = (0.45,), (0.25,)


class TinyNet(nn.Module):
    """conv - norm - relu - dense."""

    features: int = 3
    norm: bool = True
    axis_name: str | None = AXIS
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: Array, *, train: bool, alpha: ArrayLike = 1.0) -> Array:
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(images)
        if self.norm:
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=self.batch_stats_momentum,
                axis_name=self.axis_name,
                name="norm",
            )(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES, name="head")(x)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that several tests compile are compiled once: compiling takes most of the time."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def rules() -> ab.Rules:
    """One bit for both kernels."""
    return ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)])


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return Preprocessing(mean=MEAN, std=STD, pad=1, flip=True)


@pytest.fixture(scope="session")
def model() -> TinyNet:
    return TinyNet()


@pytest.fixture(scope="session")
def make_images() -> Callable[[np.random.Generator, int], Images]:
    """Images whose class shows in the brightness of two quadrants: something to learn."""

    def make(rng: np.random.Generator, n: int) -> Images:
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        images = rng.integers(0, 100, (n, SIZE, SIZE, 1))
        images[:, :2, :2] += 150 * (labels % 2)[:, None, None, None]
        images[:, 2:, 2:] += 75 * (labels // 2)[:, None, None, None]
        return Images(images.astype(np.uint8), labels)

    return make


@pytest.fixture
def images(rng: np.random.Generator, make_images: Callable[..., Images]) -> Images:
    """37 images: a number that neither batches nor devices divide."""
    return make_images(rng, 37)


@pytest.fixture
def variables(rng: np.random.Generator) -> dict[str, Any]:
    """Random weights and statistics of the model, as numpy arrays."""
    shapes = jax.eval_shape(
        lambda: TinyNet().init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)), train=False)
    )

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        low, high = (0.5, 2.0) if path[-1].key in ("var", "scale") else (-0.7, 0.7)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


# The same things by hand


@pytest.fixture(scope="session")
def forward() -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The network written out: `(params, images, stats=None) -> logits, statistics of the batch`.

    With `stats` as at test time, without them on the statistics of this batch; images are uint8.
    """

    def forward(
        params: Any, images: ArrayLike, stats: Any = None
    ) -> tuple[Array, dict[str, Array]]:
        x = (jnp.asarray(images, jnp.float32) / 255 - MEAN[0]) / STD[0]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [(i, j) for i in range(3) for j in range(3)]
        kernel = params["conv"]["kernel"]
        x = sum(x[:, i : i + SIZE, j : j + SIZE] @ kernel[i, j] for i, j in taps)
        x = x.reshape(-1, x.shape[-1])
        measured = {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}
        if "norm" in params:
            used = measured if stats is None else stats["norm"]
            x = (x - used["mean"][None]) / jnp.sqrt(used["var"] + 1e-5)[None]
            x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
        x = jnp.maximum(x, 0).reshape(len(images), -1)
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], measured

    return forward


@pytest.fixture(scope="session")
def binarize() -> Callable[[Any], Any]:
    """The parameters with each kernel at plus or minus the mean magnitude of its channel."""

    def value(path: Any, w: ArrayLike) -> ArrayLike:
        if path[-1].key != "kernel":
            return w
        scale = jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True)
        return jnp.where(w >= 0, scale, -scale)

    return lambda params: jax.tree.map_with_path(value, params)


@pytest.fixture(scope="session")
def loss_and_accuracy() -> Callable[[ArrayLike, np.ndarray], tuple[float, float]]:
    """Mean cross-entropy and accuracy of logits, in float64."""

    def measure(logits: ArrayLike, labels: np.ndarray) -> tuple[float, float]:
        logits = np.asarray(logits, np.float64)
        chosen = logits[np.arange(len(labels)), labels]
        losses = np.log(np.exp(logits).sum(axis=1)) - chosen
        return losses.mean(), (logits.argmax(axis=1) == labels).mean()

    return measure
