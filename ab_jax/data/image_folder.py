"""TFDS builders over folders of images: `split/class/file`, in a directory or an archive.

They hand TFDS the files' own bytes, so that preparing needs no TensorFlow and changes no pixel.
TFDS stores the records of a split in the order of a hash of their names: fixed for good, and mixed
over the classes, so that cutting a part off by index is fair.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ab_jax.data.bad_images import LEFT_OUT
from ab_jax.data.sources import Contents, check_source, left_out, read_images, scan

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_COUNTS = {"train": 5_000, "test": 1_000}  # images of each class


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a TFDS data set from anyone's `split/class/file` images.

    Splits are `train`, and `test` or `validation` (also `val`, `valid`) or both; classes are the
    names of the directories, sorted. Each example has `image` (the file's bytes), `label` and `id`
    (the file's path from the split on). Hidden files and directories are left out; links count as
    in `tree.walk`, the same in a directory and in its archive; a file has at most
    `limits.MOST_BYTES` and an image at most `limits.MOST_PIXELS`.

    Args:
      source: a directory, or a .zip or .tar archive (.gz, .xz, .bz2).
      data_dir: TFDS's data directory, to write under.
      config: for `ImageFolder` itself, the name to store the data set under.
      skip_bad: for `ImageFolder` itself, whether to leave out images that cannot be read. Which
        they are and why is kept among the metadata, as `left_out`.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: `source` is neither a directory nor an archive; or, from `download_and_prepare`,
        what `sources.scan` raises.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so TFDS need not look for a file of checksums beside this one (which it
    # does through importlib_resources, a package that it does not install).
    code_path = None
    _way_out = ", or leave such images out with --skip_bad"

    def __init__(
        self, *, source: Path, data_dir: Path, config: str | None = None, skip_bad: bool = False
    ) -> None:
        check_source(source)
        self._source = source
        self._skip_bad = skip_bad
        self._left_out: dict[str, str] = {}  # why, by name
        if config is not None:
            config = tfds.core.BuilderConfig(
                name=config, version=self.VERSION, description="A folder of images."
            )
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _check(self, contents: Contents) -> None:
        """Refuses contents that are not this data set's; a folder may hold what it likes."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        contents = scan(self._source, skip_bad=self._skip_bad, way_out=self._way_out)
        self._check(contents)
        self._left_out = contents.bad
        if contents.bad:
            self.info.metadata[LEFT_OUT] = contents.bad
            print(
                f"{len(contents.bad)} images of {self._source} cannot be read and are left out "
                f"(all are listed in metadata.json), such as {next(iter(contents.bad))}"
            )
        for line in left_out(self._source, contents.ignored):
            print(line)
        self.info.features["label"].names = list(contents.class_names)
        return {split: self._generate_examples(split) for split in sorted(contents.counts)}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file, encoded in read_images(self._source, split):
            if file.name in self._left_out:
                continue
            yield file.name, {"image": encoded, "label": file.class_name, "id": file.name}


class Cifar10Jpeg(ImageFolder, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10 re-encoded as JPEG: 50,000 training and 10,000 test images, 32 x 32, 10 classes.

    The re-encoding costs some accuracy against the original, so that numbers on the two do not
    compare.
    """

    name = "cifar10_jpeg"
    _way_out = ", or take an undamaged copy"

    def _check(self, contents: Contents) -> None:
        expected = {
            split: dict.fromkeys(CIFAR10_CLASSES, count) for split, count in CIFAR10_COUNTS.items()
        }
        if contents.counts == expected:
            return
        found = "; ".join(
            f"{split}: " + ", ".join(f"{count} {name}" for name, count in classes.items())
            for split, classes in sorted(contents.counts.items())
        )
        raise ValueError(
            f"{self._source} is not the JPEG copy of CIFAR-10, which has 5000 images of each class "
            f"in train and 1000 in test, classes {', '.join(CIFAR10_CLASSES)}; found {found}"
        )
