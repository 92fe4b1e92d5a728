"""Batch norm over groups of devices: each group as a batch of its own, one set of statistics."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.data import Images
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import resnet20
from ab_jax.training.parallel import AXIS, Mode, Parallel
from ab_jax.training.state import TrainState
from ab_jax.training.train_step import Preprocessing, make_batch_stats_step, make_train_step
from tests.training.one_of_several import Net, last_gradient

BATCH = 16


def state_of(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    params = jax.tree.map(jnp.asarray, variables["params"])
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={"batch_stats": variables["batch_stats"]},
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(0)),
    )


@pytest.mark.parametrize(
    ("n", "k"),
    [(4, 2), *(pytest.param(*of, marks=pytest.mark.long) for of in ((8, 4), (4, 1), (2, 2)))],
)
@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.long)])
def test_each_group_is_a_batch_of_its_own(
    rng: np.random.Generator,
    devices: list[jax.Device],
    variables: dict[str, Any],
    images: Images,
    forward: Callable[..., Any],
    mode: Mode,
    n: int,
    k: int,
) -> None:
    indices = rng.permutation(len(images))[:BATCH].astype(np.int32)
    groups = np.split(indices, n // k)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        """Written out: the mean loss of the groups, each normalized by itself."""
        losses, measured = [], []
        for group in groups:
            logits, statistics = forward(params, images.images[group])
            labels = images.labels[group]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            losses.append(-jnp.mean(chosen))
            measured.append(statistics)
        return jnp.mean(jnp.stack(losses)), measured

    (loss, measured), gradient = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    mean = {name: np.mean([group[name] for group in measured], axis=0) for name in ("mean", "var")}
    before = variables["batch_stats"]["norm"]

    parallel = Parallel(mode, tuple(devices[:n]), norm_group=k)
    net = Net(axis_index_groups=parallel.norm_groups)
    optimizer = optax.chain(last_gradient(), optax.sgd(0.1))
    preprocessing = Preprocessing((0.45,), (0.25,))
    step = parallel.wrap(
        make_train_step(
            net,
            optimizer,
            rules=ab.Rules([(r".*", None)]),
            estimator=ab.full_precision,
            alpha=optax.constant_schedule(0.0),
            preprocessing=preprocessing,
        ),
        [False, False, False, True, True],
    )
    placed = parallel.replicate((images.images, images.labels))
    places = parallel.shard(np.arange(BATCH, dtype=np.int32))
    on_devices, metrics = step(
        parallel.replicate(state_of(variables, optimizer)), *placed, parallel.shard(indices), places
    )
    # Equal on all devices, to the bit, though their groups have seen different statistics.
    for leaf in jax.tree.leaves((on_devices, metrics)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == n - 1
        for other in others:
            np.testing.assert_array_equal(other, first)

    state = parallel.unreplicate(on_devices)
    assert float(parallel.unreplicate(metrics)["loss"]) == pytest.approx(float(loss), rel=1e-4)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
        state.opt_state[0],
        gradient,
    )
    after = state.model_state["batch_stats"]["norm"]
    for name in ("mean", "var"):
        expected = 0.9 * before[name] + 0.1 * mean[name]
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-5)

    measure = parallel.wrap(
        make_batch_stats_step(net, preprocessing), [False, False, False, False, True]
    )
    network = parallel.replicate(
        (state_of(variables, optimizer).params, state.model_state, jnp.float32(1))
    )
    fresh = parallel.unreplicate(measure(*network, placed[0], parallel.shard(indices)))
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            fresh["batch_stats"]["norm"][name], mean[name], rtol=0, atol=1e-5
        )
    # The variance within groups misses just that between them.
    whole = forward(variables["params"], images.images[indices])[1]
    between = np.var([group["mean"] for group in measured], axis=0)
    np.testing.assert_allclose(whole["var"], mean["var"] + between, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda **fields: BinaryNet(width=1 / 64, **fields),
        lambda **fields: MobileNet(width=1 / 16, stem=32, **fields),
        lambda **fields: resnet20(width=1 / 4, **fields),
    ],
    ids=["binarynet", "mobilenet", "resnet"],
)
def test_our_networks_hand_the_groups_to_every_norm(
    devices: list[jax.Device], make: Callable[..., Any]
) -> None:
    parallel = Parallel("shard_map", tuple(devices[:4]), norm_group=2)
    groups = parallel.norm_groups
    assert groups == ((0, 1), (2, 3))
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    model = make(axis_name=AXIS, axis_index_groups=groups)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    seen: set[Any] = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            seen.add((context.module.axis_name, context.module.axis_index_groups))
        return call(*args, **kwargs)

    def traced(variables: Any, images: jax.Array) -> jax.Array:
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jax.lax.pmean(jnp.mean(logits), AXIS)

    with nn.intercept_methods(note):
        jax.eval_shape(parallel.wrap(traced, [False, True]), variables, images)
    assert seen == {(AXIS, groups)}
