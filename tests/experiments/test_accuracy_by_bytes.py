"""The picture of accuracy against bytes: which points are on it."""

import json

import pytest
from PIL import Image

from experiments.pretrained.accuracy_by_bytes import Config, points_of, run
from experiments.pretrained.intervals import points_below_float
from experiments.settings.config import FlagError
from tests.experiments import test_calibration_tables, test_training_tables


def calibrated(rng, accuracy=60.0, **config):
    found = test_calibration_tables.record(rng, **config)
    found["bytes"]["in_float32"] = 999_999
    return {**found, "float": {"photographs": accuracy, "tiny": accuracy}}


def trained(rng, **config):
    sizes = {"codes_and_scales": 200_000, "in_float32": 999_999}
    found = test_training_tables.record(rng, **config)
    return {**found, "bytes": sizes, "float": {"photographs": 60.0, "tiny": 60.0}}


def test_a_point_is_a_method_at_a_width_in_its_best_way(rng):
    draws = [calibrated(rng, draw=draw, lost=0.1) for draw in range(3)]
    worse = [calibrated(rng, draw=draw, lost=0.9, regression=0.5) for draw in range(3)]
    after = [trained(rng, seed=seed) for seed in range(2)]
    found = points_of([*worse, *after, *draws], "tiny")
    assert [(p.method, p.width, p.size) for p in found] == [
        ("GPTQ", "W4, depthwise 8", 123_456),
        ("AB", "W4", 200_000),
        ("float", "float", 999_999),
    ]
    lost, half = points_below_float(draws, "tiny")
    assert found[0].accuracy == pytest.approx(60 - lost)
    assert found[0].half == half
    assert (found[2].accuracy, found[2].half) == (60, 0)


def test_the_picture_is_written_without_the_starts_of_training(rng, tmp_path):
    records = [calibrated(rng), calibrated(rng, method="rounded"), trained(rng)]
    (tmp_path / "records").mkdir()
    for index, record in enumerate([*records, trained(rng, steps=1, method="ste")]):
        (tmp_path / f"records/{index}.json").write_text(json.dumps(record))
    run(Config(records=(tmp_path / "records",), out=tmp_path / "new/bytes.png"))
    with Image.open(tmp_path / "new/bytes.png") as image:
        assert image.width > 1000


def test_no_records_are_refused(tmp_path):
    with pytest.raises(FlagError, match="no records"):
        run(Config(records=(tmp_path,), out=tmp_path / "bytes.png"))
