"""TFDS builder of Tiny ImageNet: 64 x 64 pixels, 200 classes, in its original layout.

    tiny-imagenet-200/train/n01443537/images/n01443537_0.JPEG    500 of each class
    tiny-imagenet-200/val/images/val_0.JPEG                      10,000, labelled by
    tiny-imagenet-200/val/val_annotations.txt
    tiny-imagenet-200/words.txt                                  what the classes are called

It may lie unpacked in a directory, in one archive, or in a directory of archives that hold a part
each. The images of its own test split have no labels and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from ab_jax.data.archives import ARCHIVE_SUFFIXES
from ab_jax.data.bad_images import BadImages
from ab_jax.data.image_folder import ImageFolder
from ab_jax.data.layout import LeftOut, check_class_names, check_utf8, is_hidden, shown
from ab_jax.data.pixels import decode
from ab_jax.data.prepared import WORDS
from ab_jax.data.sources import entries

CLASSES = 200
COUNTS = {"train": 500, "validation": 50}  # images of each class
_ANNOTATIONS = "val_annotations.txt"
_WORDS = "words.txt"


class TinyImagenet(ImageFolder, skip_registration=True):  # type: ignore[call-arg]
    """Tiny ImageNet: 100,000 training and 10,000 validation images, 64 x 64, 200 classes.

    Classes are WordNet ids, sorted; what `words.txt` calls them, where it is there, is kept among
    the metadata. See `ImageFolder` for the features and arguments.
    """

    name = "tiny_imagenet"
    _way_out = ", or take an undamaged copy"

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        self._labels, words = self._read_texts()
        counts: dict[str, Counter[str]] = {split: Counter() for split in COUNTS}
        seen: set[str] = set()
        bad = BadImages()
        for split in COUNTS:
            for name, class_name, encoded in self._images(split):
                if name in seen:
                    raise ValueError(f"{self._source} holds two files {shown(name)}")
                seen.add(name)
                with bad.noted(name):
                    decode(encoded, f"{shown(name)} in {self._source}")
                    counts[split][class_name] += 1
        bad.refuse(self._way_out)
        check_class_names([*counts["train"], *counts["validation"]], self._source)
        self._check_counts(counts)
        self.info.features["label"].names = sorted(counts["train"])
        words = {wnid: words[wnid] for wnid in words if wnid in counts["train"]}
        check_class_names(words.values(), self._source)
        self.info.metadata[WORDS] = words
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, class_name, encoded in self._images(split):
            yield name, {"image": encoded, "label": class_name, "id": name}

    def _entries(self) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
        """Every file of the source, its path that below `tiny-imagenet-200` if it is of a split."""
        sources = [self._source]
        if self._source.is_dir():
            archives = [
                path
                for path in self._source.iterdir()
                if path.name.endswith(ARCHIVE_SUFFIXES) and not is_hidden(path.name)
            ]
            # Beside other data, those named like it.
            named = [p for p in archives if "tiny" in p.name.lower()]
            sources = sorted(named or archives) or sources
        for source in sources:
            for path, read in entries(source):
                if isinstance(read, LeftOut) or is_hidden(path):
                    continue
                check_utf8(path, source)
                parts = PurePosixPath(path).parts
                starts = [i for i, part in enumerate(parts) if part in ("train", "val")]
                yield PurePosixPath(*parts[starts[0] if starts else 0 :]), read

    def _images(self, split: str) -> Iterator[tuple[str, str, bytes]]:
        """Name, class and bytes of each image of a split."""
        for path, read in self._entries():
            match path.parts:
                case ("train", class_name, "images", name) if split == "train":
                    yield f"train/{class_name}/{name}", class_name, read()
                case ("val", "images", name) if split == "validation":
                    if name not in self._labels:
                        raise ValueError(
                            f"{self._source}: {_ANNOTATIONS} has no line for {shown(name)}"
                        )
                    yield f"validation/{self._labels[name]}/{name}", self._labels[name], read()

    def _read_texts(self) -> tuple[dict[str, str], dict[str, str]]:
        """The class of each validation image, and the words for each class, in one pass."""
        found: dict[str, str] = {}
        for path, read in self._entries():
            if path.name in (_ANNOTATIONS, _WORDS):
                try:
                    found[path.name] = read().decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self._source}: {path.name} is no UTF-8 text") from error
                if len(found) == 2:
                    break
        if _ANNOTATIONS not in found:
            raise ValueError(
                f"{self._source} has no val/{_ANNOTATIONS}. --source is the folder "
                f"tiny-imagenet-200, an archive of it, or a directory with all of its archives."
            )
        labels = {}
        for line in filter(str.strip, found[_ANNOTATIONS].splitlines()):
            name, class_name, *_ = [*line.split(), ""]
            if not class_name:
                raise ValueError(f"{self._source}: {_ANNOTATIONS} names no class for {shown(name)}")
            labels[name] = class_name
        pairs = (line.partition("\t") for line in found.get(_WORDS, "").splitlines())
        return labels, {wnid: words.strip() for wnid, _, words in pairs if words.strip()}

    def _check_counts(self, counts: dict[str, Counter[str]]) -> None:
        for split, wanted in COUNTS.items():
            found = counts[split]
            if len(found) != CLASSES:
                raise ValueError(
                    f"{self._source} is not Tiny ImageNet: {split} has {len(found)} classes, not "
                    f"{CLASSES}. Is one of its parts missing?"
                )
            for class_name, count in sorted(found.items()):
                if count != wanted:
                    raise ValueError(
                        f"{self._source} is not Tiny ImageNet: {split} has {count} images of "
                        f"{class_name}, not {wanted}. Is one of its parts missing?"
                    )
        if odd := sorted(set(counts["train"]) ^ set(counts["validation"])):
            raise ValueError(
                f"{self._source}: train and validation must have the same classes, but {odd[0]} is "
                f"in only one of them ({len(odd)} such classes)."
            )
