"""Files of weights from strangers: what is in them, and what is refused before it is read.

HDF5 files are written by h5py, safetensors by its own library and PyTorch's by `torch_writer`, all
of a network of a few numbers, so that thousands of damaged ones can be read; the values come back
as they were written.
"""

import itertools
import json
import os
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ab_jax.models.pretrained import load_pretrained
from ab_jax.models.weight_files import WeightsError
from tests.models import torch_writer
from tests.mutants import damaged

COUNT = 1500  # mutants of each format
PEAK = 2**19  # bytes that Python and NumPy may hold beyond 40 times the file's own

LAYERS = {  # of ours: its shape, and its names in Keras and in timm
    "stem/kernel": ((3, 3, 3, 2), "conv1/kernel", "conv_stem.weight"),
    "block0/depthwise/kernel": ((3, 3, 1, 2), "conv_dw_1/kernel", "blocks.0.0.conv_dw.weight"),
    "block0/pointwise/kernel": ((1, 1, 2, 4), "conv_pw_1/kernel", "blocks.0.0.conv_pw.weight"),
    "head/kernel": ((4, 3), "conv_preds/kernel", "classifier.weight"),
    "head/bias": ((3,), "conv_preds/bias", "classifier.bias"),
}
NORMS = {
    "stem_norm": (2, "conv1_bn", "bn1"),
    "block0/pointwise_norm": (4, "conv_pw_1_bn", "blocks.0.0.bn2"),
}
MINIMAL = {"params": {"block0": {}}, "batch_stats": {}}
PARTS = {
    "scale": ("params", "gamma", "weight"),
    "bias": ("params", "beta", "bias"),
    "mean": ("batch_stats", "moving_mean", "running_mean"),
    "var": ("batch_stats", "moving_variance", "running_var"),
}


@pytest.fixture
def variables(rng: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def put(collection: str, path: str, shape: tuple[int, ...]) -> None:
        *parents, leaf = path.split("/")
        branch = found[collection]
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = rng.normal(size=shape).astype(np.float32)

    for path, (shape, *_) in LAYERS.items():
        put("params", path, shape)
    for layer, (width, *_) in NORMS.items():
        for part, (collection, *_) in PARTS.items():
            put(collection, f"{layer}/{part}", (width,))
    return found


def named(variables: dict[str, Any], which: int) -> dict[str, np.ndarray]:
    """The arrays as Keras (1) or timm (2) has them, by their names there."""

    def at(collection: str, path: str) -> np.ndarray:
        value = variables[collection]
        for key in path.split("/"):
            value = value[key]
        return np.asarray(value)

    arrays = {names[which]: at("params", path) for path, names in LAYERS.items()}
    if which == 1:
        arrays["conv_dw_1/kernel"] = arrays["conv_dw_1/kernel"].swapaxes(2, 3)
    else:
        turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
        arrays = {name: x.transpose(turned[x.ndim]) for name, x in arrays.items()}
    for layer, names in NORMS.items():
        for part, (collection, *theirs) in PARTS.items():
            name = f"{names[which]}{'/' if which == 1 else '.'}{theirs[which - 1]}"
            arrays[name] = at(collection, f"{layer}/{part}")
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def write_keras(path: Path, variables: dict[str, Any], dtype: str = "<f4") -> Path:
    """In the layout of Keras applications' files, attributes included."""
    with h5py.File(path, "w") as file:
        arrays = named(variables, 1)
        layers = sorted({name.split("/")[0] for name in arrays})
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"] = "tensorflow"
        for layer in layers:
            group = file.create_group(layer)
            inner = [name for name in arrays if name.startswith(f"{layer}/")]
            group.attrs["weight_names"] = [f"{name}:0" for name in inner]
            for name in inner:
                group.create_dataset(f"{name}:0", data=arrays[name], dtype=dtype)
    return path


def write_timm(path: Path, variables: dict[str, Any], dtype: Any = np.float32) -> Path:
    arrays = {name: array.astype(dtype) for name, array in named(variables, 2).items()}
    arrays["bn1.num_batches_tracked"] = np.array(7)
    save_file(arrays, path, {"format": "pt"})
    return path


def write_torch(path: Path, variables: dict[str, Any]) -> Path:
    arrays = {**named(variables, 2), "bn1.num_batches_tracked": np.array(7)}
    return torch_writer.save(path, torch_writer.state_dict(arrays, "F"))


def other(variables: dict[str, Any]) -> dict[str, Any]:
    """A network of the same shapes, whose weights are to be replaced."""
    return jax.tree.map(np.zeros_like, variables)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_every_float_of_hdf5_is_read(tmp_path: Path, variables: dict[str, Any], dtype: str) -> None:
    path = write_keras(tmp_path / "net.h5", variables, dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), variables)
    found = load_pretrained(path, other(variables))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_float_of_safetensors_is_read(
    tmp_path: Path, variables: dict[str, Any], dtype: Any
) -> None:
    path = write_timm(tmp_path / "net.safetensors", variables, dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), variables)
    found = load_pretrained(path, other(variables))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_groups_of_many_members_are_read(tmp_path: Path, variables: dict[str, Any]) -> None:
    """Their tables are trees of several levels; the names that are too many say all were found."""
    path = write_keras(tmp_path / "net.h5", variables)
    names = [f"more{i}" for i in range(700)]
    with h5py.File(path, "r+") as file:
        for name in names:
            file.create_dataset(f"{name}/kernel:0", data=np.ones(1, np.float32))
    with pytest.raises(WeightsError, match=r"700 unknown to the network: more0/kernel, more1/k"):
        load_pretrained(path, other(variables))


