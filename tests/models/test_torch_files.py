"""PyTorch's older files: what is read of them, and that nothing in them is ever run.

They are written by Python's own pickle with PyTorch's names (`torch_writer`), and forged in every
way that a pickle can be.
"""

import collections
import io
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ab_jax.models.tensor_pickles import unpickled
from ab_jax.models.torch_files import torch_places
from ab_jax.models.weight_files import WeightsError, read_array
from ab_jax.safetensors_header import MalformedError
from tests.models.torch_writer import Named, Storage, Tensor, save, state_dict, tensor


def read(path: Path) -> dict[str, np.ndarray]:
    places = torch_places(path)
    with path.open("rb") as file:
        return {name: read_array(file, place) for name, place in places.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "conv.weight": rng.normal(size=(4, 3, 2, 5)).astype(np.float32),
        "bn1.running_mean": rng.normal(size=4).astype(np.float32),
        "bn1.num_batches_tracked": np.array(int(rng.integers(2**62))),
        "fc.weight": rng.normal(size=(1, 7)).astype(np.float32),
    }


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_was_written_is_read(
    tmp_path: Path, arrays: dict[str, np.ndarray], order: str
) -> None:
    """Weights that came from TensorFlow lie as they did there, in another order of axes."""
    assert_same(read(save(tmp_path / "net.pth", state_dict(arrays, order))), arrays)


@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", ml_dtypes.bfloat16]
)
def test_every_dtype_is_read(tmp_path: Path, rng: np.random.Generator, dtype: Any) -> None:
    arrays = {"a": rng.integers(0, 100, (3, 4)).astype(dtype)}
    assert_same(read(save(tmp_path / "net.pth", state_dict(arrays))), arrays)


def test_views_of_one_storage_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.normal(size=(6, 4)).astype(np.float32)
    storage = tensor(data, "0").storage
    views = {
        "whole": Tensor(storage, 0, (6, 4), (4, 1)),
        "rows": Tensor(storage, 8, (2, 4), (4, 1)),
        "turned": Tensor(storage, 0, (4, 6), (1, 4)),
        "one": Tensor(storage, 23, (1, 1), (99, -3)),  # strides that say nothing
        "scalar": Tensor(storage, 5, (), ()),
    }
    expected = {
        "whole": data,
        "rows": data[2:4],
        "turned": data.T,
        "one": data[5:, 3:],
        "scalar": data[1, 1],
    }
    assert_same(read(save(tmp_path / "net.pth", views)), expected)


# What is refused


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    def check(message: str, state: Any, **changes: Any) -> None:
        path = save(tmp_path / "forged.pth", state, **changes)
        with pytest.raises(WeightsError, match=message) as error:
            torch_places(path)
        assert str(error.value).startswith(str(path))
        assert str(error.value).isascii()
        assert len(str(error.value)) < 600

    return check


