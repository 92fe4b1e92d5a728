"""How far networks are from each other on the same images, with 95 % intervals.

Images and draws (or seeds) both vary by chance, so their variances of a mean add up: of draws by
Student's t, of images, which are hundreds, by the normal distribution. An interval is somewhat
wide, since what images and draws make together counts in both.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from experiments.pretrained.readings import from_bits
from experiments.pretrained.record_words import Record
from experiments.reporting.paired_statistics import mean_and_deviation

Interval = tuple[float, float]  # a mean, and half the width of its interval, in points


def points_below_float(records: Sequence[Record], name: str) -> Interval:
    """The mean over draws of points below float on a set of images; of one draw: images alone."""
    return of_draws_and_images(
        np.array([_right(r, name, "float") - _right(r, name, "quantized") for r in records])
    )


def points_above(records: Sequence[Record], others: Sequence[Record], name: str) -> Interval:
    """The mean over seeds of points above another network of the same seed and images.

    Args:
      records, others: of the same seeds, in the same order.
    """
    pairs = zip(records, others, strict=True)
    return of_draws_and_images(
        np.array([_right(a, name, "quantized") - _right(b, name, "quantized") for a, b in pairs])
    )


def of_draws_and_images(points: np.ndarray) -> Interval:
    """Of points `[draws, images]`, each from -100 to 100."""
    mean, deviation = mean_and_deviation([float(x) for x in points.mean(1)])
    of_images = 1.96 * float(points.mean(0).std(ddof=1)) / math.sqrt(points.shape[1])
    if deviation is None:
        return mean, of_images
    n = len(points)
    of_draws = float(student_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean, math.hypot(of_draws, of_images)


def interval(found: Interval, *, sign: bool = False) -> str:
    """`2.60 [2.10, 3.10]`, with `sign` as `+2.60 [+2.10, +3.10]`."""
    mean, half = found
    form = "+.2f" if sign else ".2f"
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def _right(record: Record, name: str, network: str) -> np.ndarray:
    """Of each image 100 where it is named right, else 0."""
    bits = record["right"][name][network]
    count = record["images"]["read"][name] if "read" in record["images"] else 4 * len(bits)
    return 100 * from_bits(bits, count).astype(float)