# What is refused


@pytest.fixture
def refused(tmp_path: Path, variables: dict[str, Any]) -> Callable[[Path, str], None]:
    def check(path: Path, message: str) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(WeightsError, match=message) as error:
                load_pretrained(path, other(variables))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert str(error.value).startswith(str(path))
        assert str(error.value).isascii()
        assert peak < 2**20 + 2 * path.stat().st_size

    return check


def replace(file: Any, **options: Any) -> None:
    """The stem's kernel, stored in another way."""
    data = file["conv1/conv1/kernel:0"][()]
    del file["conv1/conv1/kernel:0"]
    options = {"data": data, "shape": data.shape, "dtype": "<f4", **options}
    file["conv1/conv1"].create_dataset("kernel:0", **options)


def relink(file: Any, link: Any) -> None:
    del file["conv1/conv1/kernel:0"]
    file["conv1/conv1/kernel:0"] = link


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((3, 3, 3, 2), "<f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (3, 3, 3, 2))
    del file["conv1/conv1/kernel:0"]
    file.create_virtual_dataset("conv1/conv1/kernel:0", layout)


KERNEL = r"'conv1/conv1/kernel:0'"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda f: relink(f, h5py.ExternalLink("/etc/passwd", "/x")), "'conv1/conv1' has links to"),
        (lambda f: relink(f, h5py.SoftLink("/conv1_bn")), f"{KERNEL} is a soft link"),
        (lambda f: f.update(loop=h5py.SoftLink("/")), "'loop' is a soft link"),
        (lambda f: f["conv1"].update(loop=f["/"]), "'conv1/kernel' stands in it twice"),
        (lambda f: replace(f, external=[("/etc/passwd", 0, 216)], data=None), "in other files"),
        (virtual, f"the data of {KERNEL} are stored in other data sets"),
        (
            lambda f: replace(f, compression="gzip"),
            f"the data of {KERNEL} are .*filtered.*h5repack",
        ),
        (lambda f: replace(f, chunks=(1, 1, 1, 1)), f"the data of {KERNEL} are stored in chunks"),
        (lambda f: replace(f, data=None), f"{KERNEL} is float32.*no data in the file"),
        (lambda f: replace(f, data=None, shape=(2**30,)), f"{KERNEL} is float32.*no data in the"),
        (lambda f: replace(f, data=None, shape=(2**40, 2**20)), f"{KERNEL} is of shape"),
        (lambda f: replace(f, data=None, shape=(3, 0)), f"{KERNEL} is of shape"),
        (lambda f: replace(f, data=h5py.Empty("<f4"), shape=None), f"{KERNEL} is of no shape"),
        (lambda f: replace(f, dtype="<i4"), f"{KERNEL} holds no floating-point"),
        (lambda f: replace(f, dtype=np.longdouble), f"{KERNEL} holds no floating-point"),
        (lambda f: replace(f, dtype=h5py.ref_dtype, data=None), f"{KERNEL} holds no floating-po"),
        (lambda f: replace(f, dtype=h5py.string_dtype(), data=None), f"{KERNEL} holds no float"),
        (lambda f: replace(f, dtype=[("a", "<f4")], data=None), f"{KERNEL} holds no floating-po"),
        (lambda f: relink(f, np.dtype("<f4")), f"{KERNEL} is neither a group nor a data set"),
        (
            lambda f: replace(f, data=np.zeros((3, 3, 3, 3)), shape=None),
            r"kernel \(3, 3, 3, 3\), n",
        ),
        (lambda f: f.update(conv_preds2=1.0), "1 unknown to the network: conv_preds2"),
        (lambda f: f["conv1"].update({"kernel": 1.0}), "'conv1/kernel' stands in it twice"),
        (
            lambda f: replace(f, data=np.full((3, 3, 3, 2), np.nan)),
            "conv1/kernel holds what is not",
        ),
        (lambda f: f.update({"a\x1b\n": 1.0}), r"unknown to the network: a\\x1b\\n"),
        (
            lambda f: f.pop("conv_preds"),
            "2 missing in the file: conv_preds/bias, conv_preds/kernel",
        ),
        (lambda f: f.attrs.pop("layer_names"), r"model\.save\('name\.h5'\)"),
    ],
)
def test_what_keras_does_not_write_is_refused(
    tmp_path: Path,
    variables: dict[str, Any],
    refused: Callable[[Path, str], None],
    forge: Callable[[Any], Any],
    message: str,
) -> None:
    path = write_keras(tmp_path / "net.h5", variables)
    with h5py.File(path, "r+") as file:
        forge(file)
    refused(path, message)


