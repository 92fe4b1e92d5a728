"""Random crops and flips, and normalization: pure functions for the inside of a jitted step.

Each image draws from a key of its own, made from the step's key and the image's place in the global
batch. How a batch is spread over devices therefore changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def augment(
    key: jax.Array, images: jax.Array, positions: jax.Array, *, pad: int, flip: bool
) -> jax.Array:
    """Crops each image at random out of itself with a border of zeros, and flips half of them.

    Args:
      key: the step's random key, one for all devices.
      images: uint8 `[B, H, W, C]`, a batch or one device's part of it.
      positions: int32 `[B]`, the place of each image in the global batch.
      pad: width of the border in pixels; the crop moves by up to `pad` each way. 0: no crops.
      flip: whether to mirror each image left to right with probability 1/2.

    Returns:
      uint8 `[B, H, W, C]`.

    Raises:
      ValueError: `pad` is negative, or `positions` has not one entry for each image.
    """
    if pad < 0:
        raise ValueError(f"pad must be 0 or more pixels, got {pad}")
    if positions.shape != images.shape[:1]:
        raise ValueError(f"positions must have shape {images.shape[:1]}, got {positions.shape}")

    def draw(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        offset = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        return offset, jax.random.bernoulli(flip_key)

    if not pad and not flip:
        return images
    offsets, flips = jax.vmap(draw)(positions)
    if pad:
        images = _crop(images, offsets, pad)
    if flip:
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1, :], images)
    return images


def _crop(images: jax.Array, offsets: jax.Array, pad: int) -> jax.Array:
    """Cuts `[H, W]` windows that start at `offsets` (int `[B, 2]`) out of the padded images."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shape = images.shape[1:]

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

    return jax.vmap(cut)(padded, offsets)


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Scales pixels to 0..1, then subtracts each channel's mean and divides by its deviation.

    Args:
      images: uint8 `[B, H, W, C]`.
      mean: `C` means, with pixels in 0..1.
      std: `C` standard deviations, with pixels in 0..1, above 0.
      dtype: of the result; the arithmetic is float32.

    Returns:
      `[B, H, W, C]` in `dtype`.

    Raises:
      ValueError: `mean` or `std` has not `C` numbers, or a deviation is not above 0.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"images have {channels} channels, mean has {len(mean)} numbers and std has {len(std)}"
        )
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"every std must be above 0, got {tuple(std)}: is a channel constant?")
    # In units of the stored pixels: one subtraction and one product instead of two of each.
    center = jnp.asarray([255.0 * m for m in mean], jnp.float32).reshape(1, 1, 1, channels)
    scale = jnp.asarray([1.0 / (255.0 * s) for s in std], jnp.float32).reshape(1, 1, 1, channels)
    return ((images.astype(jnp.float32) - center) * scale).astype(dtype)
