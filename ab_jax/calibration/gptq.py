"""GPTQ: rounding one weight after another, each error made good by those that are left.

Source: arXiv 2210.17323, section 3.3; the inverse's Cholesky factor as there. With `H` the second
moments of the inputs, `e' H e` is what a change `e` of a column of weights adds to the square of
its output, and the rows of `U`, `U'U = H^-1`, say how the error of one weight is best made good.
"""

import numpy as np

from ab_jax.calibration.even_grid import Levels

_BLOCK = 128


def gptq(
    weight: np.ndarray,
    moments: np.ndarray,
    levels: Levels,
    *,
    damping: float = 0.01,
    by_size: bool = True,
) -> np.ndarray:
    """The codes of a weight.

    Args:
      weight: float64 [groups, n, m], of products `[rows, n] @ [n, m]`.
      moments: float64 [groups, n, n], of the rows: their second moments, or covariances.
      levels: what is rounded to.
      damping: added to the diagonal, a share of its mean.
      by_size: whether weights of inputs with large moments are rounded first.

    Returns:
      float64 codes [groups, n, m].
    """
    groups, n, _ = weight.shape
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    moments = damped(moments, damping)
    order = np.argsort(-diagonal, axis=1) if by_size else np.tile(np.arange(n), (groups, 1))
    each = np.arange(groups)
    moments = moments[each[:, None, None], order[:, :, None], order[:, None, :]]
    left = np.take_along_axis(weight, order[:, :, None], 1)
    upper = np.linalg.cholesky(np.linalg.inv(moments)).swapaxes(1, 2)
    codes = np.empty_like(weight)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        errors = np.empty((groups, end - start, weight.shape[2]))
        for i in range(start, end):
            row = order[:, i]
            of_row = levels.at(row)
            found = of_row.codes(left[:, i])
            codes[each, row] = found
            error = (left[:, i] - of_row.values(found)) / upper[:, i, i, None]
            left[:, i + 1 : end] -= upper[:, i, i + 1 : end, None] * error[:, None]
            errors[:, i - start] = error
        # The weights beyond the block learn of its errors at once, which is faster.
        left[:, end:] -= upper[:, start:end, end:].swapaxes(1, 2) @ errors
    return codes


def damped(moments: np.ndarray, damping: float) -> np.ndarray:
    """Moments [groups, n, n] with a share of their mean diagonal added to the diagonal."""
    n = moments.shape[1]
    # Of inputs that are always 0 the moments are 0: any positive number will do.
    ridge = damping * np.trace(moments, axis1=1, axis2=2) / n + np.finfo(np.float32).tiny
    added: np.ndarray = moments + ridge[:, None, None] * np.eye(n)
    return added
