"""Two real processes on this machine against one: the same numbers from the same global batch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ab_jax import activations
from ab_jax.data import Images
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.state import create_state
from tests.fast_compilation import FAST_COMPILATION
from tests.training import one_of_several

SECONDS = 240  # given to both processes; alone on two cores they take a tenth


@pytest.fixture
def inputs(
    rng: np.random.Generator, make_images: Callable[..., Images], tmp_path: Path
) -> dict[str, Any]:
    """37 images in memory and 23 to be streamed, which no number of devices divides."""
    images = make_images(rng, 37)
    for split, count in {"train": 14, "val": 3}.items():
        for name in ("dark", "light"):
            for index in range(count):
                path = tmp_path / "source" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (12, 14, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(path)
    prepare_image_folder(tmp_path / "source", "photos", tmp_path / "data")
    state = create_state(one_of_several.Net(), one_of_several.OPTIMIZER, (4, 4, 1), seed=1)
    with Checkpoints(tmp_path / "of_one") as checkpoints:
        checkpoints.save(state)
    return {
        "checkpoint": np.array(str(tmp_path / "of_one")),
        "images": images.images,
        "labels": images.labels,
        "seed": np.array(rng.integers(2**31)),
        "data_dir": np.array(str(tmp_path / "data")),
    }


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal up to a share of the largest number of its kind: gradient, parameters, ..."""
    assert actual.keys() == expected.keys()
    kinds = {name: "/".join(name.split("/")[:3]) for name in expected}
    for name, wanted in expected.items():
        alike = [expected[other] for other in expected if kinds[other] == kinds[name]]
        largest = max(float(np.max(np.abs(leaf))) for leaf in alike)
        # Sums in another order, divided by a deviation: 1e-6 in the first step, more in each later.
        first = any(f"/{kind}/" in name for kind in ("gradient", "statistics", "metrics0"))
        tolerance = 1e-5 if first else 1e-4
        np.testing.assert_allclose(
            actual[name], wanted, rtol=0, atol=tolerance * largest, err_msg=name
        )


@pytest.mark.long
def test_two_processes_compute_what_one_does(
    inputs: dict[str, Any],
    devices: list[jax.Device],
    free_port: int,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    wait_for_all: Callable[..., None],
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "inputs.npz", **inputs)
    outputs = [tmp_path / f"found{i}.npz" for i in range(2)]
    command = [sys.executable, "-m", "tests.training.one_of_several", f"127.0.0.1:{free_port}", "2"]
    commands = [[*command, str(i), str(tmp_path / "inputs.npz"), str(outputs[i])] for i in range(2)]
    processes = start_together(commands, devices=2, flags=FAST_COMPILATION)
    # Meanwhile the same in this process, on as many devices.
    one = one_of_several.compute(inputs, tuple(devices[:4]), tmp_path / "one")
    expected = one_of_several.flat(one)
    wait_for_all(processes, SECONDS)

    found = [dict(np.load(output)) for output in outputs]
    for i, own in enumerate(found):
        assert int(own.pop("devices")) == 4
        assert int(own.pop("own")) == i
        # Flags that differ are refused in both, by name.
        message = str(own.pop("refused"))
        assert "Process 1 was started with other flags than process 0: --epochs" in message
        assert f"here --epochs is {1.0 + i}" in message
        # So is a damaged checkpoint; the first process names the file.
        message = str(own.pop("damaged"))
        assert ("about.json is not as it was written" if i == 0 else "process 0 says") in message
    # What all processes return is the same to the bit.
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    assert_close(found[0], expected)
    # Of the stream every image was decoded once, by one of the two, to the same pixels.
    np.testing.assert_array_equal(found[0]["stream/drawn"], expected["stream/drawn"])
    np.testing.assert_array_equal(found[0]["stream/read"], expected["stream/read"])
    assert found[0]["stream/read"][0] == 23
    assert np.all(found[0]["stream/drawn"] > 0)
    # pmap and shard_map agree too, and groups of devices are another thing than all together.
    for case in ("relu", "sign", "reading"):
        pmap, shard_map = (
            {
                name.removeprefix(f"{mode}/"): leaf
                for name, leaf in expected.items()
                if name.startswith(f"{mode}/{case}/")
            }
            for mode in ("pmap", "shard_map")
        )
        assert_close(shard_map, pmap)
    within, whole = (
        expected[f"shard_map/{case}/statistics/norm/var"] for case in ("groups", "relu")
    )
    # Means of groups may agree in a channel, and then the two are equal but for rounding.
    assert np.all(within < whole + 1e-6)
    assert np.any(within < whole - 1e-6)
    # Both wrote parts of the checkpoint, in a directory that is whole.
    written = {path.name for path in (tmp_path / "checkpoints").rglob("ocdbt.process_*")}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}
    # Whoever wrote a checkpoint, one process or two may go on from it.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        like = create_state(one_of_several.Net(), one_of_several.OPTIMIZER, (4, 4, 1), seed=9)
        ours = one_of_several.flat({"restored": checkpoints.restore(like).params})
    for name, leaf in ours.items():
        np.testing.assert_array_equal(found[0][name], leaf)
    of_one = [name for name in expected if name.startswith("of_one_process/")]
    assert len(of_one) == 5
    for name in of_one:
        np.testing.assert_array_equal(found[0][name], expected[name])


@pytest.mark.long
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_signs_take_the_same_first_step_on_any_number_of_devices(
    devices: list[jax.Device], mode: Mode
) -> None:
    net, images = one_of_several.Net(activation=activations.sign), one_of_several.images_for_signs()
    found = []
    for n in (1, 2, 4, 8):
        parallel = Parallel(mode, tuple(devices[:n]))
        _, numbers = one_of_several.train_some(net, parallel, images, 0, 1)
        found.append(one_of_several.flat({"sign": {mode: numbers}}))
    assert np.any(found[0][f"sign/{mode}/gradient/conv/kernel"] != 0)
    for numbers in found[1:]:
        assert_close(numbers, found[0])
