"""How arrays get to the devices and back, and what cannot be shared by them."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.training import parallel as parallel_module
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


def test_the_options_for_cpus_change_the_order_of_a_program(rng: np.random.Generator) -> None:
    """XLA takes some options without a word and does nothing; ours must do what we want of it."""
    x = jnp.asarray(rng.normal(size=(4, 16, 16, 8)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 8, 8)), jnp.float32)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jax.lax.conv_general_dilated(
                jnp.tanh(x), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jnp.sum(x)

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x, w)
    overlapping = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}
    ours, theirs = (
        lowered.compile(compiler_options=options).as_text()
        for options in (parallel_module._CPU_OPTIONS, overlapping)
    )
    assert sorted(ours.split()) == sorted(theirs.split()), "the same program"
    assert ours != theirs, "in the same order"


@pytest.mark.parametrize("flags", ["", "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_on_cpus_gets_the_options_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, devices: list[jax.Device], mode: Mode, flags: str
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    seen = []
    lower = jax._src.compiler.get_compile_options  # type: ignore[attr-defined]

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(kwargs.get("env_options_overrides"))
        return lower(*args, **kwargs)

    monkeypatch.setattr(jax._src.compiler, "get_compile_options", spy)  # type: ignore[attr-defined]
    parallel = Parallel(mode, tuple(devices[:2]))
    step = parallel.wrap(lambda x: jax.lax.psum(jnp.sum(x), AXIS), sharded=[True])
    for size in (4, 6):
        batch = np.arange(size, dtype=np.float32)
        assert parallel.unreplicate(step(parallel.shard(batch))) == batch.sum()
    assert seen.count(parallel_module._CPU_OPTIONS) == (0 if flags else 2), "once for each shape"


@pytest.mark.parametrize("mode", MODES)
def test_one_process_has_the_whole_batch_for_its_own(
    rng: np.random.Generator, devices: list[jax.Device], mode: Mode
) -> None:
    parallel = Parallel(mode, tuple(devices[:4]))
    assert parallel.share == (0, 1)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    for whole, own in zip(
        parallel.shard(x).addressable_shards, parallel.shard_own(x).addressable_shards, strict=True
    ):
        assert whole.device == own.device
        np.testing.assert_array_equal(whole.data, own.data)


def test_groups_are_of_neighbours(devices: list[jax.Device]) -> None:
    def groups(n: int, k: int | None) -> Any:
        return Parallel("pmap", tuple(devices[:n]), norm_group=k).norm_groups

    assert groups(8, 4) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups(4, 1) == ((0,), (1,), (2,), (3,))
    assert groups(8, None) is groups(8, 8) is groups(1, 1) is None


@pytest.mark.parametrize(("n", "k"), [(8, 3), (8, 16), (8, 0), (8, -2), (6, 4)])
def test_groups_that_do_not_divide_the_devices_are_refused(
    devices: list[jax.Device], n: int, k: int
) -> None:
    message = f"norm_group={k} does not divide the {n} devices.*a divisor of {n}"
    with pytest.raises(ValueError, match=message):
        Parallel("pmap", tuple(devices[:n]), norm_group=k)


@pytest.mark.parametrize("owners", [[0, 1, 0, 1], [0, 0, 1], [1, 0]])
def test_devices_in_another_order_than_their_processes_are_refused(owners: list[int]) -> None:
    devices: Any = tuple(SimpleNamespace(process_index=owner) for owner in owners)
    with pytest.raises(ValueError, match=r"one after the other.*equal hosts"):
        Parallel("shard_map", devices)
