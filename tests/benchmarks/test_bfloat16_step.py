"""The benchmark counts and times a step of each precision; its table says what the record holds."""

import json

import pytest

from benchmarks import bfloat16_step
from benchmarks.bfloat16_step import AGAIN, LAYERS, PRECISIONS, Config, run, table
from benchmarks.measuring.ratios import ratio_cells

NORMS = "bfloat16, norms in bfloat16"


def test_a_record_is_a_table_of_ratios_to_norms_in_float32(rng):
    seconds = {name: rng.uniform(1, 2, size=7).tolist() for name in PRECISIONS}
    here = {name: {"bytes": 4e9, "temporaries": 2e6} for name in PRECISIONS}
    there = {LAYERS: {"bytes": 2e9, "temporaries": 1e6}, NORMS: {"bytes": 1e9, "temporaries": 2e6}}
    there["float32"] = {"bytes": 3e9, "temporaries": 2.5e6}
    record = {
        "config": {"width": 0.5, "image_size": 16, "batch_size": 8, "rounds": 7},
        "hardware": "a machine",
        "packages": {"jax": "1.2.3"},
        "counts": {"here": here, "v5e:2x2": there},
        "seconds": seconds,
    }
    head, _, *lines = table([record]).splitlines()
    places = "bytes | temporaries | bytes, v5e:2x2 | temporaries, v5e:2x2"
    assert head == f"| layers | {places} | time |"
    cells = {
        LAYERS: "1 (4.00 GB) | 1 (2.00 MB) | 1 (2.00 GB) | 1 (1.00 MB)",
        AGAIN: "1.000 | 1.000 | – | –",
        NORMS: "1.000 | 1.000 | 0.500 | 2.000",
        "float32": "1.000 | 1.000 | 1.500 | 2.500",
    }
    times = ratio_cells(seconds, lambda s: f"{s:.2f} s")
    assert lines[:4] == [f"| {name} | {cells[name]} | {times[name]} |" for name in PRECISIONS]
    assert "n = 7 rounds" in lines[-1]


def test_a_topology_without_a_compiler_is_refused():
    with pytest.raises(ValueError, match=r"^--topology=v0:1x1: there is no compiler.*libtpu"):
        run(Config(topology="v0:1x1", out=None))


@pytest.mark.long
def test_a_run_counts_and_times_each_precision(tmp_path, monkeypatch):
    kept = {name: PRECISIONS[name] for name in (LAYERS, NORMS)}
    monkeypatch.setattr(bfloat16_step, "PRECISIONS", kept)
    out = tmp_path / "bench" / "tiny.json"
    record = run(Config(width=1 / 64, image_size=8, batch_size=4, rounds=2, out=out))
    assert record == json.loads(out.read_text())
    assert {name: len(times) for name, times in record["seconds"].items()} == dict.fromkeys(kept, 2)
    assert {*record["counts"]} == {"here"}
    for counted in record["counts"]["here"].values():
        assert counted["bytes"] > counted["temporaries"] > 0
