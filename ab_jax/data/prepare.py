"""Prepares a data set for `ab_jax.data.load`, once.

    python -m ab_jax.data.prepare cifar10_jpeg --source=cifar10_jpeg.tar.xz
    python -m ab_jax.data.prepare tiny_imagenet --source=DIRECTORY
    python -m ab_jax.data.prepare image_folder --source=DIRECTORY_OR_ARCHIVE --name=NAME
    python -m ab_jax.data.prepare imagenet2012 --source=DIRECTORY
    python -m ab_jax.data.prepare cifar10

Writes `DATA_DIR/NAME/VERSION` in array_record format. What is prepared already is left as it is.
Only `imagenet2012` and `cifar10`, TFDS's official builders, need TensorFlow, and only here:
reading what they wrote does not.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import tyro

from ab_jax.data.checksums import write_checksums
from ab_jax.data.prepared import find_prepared, resolve_data_dir
from ab_jax.files import writing

DataDir = Annotated[
    Path | None,
    tyro.conf.arg(help="Where to write. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."),
]
Source = Annotated[
    Path, tyro.conf.arg(help="A directory, or a .zip or .tar archive (.gz, .xz, .bz2).")
]
SkipBad = Annotated[
    bool,
    tyro.conf.arg(help="Leave out images that cannot be read, and list them in metadata.json."),
]
FolderName = Annotated[
    str, tyro.conf.arg(help="Name to load it by, as image_folder:NAME: letters, digits and _.")
]


def prepare_cifar10_jpeg(source: Source, data_dir: DataDir = None) -> Path:
    """CIFAR-10 re-encoded as JPEG, from train/class/file.jpg and test/class/file.jpg.

    Args:
      source: a directory, or a .zip or .tar archive.
      data_dir: where to write; None: TFDS's default.

    Returns:
      The prepared data set's directory.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: it is not this data set, or a file in it is damaged.
    """
    return _prepare_folder("cifar10_jpeg", source, data_dir)


def prepare_tiny_imagenet(source: Source, data_dir: DataDir = None) -> Path:
    """Tiny ImageNet in its original layout, unpacked, or in one archive or several.

    Args:
      source: the folder tiny-imagenet-200, an archive of it, or a directory with its archives.
      data_dir: where to write; None: TFDS's default.

    Returns:
      The prepared data set's directory.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: it is not this data set, or a file in it is damaged.
    """
    return _prepare_folder("tiny_imagenet", source, data_dir)


def prepare_image_folder(
    source: Source, name: FolderName, data_dir: DataDir = None, skip_bad: SkipBad = False
) -> Path:
    """Anyone's images, laid out as split/class/file: train, and test or val or both.

    Args:
      source: a directory, or a .zip or .tar archive, of PNG, JPEG, WebP or BMP files.
      name: what to load them by, as `image_folder:NAME`.
      data_dir: where to write; None: TFDS's default.
      skip_bad: whether to leave out images that cannot be read. Which they are and why is listed in
        the prepared directory, in `metadata.json` as `left_out`.

    Returns:
      The prepared data set's directory.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: `name` is not a word, or `source` is not laid out so, or files are damaged:
        all of them are named, the first 20 in full.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(f"--name={name} must be a letter, then letters, digits and _")
    return _prepare_folder(f"image_folder:{name}", source, data_dir, skip_bad)


def prepare_cifar10(data_dir: DataDir = None) -> Path:
    """The original CIFAR-10, downloaded by TFDS's official builder; needs TensorFlow.

    Args:
      data_dir: where to write; None: TFDS's default.

    Returns:
      The prepared data set's directory.

    Raises:
      ModuleNotFoundError: TensorFlow is not installed.
    """
    return _prepare_official("cifar10", data_dir)


