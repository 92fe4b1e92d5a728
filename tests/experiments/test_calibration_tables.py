"""Tables of a study of calibration: rows by what differs, intervals against a resampling."""

import numpy as np
import pytest

from experiments.pretrained.calibration_tables import choices, finals
from experiments.pretrained.intervals import points_below_float
from experiments.pretrained.readings import as_bits


def record(rng, *, draw=0, images=128, read=500, lost=0.05, **config):
    in_float = rng.random(read) < 0.6
    quantized = in_float & (rng.random(read) > lost)
    named = {"photographs": in_float, "tiny": in_float}
    below = {name: 100 * float(in_float.mean() - quantized.mean()) for name in named}
    return {
        "config": {
            **{"method": "gptq", "regression": None, "matching": "mean", "source": "both"},
            **{"bits": 4, "depthwise_bits": 8, "draw": draw},
            **config,
        },
        "images": {"calibrated": images, "read": dict.fromkeys(named, read)},
        "points_below_float": below,
        "divergence_from_float": {"photographs": lost / 2, "tiny": lost},
        "right": {
            n: {"float": as_bits(x), "quantized": as_bits(quantized)} for n, x in named.items()
        },
        "seconds": 90.0,
        "bytes": {"codes_and_scales": 123_456},
    }


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_an_interval_is_that_of_draws_and_images_resampled(rng):
    """Draws that differ by less than images do, as in our studies."""
    records = [record(rng, draw=draw, lost=0.1) for draw in range(24)]
    # The same images in every draw.
    mean, half = points_below_float(records, "tiny")
    lost = []
    for one in records:
        bits = [
            np.unpackbits(np.frombuffer(bytes.fromhex(one["right"]["tiny"][n]), np.uint8))[:500]
            for n in ("float", "quantized")
        ]
        lost.append(100 * (bits[0].astype(float) - bits[1]))
    lost = np.array(lost)
    assert mean == pytest.approx(lost.mean())
    means = [
        lost[rng.integers(0, 24, 24)][:, rng.integers(0, 500, 500)].mean() for _ in range(3000)
    ]
    assert half == pytest.approx(1.96 * np.std(means), rel=0.3)


def test_one_draw_has_the_interval_of_its_images(rng):
    one = record(rng, read=400, lost=0.3)
    mean, half = points_below_float([one], "photographs")
    p = mean / 100  # of each image 0 or 1 is lost, so it is a binomial's
    assert half == pytest.approx(196 * np.sqrt(p * (1 - p) / 399), rel=1e-6)


def test_a_row_is_a_width_and_a_way(rng):
    records = [record(rng, draw=draw, method=m) for m in ("gptq", "rounding") for draw in (0, 1)]
    records += [record(rng, method="rounded", images=0), record(rng, bits=3, regression=0.5)]
    records.append(record(rng, source="tiny", lost=0.25))
    head, _, *found = rows(finals(records))
    assert [row[:5] for row in found] == [
        ["W4, depthwise 8", "GPTQ", "by layer", "mean", "128 half of each"],
        ["W4, depthwise 8", "rounding", "by layer", "mean", "128 half of each"],
        ["W4, depthwise 8", "rounding alone", "", "", ""],
        ["W4, depthwise 8", "GPTQ", "by layer", "mean", "128 Tiny ImageNet"],
        ["W3, depthwise 8", "GPTQ", "0.5", "mean", "128 half of each"],
    ]
    assert [row[-3:] for row in found] == [["123", "1.5", n] for n in ("2", "2", "1", "1", "1")]
    assert found[3][-4] == "0.125 / 0.250"
    mean, half = points_below_float(records[:2], "tiny")
    column = head.index("points below float, Tiny ImageNet")
    assert found[0][column] == f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def test_choices_have_a_pair_of_columns_for_each_width(rng):
    records = [
        record(rng, lost=0.1),
        record(rng, lost=0.2, bits=3),
        record(rng, lost=0.3, matching="deviation", regression="inf", reconstruct=500),
    ]
    head, _, *found = rows(choices(records))
    assert head[4:] == [
        f"{width}, depthwise 8: {unit}" for width in ("W4", "W3") for unit in ("nats", "points")
    ]
    below = [f"{one['points_below_float']['tiny']:.1f}" for one in records]
    assert found == [
        ["GPTQ", "by layer", "mean", "128", "0.100", below[0], "0.200", below[1]],
        ["GPTQ, then blocks", "none", "mean, deviation", "128", "0.300", below[2], "", ""],
    ]
