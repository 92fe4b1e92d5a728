"""Counting what differs between an exported network and its run."""

from typing import Any

import jax
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.export.graph.fold import fold_batch_norm
from ab_jax.export.graph.operations import Dense, values_of
from benchmarks.exported_answers import compare, graph_of, last_step, table
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

    step = last_step(fold_batch_norm(graph_of(network)))
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
    graph = fold_batch_norm(graph_of(network))
    (head,) = [node.operation for node in graph.nodes if node.name == "head"]
    (source,) = [node.operation for node in graph.nodes if node.name == "head_input"]
    assert isinstance(head, Dense)
    unit = np.eye(head.kernel.codes.shape[0]) * float(source.quantizer.scale(source.limit))
    expected = np.abs(unit @ np.asarray(values_of(head.kernel), np.float64)).max()
    assert last_step(graph) == pytest.approx(expected, rel=1e-6)
