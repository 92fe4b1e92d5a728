"""State dicts written as PyTorch did before 1.6, without PyTorch: by Python's own pickle.

Its names are put where pickle looks for them, for as long as it writes.
"""

import dataclasses
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {
    "<f8": "Double",
    "<f4": "Float",
    "<f2": "Half",
    "<i8": "Long",
    "<i4": "Int",
    "<i2": "Short",
    "|i1": "Char",
    "|u1": "Byte",
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers side by side; `kind` and `count` are what is said of them."""

    key: str
    data: np.ndarray
    kind: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, in numbers of it."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True)
class Named:
    """What stands for itself in a pickle: a name that would be imported, or a persistent one."""

    module: str
    name: str


def tensor(array: np.ndarray, key: str, order: str = "C") -> Tensor:
    """The array as it is, and alone in its storage; its numbers lie in that order."""
    data = np.asarray(array)
    storage = Storage(key, data.ravel(order), KINDS.get(data.dtype.str, "BFloat16"), data.size)
    lying = np.empty(data.shape, data.dtype, order)
    strides = tuple(stride // data.itemsize for stride in lying.strides)
    return Tensor(storage, 0, data.shape, strides)


def state_dict(arrays: Mapping[str, np.ndarray], order: str = "C") -> OrderedDict[str, Any]:
    """Tensors by name, and the versions of modules that PyTorch notes beside them."""
    state: Any = OrderedDict(
        (name, tensor(array, str(1000 + 7 * i % 1000), order))
        for i, (name, array) in enumerate(arrays.items())
    )
    state._metadata = OrderedDict({"": {"version": 1}, "bn1": {"version": 2}})
    return state


def save(path: Path, state: Any, **changes: Any) -> Path:
    """As `torch.save` did.

    Args:
      state: a state dict, or what is to be in its place.
      **changes: `magic`, `version`, `machine`, `keys`, or `pickle`, the bytes of the state, in
        place of what should be there; `lengths`, added to those before the storages.
    """
    found: dict[str, Storage] = {}
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}
    with mock.patch.dict(sys.modules, _modules()):
        stream = io.BytesIO()
        _Pickler(stream, found).dump(state)
    keys = sorted(found)
    parts = [
        *(
            pickle.dumps(changes.get(name, value), 2)
            for name, value in (("magic", MAGIC), ("version", 1001), ("machine", machine))
        ),
        changes.get("pickle", stream.getvalue()),
        pickle.dumps(changes.get("keys", keys), 2),
    ]
    for key in keys:
        length = found[key].data.size + changes.get("lengths", 0)
        parts += [length.to_bytes(8, "little"), found[key].data.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, found: dict[str, Storage]) -> None:
        super().__init__(stream, 2)
        self.found = found

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Named):
            return (value.module, value.name)
        if not isinstance(value, Storage):
            return None
        self.found[value.key] = value
        kind = getattr(sys.modules["torch"], f"{value.kind}Storage")
        return ("storage", kind, value.key, "cpu", value.count, None)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        view = (value.storage, value.offset, value.shape, value.strides, False, OrderedDict())
        return rebuild, view


def _modules() -> dict[str, types.ModuleType]:
    def _rebuild_tensor_v2() -> None: ...

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for kind in (*KINDS.values(), "BFloat16", "Bool"):
        name = f"{kind}Storage"
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    torch._utils = utils
    return {"torch": torch, "torch._utils": utils}
