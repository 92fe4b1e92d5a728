"""Counting what differs between an exported network and its run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.linen import RANGES
from benchmarks.exported_answers import FORMS, compare, graph_of, last_step, table
from experiments.exported.finished_networks import TrainedNetwork
from tests.export.small_networks import make


@pytest.fixture
def network(rng: np.random.Generator) -> TrainedNetwork:
    model, variables, shape = make("binarynet", rng)
    return TrainedNetwork(model, variables, ab.Rules([(".*", None)]), None, {"image_shape": shape})


def test_images_are_counted_whose_class_or_logits_differ(
    rng: np.random.Generator, network: TrainedNetwork
) -> None:
    images = rng.normal(size=(300, *network.image_shape)).astype(np.float32)
    variables = ab.dequantize(network.variables)
    model = jax.jit(lambda x: network.model.apply(variables, x, train=False))
    wrong = set(rng.choice(300, 7, replace=False).tolist())

    def made(change: Any) -> Any:
        """Logits by the model, changed for the images of `wrong`."""

        def make(network: TrainedNetwork, directory: Any) -> Any:
            start = 0

            def logits(batch: np.ndarray) -> np.ndarray:
                nonlocal start
                found = np.array(model(batch))
                for i in range(len(batch)):
                    if start + i in wrong:
                        change(found[i])
                start += len(batch)
                return found

            return logits

        return make

    def other_class(logits: np.ndarray) -> None:
        logits[logits.argmin()] = logits.max() + 100 * step

    def a_little(logits: np.ndarray) -> None:
        logits += 0.5 * step

    step = last_step(graph_of(network).simplified())
    assert step is not None
    forms = {"other": made(other_class), "little": made(a_little), "same": made(lambda x: None)}
    labels = np.concatenate([np.asarray(model(images)).argmax(1)[:200], np.full(100, -1)])
    counts = compare(network, images, labels, forms)
    assert (counts["images"], counts["correct"]) == (300, 200)
    right = 200 - sum(i < 200 for i in wrong)
    found = counts["forms"]
    assert (found["other"]["other_class"], found["other"]["above_one_step"]) == (7, 7)
    assert (found["little"]["other_class"], found["little"]["above_one_step"]) == (0, 0)
    assert found["little"]["largest"] == pytest.approx(0.5 * step, rel=1e-3)
    assert found["same"] == {
        "correct": 200,
        "other_class": 0,
        "above_one_step": 0,
        "largest": 0.0,
    }
    records = [{"counts": {"a": counts}}, {"counts": {"b": counts}}]
    head, _, run, other, *_ = table(records).splitlines()
    assert head == "| form | a | b |"
    assert run == "| the run | 66.67 % | 66.67 % |"
    cell = f"{100 * right / 300:.2f} %, 7 of 300 differ"
    assert other == f"| other | {cell} | {cell} |"


def test_a_step_of_the_last_layer_is_what_one_code_of_its_input_may_do(
    network: TrainedNetwork,
) -> None:
    variables = network.variables
    head = variables["params"]["head"]["kernel"]
    norm = variables["params"]["head_norm"]["scale"]
    variance = variables["batch_stats"]["head_norm"]["var"]
    gain = np.asarray(norm, np.float64) / np.sqrt(np.asarray(variance, np.float64) + 1e-5)
    limit = float(variables[RANGES]["head"]["kernel"])  # unsigned codes of 8 bits
    unit = np.eye(head.codes.shape[0]) * limit / 255
    expected = np.abs(unit @ (np.asarray(head.dequantize(), np.float64) * gain)).max()
    step = last_step(graph_of(network).simplified())
    assert step == pytest.approx(expected, rel=1e-6)


def test_float64_is_the_network_without_rounding(
    rng: np.random.Generator, network: TrainedNetwork
) -> None:
    """Nearer to a network of float64 parameters and codes than float32 comes."""
    images = rng.normal(size=(30, *network.image_shape)).astype(np.float32)
    found = FORMS["float64"](network, Path())(images)
    assert found.dtype == jnp.float64
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), ab.dequantize(network.variables)
        )
        module = network.model.clone(dtype=jnp.float64)
        wanted = module.apply(exact, jnp.asarray(images, jnp.float64), train=False)
        apart = np.abs(np.asarray(found) - np.asarray(wanted)).max(axis=1) / np.ptp(wanted)
    assert np.median(apart) < 1e-7
