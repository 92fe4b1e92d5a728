"""Reading what `ab_jax.data.prepare` wrote, without TensorFlow.

A data set lies in `data_dir/NAME/VERSION`, TFDS's own layout; one of a user's own folders in
`data_dir/image_folder/NAME/VERSION`, and is asked for as `image_folder:NAME`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ab_jax.data.cache import cached
from ab_jax.data.checksums import damage
from ab_jax.data.dataset import Images
from ab_jax.data.pixels import box_downsample, decode

READ_AT_ONCE = 1024  # records
# Among a builder's metadata: what its classes are called, where their names are ids.
WORDS = "words"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The splits of a prepared data set, in memory.

    Attributes:
      version: such as `"1.0.0"`.
      class_names: one name for each label.
      splits: images by name of the split, in the order in which TFDS stored them: by a hash of each
        example's name, which mixes the classes and never changes.
    """

    version: str
    class_names: tuple[str, ...]
    splits: dict[str, Images]


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """`data_dir`, or where it is None TFDS's: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(data_dir).expanduser()


def prepare_command(name: str, data_dir: Path) -> str:
    """The shell command that prepares data set `name` in `data_dir`."""
    builder, _, folder = name.partition(":")
    options = "" if builder == "cifar10" else " --source=PATH"
    options += f" --name={folder}" if folder else ""
    return f"python -m ab_jax.data.prepare {builder}{options} --data_dir={data_dir}"


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Directory of the newest prepared version of a data set; None if there is none.

    Args:
      name: `"cifar10"`, `"cifar10_jpeg"`, `"tiny_imagenet"` or `"image_folder:NAME"`.
      data_dir: TFDS's data directory.
    """
    infos = data_dir.joinpath(*name.split(":")).glob("*.*.*/dataset_info.json")
    versions = [info.parent for info in infos if info.parent.name.replace(".", "").isdecimal()]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def open_prepared(name: str, data_dir: Path) -> Any:
    """TFDS's builder of a prepared data set, which can be read without TensorFlow.

    Args:
      name: as for `read_prepared`, or `"imagenet2012"`.
      data_dir: TFDS's data directory.

    Raises:
      FileNotFoundError: it is not prepared in `data_dir`; the message has the command that does it.
      ValueError: it is prepared in a format that needs TensorFlow, or damaged; names the directory
        to delete and the command to prepare it anew.
    """
    directory = find_prepared(name, data_dir)
    if directory is None:
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir} (no "
            f"{data_dir.joinpath(*name.split(':'))}/VERSION/dataset_info.json). Prepare it once "
            f"with `{prepare_command(name, data_dir)}`, or name another directory by data_dir or "
            f"the environment variable TFDS_DATA_DIR"
        )
    import tensorflow_datasets as tfds

    with damage_named(directory):
        builder = tfds.builder_from_directory(directory)
        class_names_of(builder)
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise ValueError(
            f"{directory} is prepared as {builder.info.file_format.value}, which cannot be read "
            f"without TensorFlow. Move it away or choose another directory, then prepare it with "
            f"`{prepare_command(name, data_dir)}`"
        )
    if (why := damage(directory)) is not None:
        raise _damaged(directory, why)
    return builder


@contextlib.contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Turns what TFDS and its formats raise over damaged files into an error that a reader can use.

    Args:
      directory: of the prepared data set.

    Raises:
      ValueError: in place of any error but those of permissions and memory; names the directory to
        delete and the command to prepare it anew.
    """
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    # There is no list of what they raise: protobuf's, JSON's, array_record's and their own errors.
    except Exception as error:
        why = damage(directory) or " ".join(f"{type(error).__name__}: {error}".split())
        raise _damaged(directory, why) from error


def _damaged(directory: Path, why: str) -> ValueError:
    *_, collection, name, _ = directory.parts
    of_folder = collection == "image_folder"
    command = prepare_command(
        f"{collection}:{name}" if of_folder else name, directory.parents[2 if of_folder else 1]
    )
    return ValueError(
        f"the data set in {directory} is damaged: {why}. Delete that directory and prepare it anew "
        f"with `{command}`"
    )


def class_names_of(builder: Any) -> tuple[str, ...]:
    """One name for each label: words where the data set has them, else what TFDS has."""
    words = (builder.info.metadata or {}).get(WORDS, {})
    return tuple(words.get(name, name) for name in builder.info.features["label"].names)


@functools.lru_cache(maxsize=8)
def source_of(directory: Path, split: str) -> Any:
    """A split's records by index, images still encoded; opened once in a process.

    Raises:
      ValueError: its files are damaged, as far as that shows before they are read.
    """
    import tensorflow_datasets as tfds

    with damage_named(directory):
        return tfds.builder_from_directory(directory).as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
        )


def read_prepared(
    name: str, data_dir: Path, image_size: int | None = None, *, splits: Iterable[str] | None = None
) -> Prepared:
    """Reads and decodes every image of a prepared data set.

    The decoded images are kept beside the records, as `decoded-SPLIT-SIZE.npz`: the next call reads
    those. They may be deleted at any time.

    Args:
      name: `"cifar10"`, `"cifar10_jpeg"`, `"tiny_imagenet"` or `"image_folder:NAME"`.
      data_dir: TFDS's data directory.
      image_size: height and width to average the images down to, in pixels; None: as stored.
      splits: names of those to read, which the data set must have; None: all.

    Raises:
      FileNotFoundError: it is not prepared in `data_dir`; the message has the command that does it.
      ValueError: it is prepared in a format that needs TensorFlow, it is damaged, `image_size` does
        not divide an image's size, or the images differ in size.
    """
    builder = open_prepared(name, data_dir)
    directory = Path(builder.data_dir)
    size = "full" if image_size is None else str(image_size)
    return Prepared(
        version=str(builder.version),
        class_names=class_names_of(builder),
        splits={
            split: cached(
                directory / f"decoded-{split}-{size}.npz",
                functools.partial(_read_split, builder, split, image_size),
            )
            for split in (builder.info.splits if splits is None else splits)
        },
    )


def _read_split(builder: Any, split: str, image_size: int | None) -> Images:
    directory = Path(builder.data_dir)
    if (why := damage(directory, whole=f"-{split}.")) is not None:
        raise _damaged(directory, why)
    source = source_of(directory, split)
    images: np.ndarray | None = None
    labels = np.empty(len(source), np.int32)
    first = ""
    for index, (name, encoded, label) in enumerate(_examples(source, directory)):
        image = decode(encoded, f"{name} in {directory}")
        if image_size is not None:
            image = box_downsample(image, image_size, name)
        if images is None:
            first = name
            images = np.empty((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"images must have one size to be held in memory, but {first} has "
                f"{images.shape[1]} x {images.shape[2]} pixels and {name} has "
                f"{image.shape[0]} x {image.shape[1]}; give an image_size that divides them "
                f"all, resize the files, or stream them: the ImageNet experiments take images of "
                f"all sizes with --stream (ab_jax.data.stream.load_stream)"
            )
        images[index] = image
        labels[index] = label
    if images is None:  # TFDS writes no empty split
        raise _damaged(directory, f"it has no records of {split}")
    return Images(images, labels)


def _examples(source: Any, directory: Path) -> Iterator[tuple[str, bytes, int]]:
    """Name, encoded image and label of each record of a split, in order."""
    for start in range(0, len(source), READ_AT_ONCE):
        indices = range(start, min(start + READ_AT_ONCE, len(source)))
        with damage_named(directory):
            examples = [
                (example["id"].decode(), bytes(example["image"]), int(example["label"]))
                for example in source.__getitems__(indices)
            ]
        yield from examples
