"""The comparison with Qwix and AQT: gradients by definition, a small run, its tables."""

import difflib
import inspect
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from benchmarks.measuring.generated_arrays import generated_variables
from benchmarks.measuring.ratios import ratio_cells
from benchmarks.other_libraries import gradients
from benchmarks.other_libraries.comparison_tables import processor_times
from benchmarks.other_libraries.gradients import (
    Definition,
    defined_gradients,
    fault,
    relative_errors,
)
from benchmarks.other_libraries.libraries import LIBRARIES, Bits
from benchmarks.other_libraries.lines_to_write import SNIPPETS, lines_to_write
from benchmarks.other_libraries.snippets import plain
from benchmarks.peers import Config, run, table

pytestmark = pytest.mark.long


class Small(nn.Module):
    """A convolution and a dense layer."""

    dtype: Any = jnp.float32
    depthwise: bool = False

    @nn.compact
    def __call__(self, x, train):
        groups = x.shape[-1] if self.depthwise else 1
        features = x.shape[-1] if self.depthwise else 4
        x = nn.Conv(
            features,
            (3, 3),
            use_bias=False,
            feature_group_count=groups,
            dtype=self.dtype,
            name="conv0",
        )(x)
        x = nn.relu(x)
        return nn.Dense(5, use_bias=False, dtype=self.dtype, name="head")(x.mean((1, 2)))


class Linear(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5, use_bias=False, dtype=self.dtype, name="head")(x)


def drawn(rng, size=4):
    images = jnp.asarray(rng.standard_normal((6, size, size, 3)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 5, 6), jnp.int32)


@pytest.mark.parametrize("blended", [False, True])
def test_the_definition_is_that_of_one_linear_layer(rng, blended):
    """Of cross-entropy, in closed form: inputs times what probabilities are above the targets."""
    images, labels = drawn(rng, size=2)
    w = rng.standard_normal((12, 5)).astype(np.float32)
    definition = Definition(beyond=0.5, image_ranges=True, alpha=0.75, blended=blended)
    variables = {"params": {"head": {"kernel": jnp.asarray(w)}}}
    found = defined_gradients(Linear(), variables, images, labels, definition, Bits(3, 4))

    def seen(x, bits, axis):
        step = np.abs(x).max(axis, keepdims=True) / (2 ** (bits - 1) - 0.5)
        highest = 2 ** (bits - 1) - 1
        return 0.25 * x + 0.75 * step * np.clip(np.round(x / step), -highest, highest)

    x = seen(np.asarray(images, np.float64).reshape(6, 12), 4, 1)
    logits = x @ seen(w.astype(np.float64), 3, 0)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = x.T @ (shares - np.eye(5)[np.asarray(labels)]) / 6
    factor = 0.25 if blended else 1.0
    np.testing.assert_allclose(found["head"], factor * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("library", "bits", "tolerance"),
    [
        ("ab_jax, AB", Bits(8, 8), 0.01),  # an input on a tie may fall otherwise in float32
        ("ab_jax, STE", Bits(4), 1e-4),
        ("Qwix", Bits(8, 8), 0.03),  # Dense keeps its operands as they were
        ("Qwix ODML", Bits(4), 1e-4),
        ("AQT, mended", Bits(8, 8), 0.03),
    ],
)
def test_gradients_are_those_of_their_definition(rng, library, bits, tolerance):
    images, labels = drawn(rng)
    applied = LIBRARIES[library](Small(), bits)
    variables, images = gradients.led_by_positive(generated_variables(applied.init, images), images)
    definition = gradients.DEFINITIONS[library]
    given = gradients.kernel_gradients(applied, variables, images, labels, definition.alpha)
    defined = defined_gradients(Small(), variables, images, labels, definition, bits)
    errors = relative_errors(given, defined)
    assert errors.keys() == {"conv0", "head"}
    assert max(errors.values()) < tolerance, errors
    assert fault(given, errors) == ""


def test_a_fault_is_told():
    right = {"a": np.ones(3), "b": np.ones(3)}
    for given, told in [
        ({"a": np.zeros(3), "b": np.ones(3)}, "1 of 2 kernels get no gradient"),
        ({"a": np.full(3, np.nan), "b": np.ones(3)}, "gradients are not finite"),
        ({"a": -np.ones(3), "b": np.ones(3)}, "1 of 2 kernels get another gradient"),
    ]:
        assert fault(given, relative_errors(given, right)) == told


