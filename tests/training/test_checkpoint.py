"""Checkpoints: what is read back is what was written, bit for bit."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.state import TrainState, create_state

IMAGE_SHAPE = (4, 4, 1)
OPTIMIZER = make_optimizer("sgd", optax.constant_schedule(0.1), accumulate=2, clip_norm=1.0)
# Bit patterns that arithmetic or a text format would lose.
ODD_NUMBERS = (-0.0, 1e-45, 1e30, 1 / 3)


def fresh(model: nn.Module, step: int = 0, seed: int = 0) -> TrainState:
    state = create_state(model, OPTIMIZER, IMAGE_SHAPE, seed)
    return TrainState(**{**vars(state), "step": jnp.int32(step)})


def used(model: nn.Module, rng: np.random.Generator, step: int) -> TrainState:
    """A state whose every number is random, counters included."""

    def draw(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            values = rng.normal(size=leaf.shape).astype(leaf.dtype)
            values.flat[: len(ODD_NUMBERS)] = ODD_NUMBERS[: values.size]
        else:
            values = rng.integers(0, 2**31 - 1, leaf.shape).astype(leaf.dtype)
        return jnp.asarray(values)

    return TrainState(**{**vars(jax.tree.map(draw, fresh(model))), "step": jnp.int32(step)})


def bits(tree: Any) -> Any:
    """Structure, dtypes and bytes: -0.0 is not 0.0 here."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def test_a_state_comes_back_bit_for_bit(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    state = used(model, rng, step=12)
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(state)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes >= {np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)}
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 12
        assert bits(checkpoints.restore(fresh(model, seed=1))) == bits(state)


def test_the_newest_is_kept_and_one_step_is_written_once(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    states = [used(model, rng, step) for step in (4, 8, 8)]
    with Checkpoints(tmp_path) as checkpoints:
        for state in states:
            checkpoints.save(state)
        restored = checkpoints.restore(fresh(model))
    assert bits(restored) == bits(states[1])
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["8"]


def test_a_network_starts_another_run_whatever_its_optimizer(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    source = used(model, rng, step=12)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(source)
    like = create_state(model, optax.adamw(0.1), IMAGE_SHAPE, seed=5)
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore_network(like)
    network = ("params", "model_state")
    for field, value in vars(state).items():
        assert bits(value) == bits(getattr(source if field in network else like, field))


def test_a_network_of_another_width_is_refused_by_the_leaf(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(used(model, rng, step=1))
        # All of conv, norm and head but the head's bias, whose size is the number of classes.
        with pytest.raises(ValueError, match=r"does not fit the model: .*6 leaves differ") as error:
            checkpoints.restore_network(fresh(model.clone(features=7)))
        assert "model_state/batch_stats/norm/mean is (3,) there and (7,) in" in str(error.value)
        assert "Give both runs the same model flags" in str(error.value)
        with pytest.raises(ValueError, match=r"norm/mean is .* there and absent in the model"):
            checkpoints.restore_network(fresh(model.clone(norm=False)))


def test_where_nothing_was_written_the_directory_is_named(model: nn.Module, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore, checkpoints.restore_network):
            with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
                restore(fresh(model))
