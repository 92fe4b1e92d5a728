"""Codes and scales that no change of a single one improves.

Source: cyclic coordinate descent as in QuantEase, arXiv 2309.01885, section 3. With `H` the second
moments of the inputs, `e' H e` is what a change `e` of a column of weights adds to the square of
its output. Of one code, all others fixed, the best value is known exactly; of one scale, all codes
fixed, likewise. Each step takes the best, so the loss never rises.
"""

import dataclasses

import numpy as np

from ab_jax.calibration.even_grid import Levels


def descend(
    weight: np.ndarray, moments: np.ndarray, codes: np.ndarray, levels: Levels, *, sweeps: int
) -> np.ndarray:
    """Codes that lose no more than those given, at the same scales.

    Args:
      weight: float64 [groups, n, m], of products `[rows, n] @ [n, m]`.
      moments: float64 [groups, n, n], of the rows: their second moments, or covariances, with a
        positive diagonal.
      codes: float64 [groups, n, m], to start from.
      levels: of the codes.
      sweeps: how often to go over all codes of a column; it ends before where nothing changes.

    Returns:
      float64 codes [groups, n, m].
    """
    codes = codes.copy()
    each = np.arange(len(weight))
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    order = np.argsort(-diagonal, axis=1)  # what counts most is decided first
    # Half the gradient of the loss by the errors, kept up to date with each change.
    pull = moments @ (weight - levels.values(codes))
    for _ in range(sweeps):
        before = codes.copy()
        for row in order.T:
            of_row = levels.at(row)
            now = of_row.values(codes[each, row])
            best = of_row.codes(now + pull[each, row] / diagonal[each, row, None])
            change = of_row.values(best) - now
            if np.any(change):
                codes[each, row] = best
                pull -= moments[each, :, row][:, :, None] * change[:, None]
        if np.array_equal(codes, before):
            break
    return codes


def with_best_scales(
    weight: np.ndarray, moments: np.ndarray, codes: np.ndarray, levels: Levels
) -> Levels:
    """Levels whose scales lose no more than those given, at the same codes.

    Where a column has one scale, its own or one that serves others too, the result is the exact
    minimum. Where it has several (groups of inputs), each in turn takes its best. A scale that
    would not be positive stays as it is.

    Args:
      weight, moments, codes, levels: as for `descend`.
    """
    size = int(levels.blocks.max()) + 1
    steps = codes - levels.zero
    scale = levels.scale.copy()
    pull = moments @ (weight - steps * scale)
    for rows in _rows_by_scale(levels.blocks):
        blocks, own = levels.blocks[:, rows], steps[:, rows]
        to_rows = moments[:, :, rows]
        curvature = np.bincount(blocks.ravel(), (own * (to_rows[:, rows] @ own)).ravel(), size)
        slope = np.bincount(blocks.ravel(), (own * pull[:, rows]).ravel(), size)
        change = (slope / np.where(curvature > 0, curvature, np.inf))[blocks]
        change = np.where(scale[:, rows] + change > 0, change, 0)
        scale[:, rows] += change
        pull -= to_rows @ (own * change)
    return dataclasses.replace(levels, scale=scale)


def _rows_by_scale(blocks: np.ndarray) -> list[np.ndarray]:
    """The rows of a weight [groups, n, m], those together that have the same scales."""
    by_row = blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1)
    _, which = np.unique(by_row, axis=0, return_inverse=True)
    return [np.flatnonzero(which == part) for part in range(which.max() + 1)]
