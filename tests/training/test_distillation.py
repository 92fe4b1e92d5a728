"""Distillation: the divergence against scipy, a step by hand, and a teacher that is not kept."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import ab_jax as ab
from ab_jax.data import Images
from ab_jax.data.augment import augment
from ab_jax.training.distillation import digest, divergence
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.state import TrainState
from ab_jax.training.train_step import Preprocessing, make_train_step

BATCH, RATE, SHARE = 16, 0.1, 0.75


def test_the_divergence_is_that_of_scipy(rng: np.random.Generator) -> None:
    teacher, student = (rng.normal(scale=4, size=(7, 5)).astype(np.float32) for _ in range(2))
    p, q = (scipy.special.softmax(np.float64(x), axis=1) for x in (teacher, student))
    found = divergence(jnp.asarray(teacher), jnp.asarray(student))
    assert float(found) == pytest.approx(np.mean(scipy.stats.entropy(p, q, axis=1)), rel=1e-5)
    assert float(divergence(jnp.asarray(teacher), jnp.asarray(teacher + 3))) == pytest.approx(
        0, abs=1e-6
    )
    # Its gradient is that of softmax, and none reaches the teacher.
    to_teacher, to_student = jax.grad(divergence, (0, 1))(
        jnp.asarray(teacher), jnp.asarray(student)
    )
    np.testing.assert_allclose(to_student, (q - p) / len(p), atol=1e-6)
    assert not np.any(to_teacher)


@pytest.mark.parametrize(("mode", "count"), [("pmap", 1), ("shard_map", 2)])
def test_a_step_learns_from_a_teacher_that_sees_the_same_images(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    images: Images,
    variables: dict[str, Any],
    forward: Callable[..., Any],
    binarize: Callable[[Any], Any],
    mode: Mode,
    count: int,
) -> None:
    params, seed = variables["params"], int(rng.integers(2**31))
    teacher = jax.tree.map(
        lambda x: (x * rng.uniform(0.7, 1.3, x.shape)).astype(x.dtype), variables
    )
    optimizer = optax.sgd(RATE)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={"batch_stats": variables["batch_stats"]},
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    step = make_train_step(
        model,
        optimizer,
        rules=rules,
        estimator=ab.straight_through,
        alpha=optax.constant_schedule(1.0),
        preprocessing=preprocessing,
        teacher_share=SHARE,
    )
    parallel = Parallel(mode, tuple(devices[:count]))
    chosen = rng.permutation(len(images.labels))[:BATCH].astype(np.int32)
    after, metrics = parallel.wrap(step, sharded=[False, False, False, True, True, False])(
        parallel.replicate(state),
        *parallel.replicate((images.images, images.labels)),
        *parallel.shard((chosen, np.arange(BATCH, dtype=np.int32))),
        parallel.replicate(teacher),
    )
    after, metrics = parallel.unreplicate((after, metrics))

    key = jax.random.fold_in(jax.random.key(seed), 0)
    seen = augment(key, images.images[chosen], jnp.arange(BATCH), pad=1, flip=True)
    taught, _ = forward(teacher["params"], seen, teacher["batch_stats"])
    p = scipy.special.softmax(np.float64(taught), axis=1).astype(np.float32)

    def loss_at(params: Any) -> jax.Array:
        logits, _ = forward(params, seen)
        log_q = jax.nn.log_softmax(logits)
        of_labels = -jnp.mean(log_q[np.arange(BATCH), images.labels[chosen]])
        of_teacher = jnp.mean(jnp.sum(p * (np.log(p) - log_q), axis=1))
        return SHARE * of_teacher + (1 - SHARE) * of_labels

    loss, grads = jax.jit(jax.value_and_grad(loss_at))(binarize(params))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-4)
    jax.tree.map(
        lambda new, w, g: np.testing.assert_allclose(new, w - RATE * g, rtol=1e-4, atol=1e-5),
        *(after.params, params, dict(grads)),
    )


def test_a_digest_tells_teachers_apart(variables: dict[str, Any]) -> None:
    again = jax.tree.map(jnp.asarray, variables)
    assert digest(again) == digest(variables)
    again["params"]["head"]["bias"] = -again["params"]["head"]["bias"]
    assert digest(again) != digest(variables)
    renamed = {**variables, "params": {**variables["params"]}}
    renamed["params"]["other"] = renamed["params"].pop("head")
    assert digest(renamed) != digest(variables)
