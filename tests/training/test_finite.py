"""What is not finite is found in its step, and named with all that helps."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.training.finite import FiniteCheck, NonFiniteLossError, finite_leaves
from ab_jax.training.state import TrainState

PARAMS = {"conv": {"bias": 0, "kernel": 0}, "head": {"kernel": 0}}
PATHS = ["conv/bias", "conv/kernel", "head/kernel"]


def check(path: Path | None = None) -> FiniteCheck:
    return FiniteCheck(learning_rate=lambda step: step / 10, last_checkpoint=lambda: path)


def step(loss: float = 1.0, finite: tuple[bool, ...] = (True, True, True)) -> dict[str, Any]:
    return {"loss": np.float32(loss), "alpha": np.float32(0.25), "finite": np.array(finite)}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_leaves_that_are_not_finite_are_told_from_the_others(
    rng: np.random.Generator, number: float
) -> None:
    tree = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (5,), (), (2, 1, 7))]
    bad = rng.integers(4)
    assert np.all(jax.jit(finite_leaves)(tree))
    tree[bad] = np.array(tree[bad])
    tree[bad].flat[rng.integers(tree[bad].size)] = number
    expected = [leaf != bad for leaf in range(4)]
    np.testing.assert_array_equal(jax.jit(finite_leaves)(tree), expected)


def test_the_first_step_and_the_first_parameter_are_named(tmp_path: Path) -> None:
    steps = [step(), step(finite=(True, False, False)), step(np.nan, (False, False, False))]
    check().steps(steps[:1], first=12, params=PARAMS)
    with pytest.raises(NonFiniteLossError) as error:
        check(tmp_path / "8").steps(steps, first=12, params=PARAMS)
    message = str(error.value)
    assert "The loss is 1.0 and the gradient of conv/kernel is not finite at step 13" in message
    assert "at alpha 0.2500 and learning rate 1.3." in message
    assert f"Last checkpoint: step 8 ({tmp_path / '8'})" in message
    assert "Lower the learning rate or clip gradients" in message


def test_a_loss_alone_is_enough(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="The loss is inf and all gradients are finite at"):
        check().steps([step(np.inf)], first=0, params=PARAMS)


@pytest.mark.parametrize("path", [*PATHS, "batch_stats/norm/var"])
def test_weights_and_statistics_are_looked_at_by_path(path: str) -> None:
    network = {name: jnp.ones(3) for name in (*PATHS, "batch_stats/norm/var")}
    network[path] = network[path].at[1].set(jnp.nan)

    def nest(prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): leaf
            for name, leaf in network.items()
            if name.startswith(prefix)
        }

    state = TrainState(
        step=jnp.int32(7),
        params={"conv": nest("conv/"), "head": nest("head/")},
        model_state={"batch_stats": {"norm": nest("batch_stats/norm/")}},
        opt_state=(),
        key=jnp.zeros(2, jnp.uint32),
    )
    where = path if path.startswith("batch_stats") else f"params/{path}"
    with pytest.raises(NonFiniteLossError, match=rf"^{where} is not finite after its update") as e:
        check().network(state, 0.5)
    assert "at step 6, at alpha 0.5000 and learning rate 0.6." in str(e.value)
    assert "Last checkpoint: none yet" in str(e.value)
