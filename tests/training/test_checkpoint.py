"""Checkpoints: what is read back is what was written, bit for bit."""

import errno
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ab_jax.training import checkpoint
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.checkpoint_items import Interval
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.retention import DamagedCheckpointWarning, seal
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
        network = {"params": state.params, "model_state": state.model_state}
        assert bits(checkpoints.network()) == bits(network)


def test_the_last_ones_and_the_best_are_kept_and_one_step_is_written_once(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    states = [used(model, rng, step) for step in (4, 8, 12, 16, 16)]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for state, accuracy in zip(states, (0.5, 0.75, 0.25, 0.5, 0.5), strict=True):
            checkpoints.save(state, accuracy=accuracy)
        restored = checkpoints.restore(fresh(model))
    assert bits(restored) == bits(states[3])
    assert {path.name for path in tmp_path.iterdir()} == {"8", "12", "16"}
    with pytest.raises(ValueError, match="keep_checkpoints=0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_an_interval_comes_back_with_its_state_alone(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path
) -> None:
    steps = [{"loss": rng.normal(), "accuracy": rng.uniform(), "alpha": 0.5} for _ in range(3)]
    codes = [rng.integers(-7, 8, shape).astype(np.int8) for shape in ((3, 2), (5,))]
    for step, written in ((3, codes), (4, None), (5, [])):
        interval = None if written is None else Interval.of(steps, written)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(used(model, rng, step), interval=interval)
        with Checkpoints(tmp_path) as checkpoints:
            read = checkpoints.restore_interval()
        if interval is None:
            assert read is None
            continue
        assert read is not None
        assert bits(read.metrics) == bits(interval.metrics)
        assert bits(read.codes) == bits(written)
        expected = [(np.float32(s["loss"]), np.float32(s["accuracy"])) for s in steps]
        assert [(s["loss"], s["accuracy"]) for s in read.steps()] == expected


def test_an_interval_has_the_counts_of_the_steps_that_have_them() -> None:
    """Those before an older version stopped had none."""
    old = Interval.of([{"loss": 1.0, "accuracy": 0.5}], [])
    assert Interval.from_tree(old.to_tree()).steps() == [{"loss": 1.0, "accuracy": 0.5}]
    steps = [*old.steps(), {"loss": 2.0, "accuracy": 0.25, "not_finite_inputs": 3}]
    found = Interval.from_tree(Interval.of(steps, []).to_tree()).steps()
    assert [step["not_finite_inputs"] for step in found] == [0, 3]


# Damage: what can happen to which file is tested with the manifest, what is kept with retention


def flip_a_bit(rng: np.random.Generator, directory: Path) -> Path:
    """Of the largest file, which holds arrays: Orbax itself reads it as other numbers."""
    path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("what", ["restore", "restore_network"])
def test_a_damaged_state_is_passed_over(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path, what: str
) -> None:
    states = [used(model, rng, step) for step in (4, 8)]
    with Checkpoints(tmp_path) as checkpoints:
        for state in states:
            checkpoints.save(state)
    flipped = flip_a_bit(rng, tmp_path / "8")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(DamagedCheckpointWarning, match=re.escape(str(flipped))),
    ):
        restored = getattr(checkpoints, what)(fresh(model, seed=1))
    assert bits(restored.params) == bits(states[0].params)
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8"}

    flip_a_bit(rng, tmp_path / "4")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="none is whole"):
        getattr(checkpoints, what)(fresh(model))


def test_a_damaged_step_is_written_again_and_goes_only_then(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(used(model, rng, 4), accuracy=1.0)
        checkpoints.save(used(model, rng, 8))
    flip_a_bit(rng, tmp_path / "8")
    again = used(model, rng, 8)
    at_seal: list[set[str]] = []

    def noted(path: Path, accuracy: float | None) -> None:
        seal(path, accuracy)
        at_seal.append({p.name for p in tmp_path.iterdir()})

    monkeypatch.setattr(checkpoint, "seal", noted)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning):
            assert checkpoints.latest_step == 4
        checkpoints.save(again)
        assert bits(checkpoints.restore(fresh(model))) == bits(again)
    assert at_seal == [{"4", "8", "8.damaged"}]
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8"}


def test_a_write_that_fails_says_so_and_loses_nothing(
    rng: np.random.Generator, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, accuracy: float | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    states = [used(model, rng, step) for step in (4, 8)]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[0])
        assert checkpoints.latest_path == tmp_path / "4"
        monkeypatch.setattr(checkpoint, "seal", full)
        checkpoints.save(states[1])
        with pytest.raises(OSError, match="The checkpoint of step 8 could not be written") as error:
            checkpoints.save(used(model, rng, 12))
    assert f"in {tmp_path}" in str(error.value)
    assert "No space left on device. There is that of step 4 to go back to" in str(error.value)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(DamagedCheckpointWarning, match=r"writing of .*/8\.writing was cut off"),
    ):
        assert bits(checkpoints.restore(fresh(model))) == bits(states[0])


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
