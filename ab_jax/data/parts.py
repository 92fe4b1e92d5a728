"""Which records of a prepared data set make up the training, validation and test part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Part(NamedTuple):
    """A run of a split's records, in the stored order: those from `start` up to `stop`."""

    split: str
    start: int
    stop: int


def cut(
    name: str, sizes: Mapping[str, int], validation: int | None, default: int
) -> tuple[Part, Part, Part]:
    """Training, validation and test part.

    The test split is the test part, else the validation split. With both, the validation split is
    the validation part; else that is cut from the end of the training split.

    Args:
      name: of the data set, for the errors.
      sizes: number of images by split.
      validation: number of images to cut off; None: `default` where they are cut off at all.
      default: see there.

    Raises:
      ValueError: there is no training split, or neither of the others; or a `validation` that
        leaves no training image, or that a data set with splits of its own has no use for.
    """
    if "train" not in sizes or len(sizes) < 2:
        raise ValueError(
            f"{name} has the splits {', '.join(sizes) or 'of nothing'}: train is needed, and test "
            f"or validation. Prepare it again with these."
        )
    n = sizes["train"]
    if "validation" in sizes and "test" in sizes:
        if validation is not None:
            raise ValueError(
                f"{name} has a validation and a test split of its own: leave out "
                f"validation={validation}"
            )
        own = Part("validation", 0, sizes["validation"])
        return Part("train", 0, n), own, Part("test", 0, sizes["test"])
    test = "test" if "test" in sizes else "validation"
    if validation is None:
        validation = default
    if not 0 <= validation < n:
        raise ValueError(
            f"validation={validation} must be 0 or more and less than the {n} training images of "
            f"{name}"
        )
    return (
        Part("train", 0, n - validation),
        Part("train", n - validation, n),
        Part(test, 0, sizes[test]),
    )
