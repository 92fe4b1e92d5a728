"""PyTorch's older files (before 1.6): where the tensors of a state dict lie.

    a magic number, a version, a note on the machine   three pickles
    the state dict                                     a pickle; tensors are parts of storages
    keys of the storages                               a pickle: a list
    the storages, in that order                        for each its length, 8 bytes, and its numbers

Format: https://github.com/pytorch/pytorch/blob/v1.5.0/torch/serialization.py (`_legacy_save`).
"""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from ab_jax.models.tensor_pickles import Storage, Tensor, unpickled
from ab_jax.models.weight_files import opened
from ab_jax.safetensors_header import MalformedError, Place, shown

_MAX_HEADER = 2**20  # bytes of all the pickles; ResNet-152's have 150 thousand
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b"PK\x03\x04"


def torch_places(path: Path) -> dict[str, Place]:
    """The arrays of a PyTorch state dict by name; places are counted from the file's first byte.

    Args:
      path: of a file by `torch.save` as it was before PyTorch 1.6, or with
        `_use_new_zipfile_serialization=False`.

    Raises:
      WeightsError: it is no such file, malformed, or holds what is no tensor in one piece.
        OSError: it cannot be read.
    """
    with opened(path) as file:
        return _places(file)


def _places(file: BinaryIO) -> dict[str, Place]:
    size = os.fstat(file.fileno()).st_size
    header = io.BytesIO(file.read(min(size, _MAX_HEADER)))
    if header.getvalue().startswith(_ZIP):
        raise MalformedError(
            "it is of PyTorch's newer format, a zip archive. Write it as safetensors, in PyTorch: "
            "safetensors.torch.save_file(torch.load('name.pth', weights_only=True), "
            "'name.safetensors')"
        )
    if unpickled(header) != _MAGIC:
        raise MalformedError("it is no file by torch.save")
    if unpickled(header) != _VERSION:
        raise MalformedError(f"it is not of version {_VERSION} of torch.save's format")
    machine = unpickled(header)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise MalformedError("its numbers are not in little endian")
    tensors, keys = unpickled(header), unpickled(header)
    if not isinstance(tensors, dict):
        raise MalformedError("it is no state dict, the names and tensors of model.state_dict()")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise MalformedError(f"{shown(name)} in it is no tensor; save model.state_dict() alone")
    begins = _begins(file, header.tell(), size, keys, [t.storage for t in tensors.values()])
    return {
        name: Place(
            tensor.storage.dtype,
            tensor.shape,
            begins[tensor.storage.key] + tensor.offset * tensor.storage.dtype.itemsize,
            tensor.axes,
        )
        for name, tensor in tensors.items()
    }


def _begins(
    file: BinaryIO, begin: int, size: int, keys: Any, storages: list[Storage]
) -> dict[str, int]:
    """The first byte of each storage; together they reach the end of the file."""
    by_key = {storage.key: storage for storage in storages}
    if any(by_key[storage.key] != storage for storage in storages):
        raise MalformedError("one of its storages is described in two ways")
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or sorted(keys) != sorted(by_key):
        raise MalformedError("its list of storages is not that of its tensors")
    found = {}
    for storage in (by_key[key] for key in keys):
        file.seek(begin)
        count = int.from_bytes(file.read(8), "little")
        found[storage.key] = begin + 8
        begin += 8 + storage.count * storage.dtype.itemsize
        if count != storage.count or begin > size:
            raise MalformedError(
                f"storage {shown(storage.key)} is {storage.count} numbers of {storage.dtype}, for "
                f"which there are no data in the file"
            )
    if begin != size:
        raise MalformedError(f"its arrays end at byte {begin}, and it has {size}")
    return found
