"""How arrays get to the devices and back, and what cannot be shared by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.training.parallel import AXIS, Mode, Parallel

MODES = ("pmap", "shard_map")


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_replicated_comes_back_bit_for_bit(
    rng: np.random.Generator, devices: list[jax.Device], mode: Mode, n: int
) -> None:
    parallel = Parallel(mode, tuple(devices[:n]))
    tree = {"w": rng.normal(size=(3, 2)).astype(np.float32), "step": jnp.int32(7)}
    placed = parallel.replicate(tree)
    assert all(leaf.sharding.device_set == set(devices[:n]) for leaf in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, parallel.unreplicate(placed), tree)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_devices_take_their_shares_in_order(
    rng: np.random.Generator, devices: list[jax.Device], mode: Mode, n: int
) -> None:
    parallel = Parallel(mode, tuple(devices[:n]))
    numbers = rng.integers(0, 1000, (16, 2)).astype(np.int32)
    scale = np.float32(3)

    def step(scale: jax.Array, numbers: jax.Array) -> jax.Array:
        assert numbers.shape == (16 // n, 2)
        own = jax.nn.one_hot(jax.lax.axis_index(AXIS), n)
        return jax.lax.psum(own * scale * jnp.sum(numbers), AXIS)

    wrapped = parallel.wrap(step, sharded=[False, True])
    sums = parallel.unreplicate(wrapped(parallel.replicate(scale), parallel.shard(numbers)))
    np.testing.assert_array_equal(sums, [3 * share.sum() for share in np.split(numbers, n)])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_the_devices_do_not_divide_is_refused(
    devices: list[jax.Device], mode: Mode
) -> None:
    with pytest.raises(ValueError, match=r"batch of 10 .* 4 devices.*a multiple of 4"):
        Parallel(mode, tuple(devices[:4])).shard(np.zeros((10, 3)))


def test_an_unknown_mode_is_refused(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match="must be 'pmap' or 'shard_map', not 'vmap'"):
        Parallel("vmap", tuple(devices))  # type: ignore[arg-type]
