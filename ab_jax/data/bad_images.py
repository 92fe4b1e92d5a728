"""Images of a source that cannot be read: all of them are found before anything is said."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

LISTED = 20  # in one error
# Among a builder's metadata: what was left out, and why.
LEFT_OUT = "left_out"


@dataclasses.dataclass(frozen=True)
class BadImages:
    """What has been found so far.

    Attributes:
      reasons: why each cannot be read, by its name.
    """

    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Where the block ends in a ValueError, that is noted as why `name` cannot be read."""
        try:
            yield
        except ValueError as error:
            self.reasons[name] = str(error)

    def refuse(self, way_out: str = "") -> None:
        """Raises an error over all that was found, if anything was.

        Args:
          way_out: what else to advise than to mend the files.

        Raises:
          ValueError: names the first `LISTED` images, one a line, and how many there are.
        """
        if not self.reasons:
            return
        advice = f"Mend or remove what is named{way_out}."
        first, *others = self.reasons.values()
        if not others:
            raise ValueError(f"{first}. {advice}")
        lines = list(self.reasons.values())[:LISTED]
        if (more := len(self.reasons) - len(lines)) > 0:
            lines.append(f"and {more} more")
        count = f"{len(self.reasons)} images cannot be read. {advice}"
        raise ValueError("\n  ".join([count, *lines]))
