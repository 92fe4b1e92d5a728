"""Which images calibrate a network and which ones its accuracy is read on, by the flags."""

import dataclasses
from pathlib import Path

from experiments.pretrained.images import ImageSet, half_of_each
from experiments.pretrained.photographs import WHERE_FROM, Photographs
from experiments.pretrained.tiny_photographs import TinyPhotographs
from experiments.settings.choices import choose
from experiments.settings.config import FlagError

SOURCES = ("photographs", "tiny", "both")
READINGS = ("test", "choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSources:
    """Photographs, Tiny ImageNet, or both.

    The methods raise FileNotFoundError and ValueError as the two of them do.

    Attributes:
      source: what calibrates: one of `SOURCES`; of "both", half of each.
      photographs: a folder or an archive; None: none is given.
      data_dir: where Tiny ImageNet was prepared; None: where it is by default.
      size: height and width of the images, in pixels.

    Raises:
      FlagError: another source, or photographs that are not given.
    """

    source: str
    photographs: Path | None
    data_dir: str | None
    size: int

    def __post_init__(self) -> None:
        choose("source", self.source, dict.fromkeys(SOURCES))
        if self.source != "tiny" and self.photographs is None:
            raise FlagError(
                f"--source={self.source} needs --photographs=PATH. {WHERE_FROM}. --source=tiny "
                f"takes Tiny ImageNet."
            )

    def calibration(self, count: int, *, draw: int = 0) -> ImageSet:
        """Images to calibrate with.

        Raises:
          FlagError: half of an odd number.
        """
        if self.source == "photographs":
            return self._photographs.calibration(count, draw=draw)
        if self.source == "tiny":
            return self._tiny.calibration(count, draw=draw)
        if count % 2:
            raise FlagError(f"--images={count} should be even for --source=both: half of each.")
        return half_of_each(
            self._photographs.calibration(count // 2, draw=draw),
            self._tiny.calibration(count // 2, draw=draw),
        )

    def to_read(self, reading: str) -> dict[str, ImageSet]:
        """Images to read accuracies on, by name.

        Args:
          reading: "choice": those of Tiny ImageNet that settings are chosen on, whatever
            calibrates. "test": the photographs' other half, where photographs are given, and the
            validation images of Tiny ImageNet, where it calibrates or `data_dir` is given.

        Raises:
          FlagError: another reading.
        """
        choose("read", reading, dict.fromkeys(READINGS))
        if reading == "choice":
            return {"tiny": self._tiny.choice()}
        found = {}
        if self.photographs is not None:
            found["photographs"] = self._photographs.test()
        if self.source != "photographs" or self.data_dir is not None:
            found["tiny"] = self._tiny.test()
        return found

    @property
    def _photographs(self) -> Photographs:
        assert self.photographs is not None
        return Photographs(self.photographs, self.size)

    @property
    def _tiny(self) -> TinyPhotographs:
        return TinyPhotographs(self.size, self.data_dir)
