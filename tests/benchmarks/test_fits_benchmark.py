"""The benchmark of fits: its references are right, and it counts every round of a loop."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import fits
from benchmarks.fits import CARRIED, FLOAT, QWIX, Config, run
from benchmarks.measuring import least_errors

TINY = {
    **{"sizes": (9,), "channels": 2, "starts": 20, "vocabulary": 32, "width": 16, "layers": 1},
    **{"heads": 2, "context": 8, "compilations": 1, "rounds": 2},
}


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (2, False), (3, False)])
def test_no_scale_of_a_dense_grid_loses_less_than_the_least(rng, bits, symmetric):
    w = least_errors.drawn(rng, 7, channels=2).astype(np.float64)
    least = least_errors.even_levels(w, bits, symmetric)
    found = np.full(w.shape[1], np.inf)
    half = 2 ** (bits - 1) - 1
    windows = [(-half, half)] if symmetric else [(-z, 2**bits - 1 - z) for z in range(2**bits)]
    shares = np.linspace(1e-3, 1.2, 4000)
    for scale, (low, high) in itertools.product(np.abs(w).max(0) * shares[:, None], windows):
        codes = np.clip(np.round(w / scale), low, high)
        found = np.minimum(found, np.square(w - scale * codes).sum(0))
    squares = np.square(w).sum(0)
    assert (found >= least - 1e-9 * squares).all()
    assert (found <= least + 1e-3 * squares).all()


def test_the_best_of_alternations_is_that_of_all_codes(rng):
    """Of four weights and three scales: all codes are tried, each with its best scales.

    No start of some hundred may lead there, for one channel in 400: of twelve, two are let pass.
    """
    w = rng.normal(size=(4, 12)).astype(np.float32)
    signs = list(itertools.product((1, -1), repeat=3))
    codes = np.array(list(itertools.product(signs, repeat=4)), float)
    magnitudes = np.abs(w).astype(np.float64)
    fitted = codes @ np.linalg.pinv(codes) @ magnitudes
    least = np.square(magnitudes - fitted).sum(1).min(0)
    found = least_errors.bit_scales(w, 3, 300, rng)
    assert (found >= least - 1e-6).all()
    assert (found > least + 1e-6).sum() <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, which Qwix sets off
@pytest.mark.long
def test_a_run_measures_errors_and_what_steps_take(tmp_path):
    steps = ("4 bits, absmax", "4 bits", "ternary", f"4 bits{CARRIED}", QWIX)
    out = tmp_path / "fits.json"
    record = run(Config(**TINY, steps=steps, out=out))
    assert record == json.loads(out.read_text())
    rows = record["errors"]
    assert len(rows) == len(fits.FITTED) * len(least_errors.KINDS)
    assert all(len(row["ratios"]) == 2 for row in rows)
    exact = [row for row in rows if row["quantizer"] not in ("3 scales", "4 scales")]
    assert all(min(row["ratios"]) > 0.9999 for row in exact)
    names = {FLOAT, f"{FLOAT}, again", *steps}
    for of in ("compile_seconds", "seconds", "bytes", "temporaries"):
        assert set(record[of]) == names
    assert record["bytes"][f"{FLOAT}, again"] == record["bytes"][FLOAT]
    # Three rounds of the loop read the weights three times.
    assert record["bytes"]["ternary"] > record["bytes"]["4 bits, absmax"]
    for text in (fits.errors([record, record]), fits.costs([record])):
        assert f"{record['packages']['ab_jax']}" in text
    lines = fits.costs([record]).splitlines()
    assert [line.split(" |")[0][2:] for line in lines[2:9]] == list(record["seconds"])
