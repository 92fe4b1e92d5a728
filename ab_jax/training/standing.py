"""What a checkpoint holds of its run beside the state: the seal of its metrics, and its ramps."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ab_jax.files import read_regular, write_whole
from ab_jax.training.metrics_file import Seal

_NAME = "run.json"


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stood when a checkpoint was written. None of it is known of older ones.

    Attributes:
      metrics: the seal of the lines up to there; None where another process wrote them.
      alphas: by the path of each quantized parameter, and of the activations.
    """

    metrics: Seal | None = None
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Into the directory of a checkpoint that has no manifest yet.

        Raises:
          OSError: it cannot be written; names the path and the fix.
        """
        write_whole(checkpoint / _NAME, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def read(cls, checkpoint: Path) -> "Standing":
        """From a checkpoint that is whole by its manifest."""
        data = read_regular(checkpoint / _NAME)
        return cls() if data is None else cls(**json.loads(data))
