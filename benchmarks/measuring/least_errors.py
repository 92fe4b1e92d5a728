"""The least squared error that levels of each kind can have, in float64: what fits are held to.

The error of a block changes its course where a weight lies half way between two levels. Between
such scales the codes stay, and the best scale for them is known: going through all of them finds
the least error exactly.
"""

import itertools

import numpy as np

KINDS = ("normal", "Laplace", "flat", "two heaps", "an outlier", "sparse", "off zero", "one sign")


def drawn(rng: np.random.Generator, count: int, channels: int = 4) -> np.ndarray:
    """Weights of each of `KINDS`, side by side: float32 [count, kinds * channels]."""
    size = (count, channels)
    outlier, sparse = rng.normal(size=size), rng.normal(size=size) * (rng.random(size) < 0.2)
    outlier[0] = 10 * np.sign(outlier[0])
    sparse[:2] = rng.normal(size=sparse[:2].shape)
    kinds = [
        *(rng.normal(size=size), rng.laplace(size=size), rng.uniform(-1, 1, size)),
        np.sign(rng.normal(size=size)) + 0.1 * rng.normal(size=size),
        *(outlier, sparse, rng.normal(1, 1, size), rng.gamma(1.0, size=size)),
    ]
    return np.concatenate(kinds, axis=1, dtype=np.float32, casting="same_kind")


def even_levels(w: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Of each column, over all scales, and over all windows of levels that hold 0 unless symmetric.

    Args:
      w: [weights, channels].
    """
    half = 2 ** (bits - 1) - 1
    windows = [(-half, half)] if symmetric else [(-z, 2**bits - 1 - z) for z in range(2**bits)]
    return np.array([min(_in_window(channel, *window) for window in windows) for channel in w.T])


def _in_window(w: np.ndarray, lowest: int, highest: int) -> float:
    crossings = []
    for side, levels in ((1, highest), (-1, -lowest)):
        magnitudes = (side * w.astype(np.float64))[side * w > 0]
        k = np.arange(levels)
        scales = magnitudes[:, None] / (k + 0.5)  # at which a code goes from k to k + 1
        found = np.broadcast_arrays(scales, magnitudes[:, None], 2.0 * k + 1)
        crossings.append(np.stack(found).reshape(3, -1))
    scale, wq, qq = np.concatenate(crossings, axis=1)
    order = np.argsort(-scale)
    wq, qq = np.cumsum(wq[order]), np.cumsum(qq[order])
    return float(np.square(w.astype(np.float64)).sum() - np.max(wq**2 / qq, initial=0))


def two_groups(w: np.ndarray) -> np.ndarray:
    """Of each column, with the levels +-v1 +-v2: over all splits of the magnitudes into two."""
    count = len(w)
    rising = np.sort(np.abs(w.astype(np.float64)), axis=0)
    sums, k = np.cumsum(rising, axis=0), np.arange(1, count)[:, None]
    saved = sums[:-1] ** 2 / k + (sums[-1] - sums[:-1]) ** 2 / (count - k)
    return np.asarray(np.square(rising).sum(0) - saved.max(0))


def bit_scales(w: np.ndarray, bits: int, starts: int, rng: np.random.Generator) -> np.ndarray:
    """Of each column, with one scale a bit: the best of alternations from so many random starts.

    Not surely the least, which nobody knows how to find.
    """
    signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=bits - 1)], float)
    return np.array([_best_alternation(np.abs(c), signs, starts, rng) for c in w.T.astype(float)])


def _best_alternation(
    magnitudes: np.ndarray, signs: np.ndarray, starts: int, rng: np.random.Generator
) -> float:
    """Of one column of magnitudes; `signs` [levels, bits] are those of each magnitude's level."""
    scales = rng.gamma(1.0, size=(starts, signs.shape[1])) * magnitudes.mean()
    ridge = 1e-9 * len(magnitudes) * np.eye(signs.shape[1])
    for _ in range(40):
        levels = scales @ signs.T  # [starts, levels]
        side = np.where(levels < 0, -1.0, 1.0)
        nearest = np.abs(magnitudes[:, None] - np.abs(levels)[:, None]).argmin(-1)
        of_weight = np.take_along_axis(side, nearest, 1)[..., None] * signs[nearest]
        gram = np.einsum("swi,swj->sij", of_weight, of_weight) + ridge
        target = np.einsum("swi,w->si", of_weight, magnitudes)
        scales = np.linalg.solve(gram, target[..., None])[..., 0]
    levels = np.abs(scales @ signs.T)
    distances = np.abs(magnitudes[:, None] - levels[:, None]).min(-1)
    return float(np.square(distances).sum(-1).min())
