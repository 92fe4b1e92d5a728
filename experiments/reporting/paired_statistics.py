"""Mean, deviation and paired difference over seeds, and how a table writes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t  # type: ignore[import-untyped]

NOT_RUN = "not run"


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences; `half_width` of its interval is None for a single pair."""

    mean: float
    half_width: float | None
    n: int


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1 below the sum), None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """Mean of `values - baseline` over the shared seeds, with the t interval of that mean.

    Returns None when no seed is shared.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline)]
    if not differences:
        return None
    n = len(differences)
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        return Difference(mean, None, n)
    quantile = float(student_t.ppf((1 + confidence) / 2, n - 1))
    return Difference(mean, quantile * deviation / math.sqrt(n), n)


def mean_cell(values: Sequence[float], expected: int, digits: int = 2) -> str:
    """`66.53 ± 0.41`; with `(n = 3)` where fewer values than expected are there."""
    if not values:
        return NOT_RUN
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:.{digits}f}"
    if deviation is not None:
        text += f" ± {deviation:.{digits}f}"
    return text if len(values) == expected else f"{text} (n = {len(values)})"


def difference_cell(
    values: Mapping[int, float], baseline: Mapping[int, float], digits: int = 2
) -> str:
    """`+0.52 [-0.10, +1.14]`; with `(n = 3)` where not every seed of `values` has its partner."""
    difference = paired_difference(values, baseline)
    if difference is None:
        return NOT_RUN
    mean, half = difference.mean, difference.half_width
    text = signed(mean, digits)
    if half is not None:
        text += f" [{signed(mean - half, digits)}, {signed(mean + half, digits)}]"
    every_seed = half is not None and difference.n == len(values)
    return text if every_seed else f"{text} (n = {difference.n})"


def signed(value: float, digits: int = 2) -> str:
    """`+0.52`, with the sign in front; a zero has a plus."""
    return f"{value:+z.{digits}f}"
