"""The core of the benchmarks: turns, and ratios with their interval, in a table."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring.benchmark_command import versions
from benchmarks.measuring.ratios import (
    going_on,
    in_rounds,
    markdown,
    median_interval,
    over_rounds,
    ratio_cells,
    timed,
)


def test_each_case_has_its_turn_in_every_round(rng: np.random.Generator) -> None:
    def turns(seed: int) -> list[str]:
        called: list[str] = []

        def case(name: str) -> Callable[[], int]:
            def turn() -> int:
                called.append(name)
                return len(called)

            return turn

        first, second = ({name: case(name) for name in names} for names in ("abcd", "xy"))
        found = in_rounds(first, second, rounds=8, seed=seed)
        # What a case measures, here the place of its turn, is kept of all rounds but the first.
        assert list(found) == list("abcdxy")
        for name, places in found.items():
            assert [called[place - 1] for place in places] == [name] * 8
            assert [(place - 1) // 6 for place in places] == list(range(1, 9))
        return called

    seed = int(rng.integers(2**32))
    called = turns(seed)
    rounds = [called[i : i + 6] for i in range(0, len(called), 6)]
    assert all((sorted(r[:4]), sorted(r[4:])) == (list("abcd"), list("xy")) for r in rounds)
    assert len(set(map(tuple, rounds))) > 2
    assert turns(seed) == called
    assert turns(seed + 1) != called


def test_a_step_goes_on_from_where_it_stood_and_is_waited_for() -> None:
    step = jax.jit(lambda state: (state + 1, state), donate_argnums=0)
    seen = []

    def watched(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        after, before = step(state)
        seen.append(float(before))
        return after, before

    case = going_on(watched, jnp.zeros(()))
    assert all(case().wall > 0 for _ in range(4))
    assert seen == [0, 1, 2, 3]


def test_processor_time_leaves_out_what_is_waited_for() -> None:
    took = timed(lambda: time.sleep(0.05))
    assert took.wall >= 0.05
    assert took.processor < 0.04


def test_ratios_are_taken_within_a_round(rng: np.random.Generator) -> None:
    for n, (k, last) in {7: (0, 6), 9: (1, 7)}.items():  # n = 7: the range covers 95 %
        base, other = rng.uniform(1, 2, size=(2, n))
        ratios = np.sort(other / base)
        readings = {"base": base.tolist(), "other": other.tolist()}
        for digits in (2, 3):
            assert ratio_cells(readings, lambda s: f"{s:.4f} s", digits) == {
                "base": f"1 ({np.median(base):.4f} s)",
                "other": f"{np.median(ratios):.{digits}f} "
                f"[{ratios[k]:.{digits}f}, {ratios[last]:.{digits}f}]",
            }


def test_the_interval_covers_the_median_as_often_as_it_says(rng: np.random.Generator) -> None:
    """Of a skewed distribution whose median is ln 2; the count's own error is 0.3 %."""
    n, draws = 25, 4000
    intervals = [median_interval(rng.exponential(size=n).tolist()) for _ in range(draws)]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert 0.94 < covered < 0.975  # 0.957 by the binomial distribution


def test_the_interval_of_few_ratios_is_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([1.5]) == (1.5, 1.5)


def test_a_table_and_its_caption() -> None:
    table = markdown(["a", "b", "c"], [["1", "2", "3"]], left=2)
    assert table.splitlines() == ["| a | b | c |", "| --- | --- | ---: |", "| 1 | 2 | 3 |"]
    records: list[dict[str, Any]] = [
        {"config": {"rounds": n}, "packages": {"jax": "1.2"}} for n in (25, 15)
    ]
    assert over_rounds(records) == "median [95 % interval] over n = 25, 15 rounds"
    assert versions(records[0]) == "jax 1.2"
    assert versions(records[0], {"qwix": "3.4"}) == "qwix 3.4, jax 1.2"