class Call:
    """Calls something where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def test_nothing_is_run(
    tmp_path: Path, arrays: dict[str, np.ndarray], refused: Callable[..., None]
) -> None:
    marker = tmp_path / "marker"
    attacks = [Call(os.mkdir, str(marker)), Call(eval, f"__import__('os').mkdir({str(marker)!r})")]
    for attack in attacks:
        pickle.loads(pickle.dumps(attack, 2))
        assert marker.exists(), "an attack that would do nothing shows nothing"
        marker.rmdir()
        for state in (
            attack,
            {"a": attack},
            {**state_dict(arrays), "a": attack},
            {"a": Tensor(attack, 0, (1,), (1,))},
            {"a": Tensor(Storage("0", np.ones(1), "Double", attack), 0, (1,), (1,))},
        ):
            refused(r"would import '(posix|nt|__builtin__|builtins)\.(mkdir|eval)'", state)
            assert not marker.exists()
        for part in ("magic", "version", "machine", "keys"):
            refused("would import", state_dict(arrays), **{part: attack})
            assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (os.system, r"would import 'posix\.system'"),
        (np.float32, r"would import 'numpy\.float32'"),
        (np.ones(2), r"would import 'numpy\S+_reconstruct'"),
        (Path("x"), r"would import 'pathlib\.PosixPath'"),
        ({1, 2}, r"would import '__builtin__\.set'"),
        (b"bytes", r"would import '_codecs\.encode'"),
        (Call(collections.OrderedDict, [("a", 1)]), "calls what state dicts of tensors do not"),
        (Tensor(3, 0, (1,), (1,)), "calls what state dicts of tensors do not"),
        (Named("storage", "x"), "refers to what is no storage"),
        (Named("module", "os"), "refers to what is no storage"),
        (1.5, r"has the step b'G'"),
        (2**3000, r"has the step b'\\x8b'"),
        (3, "'a' in it is no tensor"),
        (["\u00e9"], "'a' in it is no tensor"),
        ({"state_dict": {}}, "'a' in it is no tensor"),
        ({3: 1}, "keys are no texts"),
    ],
)
def test_what_is_no_tensor_is_refused(
    refused: Callable[..., None], value: Any, message: str
) -> None:
    refused(message, {"a": value})


WORDS = np.arange(12, dtype=np.float32)


def view(offset: Any, shape: Any, strides: Any, **fields: Any) -> dict[str, Tensor]:
    storage = Storage("0", WORDS, **{"kind": "Float", "count": 12, **fields})
    return {"a": Tensor(storage, offset, shape, strides)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (view(0, (3, 2), (4, 1)), "does not lie there in one piece"),
        (view(0, (3, 4), (0, 1)), "does not lie there in one piece"),
        (view(0, (3, 4), (4, -1)), "does not lie there in one piece"),
        (view(0, (6,), (2,)), r"in one piece; save tensors after tensor\.contiguous"),
        (view(0, (3, 4), (4,)), "has no stride for each axis"),
        (view(0, (3, 4), [4, 1]), "has no stride for each axis"),
        (view(0, (3, 4), ("4", 1)), "has no stride for each axis"),
        (view(1, (3, 4), (4, 1)), "reaches beyond the 12 numbers"),
        (view(-1, (3, 4), (4, 1)), "reaches beyond the 12 numbers"),
        (view(0, (2**31 - 1,) * 3, ((2**31 - 1) ** 2, 2**31 - 1, 1)), "reaches beyond the 12"),
        (view(2**200, (3,), (1,)), "reaches beyond the 12 numbers"),
        (view(0, (2**40,), (1,)), "is of a shape that no array has"),
        (view(0, (-3, -4), (4, 1)), "is of a shape that no array has"),
        (view(0, (0,), (1,)), "is of a shape that no array has"),
        (view(0, (True,), (1,)), "is of a shape that no array has"),
        (view(0, (1,) * 33, (1,) * 33), "is of a shape that no array has"),
        (view(0, 12, 1), "is of a shape that no array has"),
        (view("0", (12,), (1,)), "calls what state dicts of tensors do not"),
        (view(0, (12,), (1,), kind="Bool"), r"would import 'torch\.BoolStorage'"),
        (view(0, (12,), (1,), kind="Double"), "is 12 numbers of float64, for which there are no"),
        (view(0, (11,), (1,), count=11), "'0' is 11 numbers of float32, for which there are no"),
        (view(0, (13,), (1,), count=13), "'0' is 13 numbers of float32, for which there are no"),
        (view(0, (12,), (1,), count=2**62), "for which there are no data in the file"),
        (view(0, (12,), (1,), count=-12), "refers to what is no storage"),
        (view(0, (12,), (1,), count="12"), "refers to what is no storage"),
        (
            {**view(0, (12,), (1,)), "b": view(0, (6,), (1,), kind="Double", count=6)["a"]},
            "one of its storages is described in two ways",
        ),
        ([], "it is no state dict"),
        (5, "it is no state dict"),
        (view(0, (12,), (1,))["a"], "it is no state dict"),
    ],
)
def test_tensors_that_are_not_in_the_file_are_refused(
    refused: Callable[..., None], state: Any, message: str
) -> None:
    refused(message, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 5}, "it is no file by torch.save"),
        ({"magic": "\u00e9"}, "it is no file by torch.save"),
        ({"version": 1002}, "not of version 1001"),
        ({"machine": {"little_endian": False}}, "not in little endian"),
        ({"machine": {}}, "not in little endian"),
        ({"machine": None}, "not in little endian"),
        ({"keys": []}, "its list of storages is not that"),
        ({"keys": ["0", "0"]}, "its list of storages is not that"),
        ({"keys": ["0", "1"]}, "its list of storages is not that"),
        ({"keys": [0]}, "its list of storages is not that"),
        ({"keys": "0"}, "its list of storages is not that"),
        ({"lengths": 1}, "for which there are no data"),
        ({"lengths": -1}, "for which there are no data"),
    ],
)
def test_what_stands_around_the_tensors_is_compared(
    refused: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    refused(message, view(0, (12,), (1,)), **changes)


# Of one pair, a pair of that twice, and so on.
SHARED = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        # A key that is nested deeper than its hash can be taken, and a value that as text is
        # longer than any memory: both end Python's own reader, or whoever shows what it has.
        (b"})" + b"\x85" * 300_000 + b"Ns.", "keys are no texts"),
        (b"})q\0" + SHARED + b"Ns.", "keys are no texts"),
        (b")q\0" + SHARED + b".", "it is no state dict"),
        (b"X\x01\0\0\0ar\xff\xff\xff\xff.", "it is no state dict"),  # a memo of that length
        (b"X\xff\xff\xff\xffa.", "damaged, cut off or too long"),
        (b"\x8d" + b"\xff" * 7 + b"\x7fa.", r"has the step b'\\x8d'"),
        (b"(ios\nsystem\n.", r"has the step b'i'"),
        (b"(cos\nsystem\nX\x01\0\0\0ao.", r"would import 'os\.system'"),
        (b"X\x02\0\0\0osX\x06\0\0\0system\x93.", r"has the step b'\\x93'"),
        (b"\x82\x01.", r"has the step b'\\x82'"),
        (b"Pos\n.", r"has the step b'P'"),
        (b"cos\n.", "damaged, cut off or too long"),
        (b"}X\x01\0\0\0aNX\x01\0\0\0aN(u.", "sets items of what is no dictionary"),
        (b"}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "'a' stands in it twice"),
        (b"}(X\x01\0\0\0au.", "damaged, cut off or too long"),
        (b"](X\x01\0\0\0aNu.", "sets items of what is no dictionary"),
        (b"NX\x01\0\0\0aNs.", "sets items of what is no dictionary"),
        (b"]}b.", "sets the state of what is no dictionary"),
        (b"](h\0e.", "damaged, cut off or too long"),
        (b"}Na.", "damaged, cut off or too long"),
        (b"N\x81.", r"has the step b'\\x81'"),
        (b"NR.", "damaged, cut off or too long"),
        (b"s.", "damaged, cut off or too long"),
        (b"u.", "damaged, cut off or too long"),
        (b".", "damaged, cut off or too long"),
        (b"N\x87.", "damaged, cut off or too long"),
        (b"c\xff\nx\n.", "damaged, cut off or too long"),
        (b"X\x01\0\0\0\xff.", "damaged, cut off or too long"),
        (b"S'\\R'\n.", "has the step b'S'"),
        (b"NN.", "damaged, cut off or too long"),
        (b"\x00.", r"has the step b'\\x00'"),
        (b"", "damaged, cut off or too long|it is no state dict"),
        (b"N" * 2**20, "damaged, cut off or too long"),
    ],
)
def test_steps_of_pickles_that_are_not_those_of_tensors(
    refused: Callable[..., None], steps: bytes, message: str
) -> None:
    start = time.process_time()
    refused(message, {}, pickle=steps)
    assert time.process_time() - start < 10, "seconds"


def test_a_file_that_is_cut_off_anywhere_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    path = save(tmp_path / "net.pth", state_dict(arrays))
    data = path.read_bytes()
    for end in (*range(len(data)), len(data) + 1):
        path.write_bytes((data + b"\0")[:end])
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            torch_places(path)
    path.write_bytes(data)
    assert_same(read(path), arrays)


def test_the_newer_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightsError, match=r"a zip archive.*safetensors\.torch\.save_file"):
        torch_places(path)


STEPS = [  # those that are followed, each with what may stand behind it
    *((step, [b""]) for step in (b"(", b"N", b"\x88", b"\x89", b")", b"\x85", b"\x86", b"\x87")),
    *((step, [b""]) for step in (b"t", b"]", b"a", b"e", b"}", b"s", b"u", b"Q", b"R", b"b", b".")),
    *((step, [b"\0", b"\1", b"\2", b"\x80"]) for step in (b"q", b"h", b"K", b"\x80")),
    *((step, [b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\x7f"]) for step in (b"r", b"j", b"J")),
    (b"M", [b"\0\1"]),
    (b"\x8a", [b"\0", b"\x02\0\1", b"\xff" * 256]),
    (b"X", [b"\0\0\0\0", b"\1\0\0\0a", b"\x07\0\0\0storage", b"\xff\xff\xff\xff"]),
    (b"c", [b"torch\nFloatStorage\n", b"collections\nOrderedDict\n", b"os\nsystem\n", b"\n"]),
    (b"c", [b"torch._utils\n_rebuild_tensor_v2\n"]),
]


def test_programs_of_any_steps_are_followed_or_refused(rng: np.random.Generator) -> None:
    """A pickle is a program: here of steps drawn at random, with no more memory than it has."""
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(20_000):
        program = b""
        for step in rng.integers(len(STEPS), size=rng.integers(1, 40)):
            name, rest = STEPS[step]
            program += name + rest[rng.integers(len(rest))]
        refusal = ""
        try:
            unpickled(io.BytesIO(program))
        except MalformedError as error:
            refusal = str(error)
        assert refusal.isascii()
        assert len(refusal) < 500
        outcomes["refused" if refusal else "followed"] += 1
    assert outcomes["followed"] > 20
    assert outcomes["refused"] > 1000


def test_a_short_pickle_makes_no_large_value() -> None:
    """Doubled a thousand times by its memo: as shared tuples, which take nothing, or refused."""
    program = b")q\0" + b"h\0h\0\x86q\0" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError, match="damaged, cut off or too long"):
            unpickled(io.BytesIO(program))  # it never stops
        assert tracemalloc.get_traced_memory()[1] < 100 * len(program)
    finally:
        tracemalloc.stop()
