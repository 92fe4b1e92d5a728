import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.data import augment, normalize


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def augmented(key, images, positions, *, pad, flip):
    return augment(key, images, positions, pad=pad, flip=flip)


def random_images(rng, n, height=6, width=5, channels=2):
    # No pixel is 0, so that the zeros of a crop's border stand out.
    return rng.integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def crops(image, pad, flip):
    """All results that `augment` may give for one image, by offset and flip, in plain NumPy."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + height, column : column + width]
            yield (row, column, False), crop
            if flip:
                yield (row, column, True), crop[:, ::-1]


def recovered(images, results, pad, flip):
    """The offset and flip that turn each image into its result; fails where there is not one."""
    found = []
    for image, result in zip(images, results, strict=True):
        same = [draw for draw, crop in crops(image, pad, flip) if np.array_equal(crop, result)]
        assert len(same) == 1
        found.append(same[0])
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_every_result_is_a_crop_of_its_image(rng, key, pad, flip):
    images = random_images(rng, 40)
    results = np.asarray(augmented(key, images, np.arange(40, dtype=np.int32), pad=pad, flip=flip))
    assert results.dtype == np.uint8
    recovered(images, results, pad, flip)


def test_offsets_and_flips_are_uniform(rng, key):
    n = 3000
    images = random_images(rng, n)
    results = np.asarray(augmented(key, images, np.arange(n, dtype=np.int32), pad=1, flip=True))
    draws = recovered(images, results, 1, True)
    counts = np.array([draws.count(draw) for draw, _ in crops(images[0], 1, True)])
    # 18 outcomes, each binomial with mean 167 and deviation 12.5: six deviations.
    assert counts.sum() == n
    np.testing.assert_allclose(counts, n / 18, atol=75)


def test_flips_alone_keep_the_pixels(rng, key):
    images = random_images(rng, 64)
    results = np.asarray(augmented(key, images, np.arange(64, dtype=np.int32), pad=0, flip=True))
    np.testing.assert_array_equal(np.sort(results, axis=2), np.sort(images, axis=2))
    flips = [flip for _, _, flip in recovered(images, results, 0, True)]
    assert 0 < sum(flips) < 64


def test_without_crops_and_flips_nothing_changes(rng, key):
    images = random_images(rng, 3)
    results = augmented(key, images, np.arange(3, dtype=np.int32), pad=0, flip=False)
    np.testing.assert_array_equal(results, images)


def test_the_batch_may_be_cut_and_reordered(rng, key):
    """An image's draw depends on its position alone, so any share of a batch gets the same."""
    images = random_images(rng, 16)
    positions = rng.permutation(1000)[:16].astype(np.int32)
    whole = np.asarray(augmented(key, images, positions, pad=2, flip=True))
    halves = [
        augmented(key, images[half], positions[half], pad=2, flip=True)
        for half in (slice(0, 8), slice(8, 16))
    ]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    order = rng.permutation(16)
    mixed = augmented(key, images[order], positions[order], pad=2, flip=True)
    np.testing.assert_array_equal(mixed, whole[order])


def test_devices_change_nothing(rng, key, devices):
    n = 4 * len(devices)
    images = random_images(rng, n)
    positions = np.arange(n, dtype=np.int32)
    shared = jax.pmap(
        functools.partial(augment, pad=2, flip=True), in_axes=(None, 0, 0), devices=devices
    )(
        key,
        images.reshape(len(devices), 4, *images.shape[1:]),
        positions.reshape(len(devices), 4),
    )
    whole = augmented(key, images, positions, pad=2, flip=True)
    np.testing.assert_array_equal(np.asarray(shared).reshape(images.shape), whole)


def test_another_key_and_another_position_draw_anew(rng, key):
    n = 200
    images = np.repeat(random_images(rng, 1), n, axis=0)
    positions = np.arange(n, dtype=np.int32)
    draws = [
        recovered(images, np.asarray(augmented(k, images, positions, pad=2, flip=True)), 2, True)
        for k in (key, jax.random.fold_in(key, 1))
    ]
    # 50 outcomes: two independent draws agree in 4 of 200, and one key gives nearly all 50.
    assert sum(a == b for a, b in zip(*draws, strict=True)) < 30
    assert all(len(set(d)) > 35 for d in draws)


def test_bad_arguments_are_refused(rng, key):
    images = random_images(rng, 4)
    with pytest.raises(ValueError, match="pad must be 0 or more pixels, got -1"):
        augment(key, images, np.arange(4), pad=-1, flip=False)
    with pytest.raises(ValueError, match=r"positions must have shape \(4,\), got \(3,\)"):
        augment(key, images, np.arange(3), pad=1, flip=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize_is_the_formula(rng, dtype):
    images = rng.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    mean, std = tuple(rng.uniform(0.2, 0.6, 3)), tuple(rng.uniform(0.1, 0.4, 3))
    result = jax.jit(lambda x: normalize(x, mean, std, dtype))(images)
    assert result.dtype == dtype
    exact = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    # Absolute too: beside the mean the difference of two nearly equal numbers is left.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=tolerance, atol=1e-5)


def test_normalizing_by_its_own_statistics_gives_mean_0_and_deviation_1(rng):
    from ab_jax.data.dataset import channel_statistics

    images = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8) // np.array([1, 2, 9], np.uint8)
    result = np.asarray(normalize(images, *channel_statistics(images)), np.float64)
    np.testing.assert_allclose(result.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_normalize_refuses_statistics_that_do_not_fit(rng):
    images = random_images(rng, 2, channels=3)
    with pytest.raises(ValueError, match="3 channels, mean has 1 numbers and std has 3"):
        normalize(images, (0.5,), (0.2,) * 3)
    with pytest.raises(ValueError, match=r"std must be above 0, got \(0.2, 0.0, 0.2\)"):
        normalize(images, (0.5,) * 3, (0.2, 0.0, 0.2))
