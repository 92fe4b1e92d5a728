"""Tables of short training: rows by what differs, gains over the start of the same seed."""

import numpy as np
import pytest

from experiments.pretrained.intervals import of_draws_and_images, points_above
from experiments.pretrained.readings import as_bits
from experiments.pretrained.training_tables import trained, trials

READ = {"photographs": 200, "tiny": 300}


def record(rng, *, seed=0, steps=250, nats=0.3, lost=0.1, **config):
    right = {}
    for name, count in READ.items():
        in_float = np.arange(count) % 2 == 0
        right[name] = {"float": in_float, "quantized": in_float & (rng.random(count) > lost)}
    return {
        "config": {
            **{"method": "ab", "weights": "int4", "depthwise_bits": None, "latents": "corrected"},
            **{"learning_rate": 1e-3, "seed": seed},
            **config,
        },
        "steps": steps,
        "images": {"calibrated": 256, "trained": 2100, "read": READ},
        "points_below_float": {
            n: 100 * float(x["float"].mean() - x["quantized"].mean()) for n, x in right.items()
        },
        "divergence_from_float": dict.fromkeys(READ, nats),
        "right": {n: {k: as_bits(bits) for k, bits in x.items()} for n, x in right.items()},
        "seconds": 240.0,
    }


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_trials_stand_nearest_to_float_first(rng):
    records = [
        record(rng, nats=0.4, method="lsq", latents="codes"),
        record(rng, nats=0.2, learning_rate=3e-4),
        record(rng, nats=0.3, steps=1, method="ste", latents="codes"),
    ]
    _, _, *found = rows(trials(records))
    points = [f"{one['points_below_float']['tiny']:.1f}" for one in records]
    assert found == [
        ["W4", "AB", "corrected weights", "0.0003", "0.200", points[1]],
        ["W4", "start", "", "", "0.300", points[2]],
        ["W4", "LSQ", "values of the codes", "0.001", "0.400", points[0]],
    ]


def test_a_gain_is_over_the_start_of_the_same_seed_and_width(rng):
    starts = [record(rng, seed=s, steps=1, lost=0.3, method="ste") for s in (0, 1, 2)]
    ab = [record(rng, seed=s, lost=0.1) for s in (2, 0, 1)]  # in another order
    other = record(rng, seed=0, steps=1, weights="int3", depthwise_bits=8)
    head, _, *found = rows(trained([other, *starts, *ab]))
    assert [row[:2] for row in found] == [
        ["W3, depthwise 8", "start"],
        ["W4", "start"],
        ["W4", "AB"],
    ]
    assert [row[-1] for row in found] == ["1", "3", "3"]
    for name, label in {"photographs": "photographs", "tiny": "Tiny ImageNet"}.items():
        accuracy = {}
        for key, records in {"start": starts, "ab": ab}.items():
            points = [one["points_below_float"][name] for one in records]
            accuracy[key] = -float(np.mean(points))
        cell = found[2][head.index(f"above the start, {label}")]
        assert cell.startswith(f"{accuracy['ab'] - accuracy['start']:+.2f} [")
        assert found[1][head.index(f"above the start, {label}")] == ""
    mean, half = points_above(ab[:1], [starts[2]], "tiny")
    assert mean > 0
    assert half > 0


def test_pairs_that_are_alike_have_no_interval(rng):
    one = record(rng)
    assert points_above([one, one], [one, one], "tiny") == (0, 0)
    assert of_draws_and_images(np.full((3, 5), 7.0)) == (pytest.approx(7), pytest.approx(0))
