"""Generated photographs in the place of ImageNet's: its sizes and labels, in TFDS's own layout.

ImageNet may not be passed on. These files are written by TFDS's own `imagenet2012` builder, from
tar files as image-net.org has them, so that whoever reads them reads the real ones too.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

# Height and width in pixels: the most frequent ones, and two that are not like them.
SIZES = ((375, 500), (333, 500), (500, 375), (500, 500), (375, 500), (768, 1024), (90, 120))


def photo(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG file of patches of colour with grain, as large as ImageNet's of that size."""
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 8, (height, width, 1))
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done
    return encoded.tobytes()


def synsets() -> list[str]:
    """ImageNet's 1,000 classes, `n01440764` and so on, in the order of their labels."""
    path = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    return Path(path).read_text().split()


def prepare_generated_imagenet(data_dir: Path, train: int, validation: int, seed: int) -> Path:
    """Write a small `imagenet2012` of generated photographs.

    Args:
      data_dir: TFDS's data directory, to write under.
      train, validation: number of photographs, of classes in turn.
      seed: of the photographs.

    Returns:
      The prepared directory, `data_dir/imagenet2012/5.1.0`.
    """
    classes = synsets()
    rng = np.random.default_rng(seed)

    class Builder(imagenet2012_dataset_builder.Builder, skip_registration=True):  # type: ignore
        name = "imagenet2012"
        pkg_dir_path = Path(imagenet2012_dataset_builder.__file__).parent

        # As TFDS's own, but for the archives, which it looks for with TensorFlow.
        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            labels = {f"ILSVRC2012_val_{i:08}.JPEG": classes[i % 1000] for i in range(validation)}
            return {
                "train": self._generate_examples(_train_archive(rng, classes, train)),
                "validation": self._generate_examples(_photos(rng, labels), labels),
            }

    builder = Builder(data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


def _photos(rng: np.random.Generator, names: Any) -> Iterator[tuple[str, io.BytesIO]]:
    for name in names:
        yield name, io.BytesIO(photo(rng, *SIZES[rng.integers(len(SIZES))]))


def _train_archive(
    rng: np.random.Generator, classes: list[str], count: int
) -> Iterator[tuple[str, io.BytesIO]]:
    """The members of ILSVRC2012_img_train.tar: an archive for each class."""
    for label, synset in enumerate(classes[:count]):
        names = [f"{synset}_{i}.JPEG" for i in range(len(range(label, count, len(classes))))]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, file in _photos(rng, names):
                member = tarfile.TarInfo(name)
                member.size = len(file.getvalue())
                archive.addfile(member, file)
        buffer.seek(0)
        yield f"{synset}.tar", buffer