def test_newer_forms_of_hdf5_are_refused_with_the_way_out(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    path = tmp_path / "net.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["layer_names"] = [b"conv1"]
    refused(path, r"of a form that Keras does not write.*model\.save")


def test_groups_in_circles_and_in_many_places_end(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    """A few links can say of a group that it lies in millions of places."""
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv1"]
        file.create_group("conv1")["loop"] = file["/"]
    refused(path, "lies in more than 16 groups")
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv1"]
        groups = [file.create_group(f"group{i}") for i in range(4)]
        for outer, inner in itertools.pairwise(groups):
            for i in range(300):
                outer[f"link{i}"] = inner
    with pytest.raises(WeightsError, match="says more than 16777216 bytes of its arrays"):
        load_pretrained(path, MINIMAL)


def forged(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])
    return path


STEM = "conv_stem.weight"


def swapped(header: dict[str, Any]) -> str:
    return f"{json.dumps(header)[:-1]}, {json.dumps(STEM)}: {json.dumps(header['bn1.bias'])}}}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: "{" * 9, "its header is no JSON"),
        (lambda h: "[]", "does not begin with {"),
        (lambda h: '{"a":' * 99_999, "its header is no JSON"),
        (swapped, f"its header has '{STEM}' twice"),
        (lambda h: h.update({"a\0": h.pop(STEM)}), r"its header has 'a\\x00', a key with what"),
        (lambda h: h[STEM].update(shape=[2**62, 2**62]), f"'{STEM}' is of shape"),
        (lambda h: h[STEM].update(shape=[2**31 - 1] * 3), f"'{STEM}' is F32 of shape"),
        (lambda h: h[STEM].update(shape=[2, 3, 9]), rf"{STEM} \(2, 3, 9\), not \(3, 3, 3, 2\)"),
        (lambda h: h[STEM].update(shape=[-1]), f"'{STEM}' is of shape"),
        (lambda h: h[STEM].update(dtype="F8_E4M3"), f"'{STEM}' is of dtype 'F8_E4M3'"),
        (lambda h: h[STEM].update(dtype="I32"), rf"no floating-point numbers: {STEM} \(int32\)"),
        (lambda h: h[STEM].update(dtype=[]), f"'{STEM}' is of dtype"),
        (lambda h: h[STEM].update(data_offsets=[0, 2**63]), f"'{STEM}' is F32 of shape"),
        (lambda h: h.update({STEM: None}), f"entry for '{STEM}' is none of an array"),
        (lambda h: h.pop(STEM), "begins at byte|its arrays have"),
        (lambda h: h.update({"\u00e9 x": h.pop(STEM)}), r"unknown to the network: \\xe9 x"),
    ],
)
def test_a_malformed_safetensors_file_is_refused(
    tmp_path: Path,
    variables: dict[str, Any],
    refused: Callable[[Path, str], None],
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    refused(forged(write_timm(tmp_path / "net.safetensors", variables), change), message)


@pytest.mark.parametrize("suffix", ["h5", "safetensors", "pth", "pt"])
def test_what_is_no_file_of_weights_at_all(
    tmp_path: Path,
    variables: dict[str, Any],
    refused: Callable[[Path, str], None],
    suffix: str,
) -> None:
    path = tmp_path / f"net.{suffix}"
    with pytest.raises(FileNotFoundError):
        load_pretrained(path, variables)
    os.mkfifo(path)  # which would be waited for
    refused(path, "it is no regular file")
    path.unlink()
    for content in (b"", b"text", bytes(5000)):
        path.write_bytes(content)
        refused(path, "cannot be read as weights")


# Damage at random


@pytest.mark.parametrize(
    ("name", "write"),
    [("net.h5", write_keras), ("net.safetensors", write_timm), ("net.pth", write_torch)],
)
def test_mutants_are_refused_by_one_error_or_load_small(
    tmp_path: Path,
    rng: np.random.Generator,
    variables: dict[str, Any],
    name: str,
    write: Callable[..., Path],
) -> None:
    generator = random.Random(int(rng.integers(2**32)))
    path = write(tmp_path / name, variables)
    data, target = path.read_bytes(), other(variables)
    load_pretrained(path, target)
    outcomes: Counter[str] = Counter()
    start = time.process_time()
    for number in range(COUNT):
        path.write_bytes(mutant := damaged(data, generator))
        measured = number % 10 == 0  # tracing slows Python down
        if measured:
            tracemalloc.start()
        refusal, found = None, None
        try:
            found = load_pretrained(path, target)
        except WeightsError as error:
            refusal = str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert not measured or 0 < peak < 40 * len(mutant) + PEAK
        if refusal is not None:
            assert refusal.startswith(str(path))
            assert refusal.isascii()
            assert len(refusal) < 3000
            outcomes["refused"] += 1
        else:
            assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, target)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
            outcomes["loaded"] += 1
    assert outcomes["refused"] > COUNT / 10
    assert outcomes["loaded"] > COUNT / 100
    assert time.process_time() - start < 60, "seconds for all of them"
