"""The benchmark times every step once a round, and its table says what the record holds."""

import json

import numpy as np
import pytest

from experiments.bench_step import STEPS, Config, run, table
from experiments.reporting.paired_statistics import median_interval


@pytest.fixture
def record(rng):
    return {
        "config": {"width": 0.5, "image_size": 16, "batch_size": 8},
        "parameters": 1_500_000,
        "hardware": "a machine",
        "packages": {"jax": "1.2.3"},
        "environment": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        "seconds": {name: rng.uniform(1, 2, size=7).tolist() for name, _, _ in STEPS},
    }


def test_ratios_are_taken_within_a_round(record, rng):
    other = {**record, "environment": {}, "config": {**record["config"], "batch_size": 4}}
    other["seconds"] = {name: rng.uniform(1, 2, size=9).tolist() for name, _, _ in STEPS}
    head, _, *lines = table([record, other]).splitlines()
    tunable = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    assert head == f"| step | batch 8, {tunable} | batch 4 |"
    for line, (name, _, _) in zip(lines[1:], STEPS[1:], strict=False):
        expected = [name]
        for one, (k, last) in ((record, (0, 6)), (other, (1, 7))):  # n = 7: the range covers 95 %
            seconds = {step: np.array(times) for step, times in one["seconds"].items()}
            ratios = np.sort(seconds[name] / seconds["float"])
            expected.append(f"{np.median(ratios):.3f} [{ratios[k]:.3f}, {ratios[last]:.3f}]")
        assert [cell.strip() for cell in line.strip("|").split("|")] == expected
    assert lines[0] == (
        f"| float | 1 ({np.median(record['seconds']['float']):.2f} s) "
        f"| 1 ({np.median(other['seconds']['float']):.2f} s) |"
    )
    assert "n = 7, 9 rounds" in lines[-1]
    assert "1.5 million parameters" in lines[-1]


def test_the_interval_covers_the_median_as_often_as_it_says(rng):
    """Of a skewed distribution whose median is ln 2; the count's own error is 0.5 %."""
    n, draws = 25, 2000
    intervals = [median_interval(rng.exponential(size=n).tolist()) for _ in range(draws)]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert 0.94 < covered < 0.975  # 0.957 by the binomial distribution


def test_the_interval_of_few_ratios_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([1.5]) == (1.5, 1.5)


def test_a_run_measures_each_step_in_each_round(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")  # noted, for this process idle
    out = tmp_path / "bench" / "tiny.json"
    steps = STEPS[:2]
    record = run(Config(width=1 / 64, image_size=8, batch_size=4, rounds=2, out=out), steps)
    assert record == json.loads(out.read_text())
    assert {name: len(times) for name, times in record["seconds"].items()} == {
        name: 2 for name, _, _ in steps
    }
    assert all(time > 0 for times in record["seconds"].values() for time in times)
    assert record["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
    # Convolutions 3-2-2-4-4-8-8, dense 8-16-16, head 10; batch norm has two numbers a feature.
    features = [2, 2, 4, 4, 8, 8, 16, 16, 10]
    inputs = [9 * 3, 9 * 2, 9 * 2, 9 * 4, 9 * 4, 9 * 8, 8, 16, 16]
    kernels = sum(a * b for a, b in zip(inputs, features, strict=True))
    assert record["parameters"] == kernels + 2 * sum(features)


def test_no_rounds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--rounds=0 must be at least 1"):
        run(Config(rounds=0, out=tmp_path / "x.json"))