def prepare_imagenet2012(
    source: Annotated[
        Path, tyro.conf.arg(help="Where ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar lie.")
    ],
    data_dir: DataDir = None,
) -> Path:
    """ImageNet (ILSVRC 2012), by TFDS's official builder; needs TensorFlow.

    Args:
      source: the directory of the two archives, which image-net.org gives to those it has allowed.
      data_dir: where to write; None: TFDS's default.

    Returns:
      The prepared data set's directory.

    Raises:
      FileNotFoundError: an archive is missing.
      ModuleNotFoundError: TensorFlow is not installed.
    """
    for archive in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        if not (source / archive).is_file():
            raise FileNotFoundError(
                f"there is no {archive} in {source}. Download it from image-net.org, or correct "
                f"--source"
            )
    return _prepare_official("imagenet2012", data_dir, manual_dir=source)


def _prepare_official(name: str, data_dir: Path | None, manual_dir: Path | None = None) -> Path:
    data_dir = resolve_data_dir(data_dir)
    if (directory := _already_prepared(name, data_dir)) is not None:
        return directory
    if importlib.util.find_spec("tensorflow") is None:
        instead = " cifar10_jpeg needs none for either" if name == "cifar10" else ""
        raise ModuleNotFoundError(
            f"TFDS's official {name} builder needs TensorFlow: `pip install tensorflow`, prepare, "
            f"and uninstall it again if you like, for reading needs none.{instead}"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    with _writing(name, data_dir):
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        )
        write_checksums(Path(builder.data_dir))
    return Path(builder.data_dir)


def _prepare_folder(name: str, source: Path, data_dir: Path | None, skip_bad: bool = False) -> Path:
    from ab_jax.data.image_folder import Cifar10Jpeg, ImageFolder
    from ab_jax.data.sources import check_source
    from ab_jax.data.tiny_imagenet import TinyImagenet

    data_dir = resolve_data_dir(data_dir)
    check_source(source)
    if (directory := _already_prepared(name, data_dir)) is not None:
        return directory
    builder: ImageFolder
    if name == "cifar10_jpeg":
        builder = Cifar10Jpeg(source=source, data_dir=data_dir)
    elif name == "tiny_imagenet":
        builder = TinyImagenet(source=source, data_dir=data_dir)
    else:
        folder = name.partition(":")[2]
        builder = ImageFolder(source=source, data_dir=data_dir, config=folder, skip_bad=skip_bad)
    with _writing(name, data_dir):
        builder.download_and_prepare(file_format="array_record")
        write_checksums(Path(builder.data_dir))
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples} images")
    return Path(builder.data_dir)


@contextlib.contextmanager
def _writing(name: str, data_dir: Path) -> Iterator[None]:
    """A disk that is full becomes an error that says so, and no directory is left without files.

    TFDS takes away what it wrote. The error of the system comes as a text in a RuntimeError of
    array_record's, or in whatever TFDS makes of it.
    """
    downloads = data_dir / "downloads"
    below = [data_dir.joinpath(*name.split(":")), data_dir.joinpath(name.partition(":")[0])]
    directories = [downloads / "extracted", downloads, *below, data_dir]
    new = [directory for directory in directories if not directory.exists()]
    try:
        yield
    except BaseException as error:
        for directory in new:
            with contextlib.suppress(OSError):  # which it is where there is something in it
                directory.rmdir()
        if isinstance(error, OSError | RuntimeError):
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(number) in str(error):
                    with writing(below[0]):
                        raise OSError(number, os.strerror(number)) from error
        raise


def _already_prepared(name: str, data_dir: Path) -> Path | None:
    directory = find_prepared(name, data_dir)
    if directory is not None:
        print(
            f"{name} is already prepared in {directory}; delete that directory to prepare it anew"
        )
    return directory


def main(args: list[str] | None = None) -> None:
    """Runs the command line; what the user can mend ends it with one line on stderr."""
    commands: dict[str, Callable[..., Path]] = {
        "cifar10_jpeg": prepare_cifar10_jpeg,
        "tiny_imagenet": prepare_tiny_imagenet,
        "image_folder": prepare_image_folder,
        "imagenet2012": prepare_imagenet2012,
        "cifar10": prepare_cifar10,
    }
    try:
        directory = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=args,
            prog="python -m ab_jax.data.prepare",
            description=__doc__,
            use_underscores=True,
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"ready: {directory}")


if __name__ == "__main__":
    main()
