"""Ramps layer by layer: windows by hand and for any numbers, the paths, the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.blend import mean_alpha
from ab_jax.describe import quantized_paths

LAYERS = ["stem", "a", "b", "head"]
WINDOWS = [  # overlap, and the windows of four layers in steps 100 to 350
    (0.0, [(100, 162.5), (162.5, 225), (225, 287.5), (287.5, 350)]),
    (0.5, [(100, 200), (150, 250), (200, 300), (250, 350)]),
    (1.0, [(100, 350)] * 4),
]


@pytest.mark.parametrize(("overlap", "windows"), WINDOWS)
def test_windows_by_hand(overlap, windows):
    schedule = ab.layerwise_ramp(LAYERS, 100, 350, ramp=ab.linear_ramp, overlap=overlap)
    steps = np.arange(0, 400, 25)
    for layer, (start, stop) in zip(LAYERS, windows, strict=True):
        found = schedule(steps)(layer)
        wanted = np.clip((steps - start) / (stop - start), 0, 1)
        # Half a step of rounding.
        np.testing.assert_allclose(found, wanted, atol=0.51 / (stop - start))


def test_any_numbers(rng):
    """Layers start and end in order, all alike, over the whole window and not a step more."""
    for _ in range(20):
        count, start = int(rng.integers(1, 7)), int(rng.integers(0, 30))
        span, overlap = int(rng.integers(count, 90)), rng.choice([0.0, 1.0, rng.uniform()])
        seen = []

        def ramp(first, last, seen=seen):
            seen.append((first, last))
            return ab.jump(last)

        layers = [f"layer{i}" for i in range(count)]
        schedule = ab.layerwise_ramp(layers, start, start + span, ramp=ramp, overlap=overlap)
        starts, stops = np.array(seen).T
        assert (starts[0], stops[-1]) == (start, start + span)
        assert (np.diff(starts) >= 0).all()
        assert (stops > starts).all()
        assert np.ptp(stops - starts) <= 1
        if count > 1:
            shared = (stops[:-1] - starts[1:]) / (stops - starts).mean()
            np.testing.assert_allclose(shared, overlap, atol=1.5 / (stops - starts).min())
        assert float(schedule(start + span - 1)(layers[-1])) == 0.0
        assert {float(schedule(start + span)(layer)) for layer in layers} == {1.0}


PARAMS = {name: {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)} for name in LAYERS}
RULES = ab.Rules([(".*/kernel", ab.Binary()), (".*", None)])
PATTERNS = ["stem/.*", "(a|b)/kernel", "head/kernel"]


def test_blend_takes_it_traced(rng):
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), PARAMS)
    paths = quantized_paths(params, RULES)
    assert sorted(paths) == ["a/kernel", "b/kernel", "head/kernel", "stem/kernel"]
    schedule = ab.layerwise_ramp(PATTERNS, 0, 300, ramp=ab.linear_ramp, paths=paths)

    @jax.jit
    def at(step):
        alpha = schedule(step)
        return ab.blend(params, RULES, alpha), mean_alpha(params, RULES, alpha)

    for step, alphas in ((0, (0, 0, 0)), (150, (1, 0.5, 0)), (299, (1, 1, 0.99)), (300, (1, 1, 1))):
        found, mean = at(step)
        by_layer = dict(zip(LAYERS, (alphas[0], alphas[1], alphas[1], alphas[2]), strict=True))
        for layer, alpha in by_layer.items():
            w = np.asarray(params[layer]["kernel"], np.float64)
            q = np.where(w >= 0, 1, -1) * np.abs(w).mean(0)
            np.testing.assert_allclose(
                found[layer]["kernel"], (1 - alpha) * w + alpha * q, rtol=1e-5, atol=1e-6
            )
            np.testing.assert_array_equal(found[layer]["bias"], params[layer]["bias"])
        np.testing.assert_allclose(mean, np.mean(list(by_layer.values())), rtol=1e-6)
        assert (mean == 1) == (step == 300)
        assert (mean == 0) == (step == 0)


def test_the_mean_reaches_an_end_only_where_all_do():
    shapes = jax.eval_shape(lambda: {f"layer{i}": jnp.ones((2, 2)) for i in range(49)})
    rules = ab.Rules([(".*", ab.Binary())])
    almost = np.nextafter(np.float32(1), np.float32(0))
    for common, last, wanted in ((1, almost, False), (1, 1, True), (0, 1e-12, False), (0, 0, True)):
        mean = mean_alpha(shapes, rules, lambda p, c=common, o=last: o if p == "layer7" else c)
        assert (float(mean) == common) == wanted
    assert mean_alpha(shapes, rules, 0.25) == 0.25
    with pytest.raises(ValueError, match=r"quantize no parameter\. Give a scalar"):
        mean_alpha(shapes, ab.Rules([(".*", None)]), lambda path: 1.0)


def test_the_first_layer_that_matches_decides():
    schedule = ab.layerwise_ramp(["a/.*", ".*"], 0, 2)
    assert float(schedule(1)("a/kernel")) == 1.0
    assert float(schedule(1)("b/kernel")) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "one or more layers, each once"),
        ({"layers": ["a", "b", "a"]}, "one or more layers, each once"),
        ({"overlap": 1.5}, r"overlap=1.5\): give a share from 0 to 1"),
        ({"overlap": -0.1}, r"overlap=-0.1\): give a share from 0 to 1"),
        ({"stop": 2}, "3 windows do not fit into 2 steps. Give more steps, or a larger overlap"),
        ({"stop": 0}, "must stop after it starts"),
        ({"paths": ["stem/kernel", "c/kernel"]}, "c/kernel is quantized, but belongs to none of"),
        ({"paths": ["stem/kernel", "a/kernel"]}, "No quantized parameter belongs to head/kernel"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ab.layerwise_ramp(**{"layers": PATTERNS, "start": 0, "stop": 300, **arguments})


def test_a_path_that_belongs_to_no_layer_is_named():
    with pytest.raises(ValueError, match=r"head/kernel is quantized.* layers stem/.*, a/.*, b/"):
        ab.blend(PARAMS, RULES, ab.layerwise_ramp(["stem/.*", "a/.*", "b/.*"], 0, 30)(5))