@pytest.mark.parametrize(
    ("bits", "errors", "images"),
    [
        (Bits(8, 8), [0.3, 0.02, 0.1], 1),  # none without a tie: the least
        (Bits(8, 8), [0.3, 1e-6], 1),  # it ends there
        (Bits(8), [0.3], 0),  # kernels have no ties that change from batch to batch
    ],
)
def test_gradients_are_read_where_no_tie_falls_otherwise(
    bits: Bits, errors: list[float], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(errors)
    nothing = lambda *_: {}
    for name in ("kernel_gradients", "defined_gradients"):
        monkeypatch.setattr(gradients, name, nothing)
    monkeypatch.setattr(gradients, "relative_errors", lambda *_: {"kernel": next(left)})
    config = Config(image_size=8, gradient_images=2, gradient_batches=3)
    found = peers._least_error(config, Small(), "ab_jax, STE", bits)
    assert found["images"] == images
    assert found["errors"] == {"kernel": errors[images]}
    assert next(left, None) is None


def test_a_run_tells_times_failures_and_dead_gradients(tmp_path: Path, monkeypatch) -> None:
    for networks in (peers.NETWORKS, peers.SHORT_NETWORKS):
        monkeypatch.setitem(networks, "mobilenet", lambda width: Small(depthwise=True))
    out = tmp_path / "new" / "record.json"
    config = Config(
        networks=("mobilenet",),
        libraries=("float", "float, again", "Qwix", "AQT"),
        image_size=8,
        batch_sizes=(2,),
        gradient_images=2,
        rounds=3,
        out=out,
    )
    record = run(config)
    assert json.loads(out.read_text()) == record
    steps = {(s["library"], s["bits"]): s for s in record["steps"]}
    assert list(steps) == [
        ("float", "float"),
        ("float, again", "float"),
        *((library, bits) for library in ("Qwix", "AQT") for bits in ("W8", "W8A8")),
    ]
    for (library, _), step in steps.items():
        if library == "Qwix":
            assert step["raises"].startswith("ValueError: conv_general_dilated")
        else:
            assert len(step["seconds"]) == 3
            assert min(step["seconds"]) > 0
            assert len(step["processor_seconds"]) == 3
            assert sum(step["processor_seconds"]) > 0
            assert step["peak_bytes"] > 8 * 8 * 3 * 2 * 4, "at least the images are held"
    told = {(g["library"], g["bits"]): g for g in record["gradients"]}
    assert told["AQT", "W8A8"]["fault"] == "1 of 2 kernels get no gradient"
    assert told["AQT", "W8A8"]["errors"]["conv0"] == 1.0
    text = table([record])
    assert text.count("| raises ValueError |") == 6
    assert text.count("| invalid (") == 4


def test_the_table_holds_ratios_within_rounds(rng: np.random.Generator) -> None:
    seconds = {name: rng.uniform(1, 2, 5).tolist() for name in ("float", "Qwix", "AQT")}
    about = {"network": "resnet50", "batch_size": 16, "compile_seconds": 4.0, "peak_bytes": 10**7}
    steps = [{**about, "library": name, "seconds": times} for name, times in seconds.items()]
    for step in steps:
        step["bits"] = "float" if step["library"] == "float" else "W8"
    steps[1] |= {"compile_seconds": 5.0, "peak_bytes": 2 * 10**7}
    errors = {"a": 1e-3, "b": 2e-3, "c": 3e-2}
    found = {"network": "resnet50", "bits": "W8", "errors": errors, "fault": ""}
    record = {
        "config": {
            "image_size": 32,
            "rounds": 5,
            "width": 0.25,
            "gradient_width": 0.125,
            "gradient_batches": 3,
        },
        "hardware": "a machine",
        "packages": {"jax": "1.2.3"},
        "peers": {"qwix": "4.5", "aqtp": "6.7"},
        "steps": steps,
        "gradients": [
            {**found, "library": "Qwix"},
            {**found, "library": "AQT", "fault": "3 of 3 kernels get no gradient"},
        ],
        "lines": {"Qwix": {"network": 0, "all": 3}},
    }
    lines = table([record]).splitlines()
    cells = ratio_cells(seconds, lambda s: f"{1e3 * s:.0f} ms")
    row = f"{cells['float']} | {cells['Qwix']} | invalid ({cells['AQT']})"
    assert f"| ResNet-50 | W8 | 16 | {row} |" in lines
    cost = "1 (4.0 s), 1 (10 MB) | 1.25, 2.00 | invalid (1.00, 1.00)"
    assert f"| ResNet-50 | W8 | 16 | {cost} |" in lines
    # The same ratios, of the processor's time.
    for step in steps:
        step["processor_seconds"] = step.pop("seconds")
    times = processor_times([record]).splitlines()
    assert f"| ResNet-50 | W8 | 16 | {row} |" in times
    assert "| ResNet-50 | W8 | 2e-03, 3e-02 | invalid: 3 of 3 kernels get no gradient |" in lines
    assert "| Qwix | 0 | 3 |" in lines


@pytest.mark.parametrize("name", SNIPPETS)
def test_lines_are_those_by_which_a_snippet_differs_and_it_runs(name: str, rng) -> None:
    snippet = SNIPPETS[name]
    before, after = (
        [
            line
            for line in inspect.getsource(module).partition('"""\n')[2].splitlines()
            if line.strip()
        ]
        for module in (plain, snippet)
    )
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    lines = lines_to_write(snippet)
    assert lines["all"] == len(after) - kept
    assert lines["network"] == (2 if name.startswith("AQT") else 0)
    images, labels = drawn(rng)
    spec = jax.eval_shape(snippet.init, jax.random.key(0), images)
    state = {collection: spec[collection] for collection in spec if collection != "params"}
    loss, changed = jax.eval_shape(snippet.loss_fn, spec["params"], state, images, labels, 0)
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, state)


def test_in_resnet_50_on_one_core_ours_is_ahead_of_qwix() -> None:
    """As the README says of the committed record, from which its numbers are made."""
    path = Path(__file__).parents[2] / "results/bench_peers/w8_one_core.json"
    steps = {
        (s["network"], s["batch_size"], s["bits"], s["library"]): s
        for s in json.loads(path.read_text("utf-8"))["steps"]
    }
    ours = [key for key in steps if key[3] == "ab_jax, AB"]
    assert len(ours) == 12
    for key in ours:
        if key[0] == "resnet50":
            qwix = steps[(*key[:3], "Qwix")]
            assert np.median(np.divide(steps[key]["seconds"], qwix["seconds"])) < 1
