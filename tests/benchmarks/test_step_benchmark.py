"""The benchmark times every step once a round, and its table says what the record holds."""

import dataclasses
import json

import pytest

from benchmarks import step
from benchmarks.measuring.ratios import ratio_cells
from benchmarks.step import STEPS, Config, run, table
from experiments.settings.config import FlagError

pytestmark = pytest.mark.long


@pytest.fixture
def record(rng):
    return {
        "config": {"width": 0.5, "image_size": 16, "batch_size": 8, "rounds": 7},
        "parameters": 1_500_000,
        "hardware": "a machine",
        "packages": {"jax": "1.2.3"},
        "environment": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        "seconds": {name: rng.uniform(1, 2, size=7).tolist() for name, _, _ in STEPS},
    }


def test_a_record_is_a_column_of_ratios_to_the_float_step(record, rng):
    config = {**record["config"], "batch_size": 4, "rounds": 9}
    other = {**record, "environment": {}, "config": config}
    other["seconds"] = {name: rng.uniform(1, 2, size=9).tolist() for name, _, _ in STEPS}
    head, _, *lines = table([record, other]).splitlines()
    tunable = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    assert head == f"| step | batch 8, {tunable} | batch 4 |"
    columns = [ratio_cells(one["seconds"], lambda s: f"{s:.2f} s") for one in (record, other)]
    for line, (name, _, _) in zip(lines[: len(STEPS)], STEPS, strict=True):
        assert line == f"| {name} | {columns[0][name]} | {columns[1][name]} |"
    assert lines[0].startswith("| float | 1 (")
    assert "n = 7, 9 rounds" in lines[-1]
    assert "1.5 million parameters" in lines[-1]


def test_a_run_measures_each_step_in_each_round(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")  # noted, for this process idle
    out = tmp_path / "bench" / "tiny.json"
    monkeypatch.setattr(step, "STEPS", STEPS[:2])
    record = run(Config(width=1 / 64, image_size=8, batch_size=4, rounds=2, out=out))
    assert record == json.loads(out.read_text())
    assert {name: len(times) for name, times in record["seconds"].items()} == {
        name: 2 for name, _, _ in STEPS[:2]
    }
    assert all(time > 0 for times in record["seconds"].values() for time in times)
    assert record["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
    # Convolutions 3-2-2-4-4-8-8, dense 8-16-16, head 10; batch norm has two numbers a feature.
    features = [2, 2, 4, 4, 8, 8, 16, 16, 10]
    inputs = [9 * 3, 9 * 2, 9 * 2, 9 * 4, 9 * 4, 9 * 8, 8, 16, 16]
    kernels = sum(a * b for a, b in zip(inputs, features, strict=True))
    assert record["parameters"] == kernels + 2 * sum(features)
    # A convolution of k x k positions multiplies by its kernel at each; images are 8, 4 and 2 wide.
    places = [64, 64, 16, 16, 4, 4, 1, 1, 1]
    products = [n * a * b for n, a, b in zip(places, inputs, features, strict=True)]
    assert record["training_flops"] == 2 * (3 * sum(products) - products[0])


def test_steps_are_chosen_by_name_and_their_speed_is_told(tmp_path):
    names = ("float", "AB, 1 bit")
    out = tmp_path / "tiny.json"
    config = Config(width=1 / 64, image_size=8, batch_size=4, rounds=2, out=out, steps=names,
                    dtype="bfloat16")  # fmt: skip
    record = run(config)
    assert tuple(record["seconds"]) == names
    record["seconds"]["float"] = [0.5, 0.5]
    told = table([record])
    assert "images, bfloat16;" in told
    rate = 4 * record["training_flops"] / 0.5 / 1e12
    assert told.endswith(f" Float, batch 4: 8 images/s, {rate:.3g} TFLOP/s.")
    with pytest.raises(FlagError, match="STE, 1 bit"):
        run(dataclasses.replace(config, steps=("ste",)))
