import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ab_jax.data import epoch_order, evaluation_batches, steps_per_epoch, train_indices

SEEDS = st.integers(0, 2**63)


@given(SEEDS, st.integers(0, 1000), st.integers(0, 300))
def test_an_epoch_visits_every_image_once(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, n))


def test_orders_differ_by_epoch_and_by_seed(rng):
    seed = int(rng.integers(2**32))
    orders = [epoch_order(seed + s, epoch, 100).tolist() for s in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_every_image_comes_first_about_equally_often(rng):
    seed = int(rng.integers(2**32))
    first = [epoch_order(seed, epoch, 5)[0] for epoch in range(2000)]
    # 400 each, binomial deviation 18: six deviations.
    np.testing.assert_allclose(np.bincount(first), 400, atol=108)


@given(SEEDS, st.integers(1, 60), st.data())
def test_the_steps_of_an_epoch_follow_its_order(seed, n, data):
    batch_size = data.draw(st.integers(1, n))
    steps = steps_per_epoch(batch_size, n)
    assert steps == n // batch_size
    for epoch in (0, 3):
        seen = [train_indices(seed, epoch * steps + i, batch_size, n) for i in range(steps)]
        assert all(indices.shape == (batch_size,) for indices in seen)
        assert all(indices.dtype == np.int32 for indices in seen)
        order = epoch_order(seed, epoch, n)[: steps * batch_size]
        np.testing.assert_array_equal(np.concatenate(seen), order)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*n=10"):
        train_indices(0, 0, batch_size, 10)


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 9))
def test_evaluation_counts_every_image_once(n, batch_size, devices):
    batches = list(evaluation_batches(n, batch_size, devices))
    size = next(size for size in range(batch_size, batch_size + devices) if size % devices == 0)
    for indices, mask in batches:
        assert indices.shape == mask.shape == (size,)
        assert indices.dtype == np.int32
        assert mask.dtype == np.bool_
        assert ((indices >= 0) & (indices < n)).all()  # padding too can be looked up
    counted = [index for indices, mask in batches for index in indices[mask]]
    assert counted == list(range(n))
    assert len(batches) == -(-n // size)


@pytest.mark.parametrize("arguments", [(-1, 4, 1), (3, 0, 1), (3, 4, 0)])
def test_evaluation_refuses_bad_sizes_before_the_first_batch(arguments):
    n, batch_size, devices = arguments
    with pytest.raises(ValueError, match=f"n={n}, batch_size={batch_size}, devices={devices}"):
        evaluation_batches(n, batch_size, devices)
