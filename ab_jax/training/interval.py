"""What a run has gathered since its last evaluation, kept when it stops in between."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Those that a line of metrics has the means of, and the sum, where there are any.
_METRICS = ("loss", "accuracy", "not_finite_inputs")


@dataclasses.dataclass(frozen=True)
class Interval:
    """The steps since the last evaluation, of which the next one makes its line of metrics.

    Attributes:
      metrics: float32 [steps] by name.
      codes: of the quantized parameters at the last evaluation, in the order of the tree.
    """

    metrics: dict[str, np.ndarray]
    codes: list[np.ndarray]

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]], codes: list[np.ndarray]) -> "Interval":
        """From what each step returned, one at least."""
        names = [name for name in _METRICS if any(name in step for step in steps)]
        metrics = {n: np.asarray([step.get(n, 0) for step in steps], np.float32) for n in names}
        return cls(metrics, codes)

    def steps(self) -> list[dict[str, Any]]:
        """The inverse of `of`, for the metrics that are kept."""
        columns = zip(*self.metrics.values(), strict=True)
        return [dict(zip(self.metrics, values, strict=True)) for values in columns]

    def to_tree(self) -> dict[str, Any]:
        """As dictionaries of arrays, none of them empty, which is what Orbax can write."""
        codes = {str(i): codes for i, codes in enumerate(self.codes)}
        return {"metrics": self.metrics, **({"codes": codes} if codes else {})}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "Interval":
        """The inverse of `to_tree`."""
        codes = tree.get("codes", {})
        return cls(
            metrics={name: np.asarray(values) for name, values in tree["metrics"].items()},
            codes=[np.asarray(codes[str(i)]) for i in range(len(codes))],
        )
