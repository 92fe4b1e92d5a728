"""The benchmark of deployment: a small run of it, and its table."""

import json
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from ab_jax.models.resnet import ResNet
from benchmarks import deploy
from benchmarks.deploy import CASES, Config, run, table
from benchmarks.measuring.ratios import ratio_cells

pytestmark = pytest.mark.long


def tiny(**fields: Any) -> nn.Module:
    return ResNet(stage_sizes=(1,), width=1 / 16, num_classes=3, **fields)


def test_every_case_is_timed_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(deploy.MODELS, "resnet50_v1", tiny)
    allowed = os.sched_getaffinity(0)
    out = tmp_path / "new" / "record.json"
    small = Config(
        networks=("resnet50_v1",),
        image_size=32,
        batch_size=2,
        single=2,
        cores=(1,),
        rounds=3,
        out=out,
    )
    record = run(small)
    assert os.sched_getaffinity(0) == allowed
    assert json.loads(out.read_text()) == record
    (by_conditions,) = record["seconds"].values()
    assert list(by_conditions) == ["1 image, 1 core", "2 images, 1 core"]
    for by_case in by_conditions.values():
        assert list(by_case) == list(CASES)
        assert all(len(times) == 3 and min(times) > 0 for times in by_case.values())
    sizes = record["bytes"]["resnet50_v1"]
    share = f"{sizes['int8'] / sizes['float32']:.3f}"
    assert f"| ResNet-50 v1 | ONNX Runtime, int8 | {share} |" in table([record])


def test_the_table_holds_ratios_to_float32_in_onnx_runtime(rng: np.random.Generator) -> None:
    seconds = {case: rng.uniform(1, 2, 3).tolist() for case in CASES}
    record = {
        "config": {"image_size": 224, "rounds": 3},
        "hardware": "a machine",
        "packages": {"jax": "1.2.3"},
        "onnxruntime": "4.5.6",
        "bytes": {
            "resnet50_v1": {
                "float32": 10_000_000,
                "int8": 2_500_000,
                "int8, integer biases": 2_600_000,
            }
        },
        "seconds": {"resnet50_v1": {"1 image, 2 cores": seconds}},
    }
    head, _, *lines = table([record]).splitlines()
    assert head == "| network | runtime | file | 1 image, 2 cores |"
    sizes = {
        "ONNX Runtime, float32": "1 (10.0 MB)",
        "ONNX Runtime, int8": "0.250",
        "ONNX Runtime, int8, integer biases": "0.260",
        "JAX, float32": "",
        "JAX, int8": "",
    }
    assert list(CASES) == list(sizes)
    cells = ratio_cells(seconds, lambda s: f"{1e3 * s:.1f} ms", digits=2)
    assert lines[: len(CASES)] == [
        f"| ResNet-50 v1 | {case} | {size} | {cells[case]} |" for case, size in sizes.items()
    ]
    assert "n = 3 rounds, 224 x 224 images; a machine; onnxruntime 4.5.6, jax 1.2.3" in lines[-1]


@pytest.mark.parametrize(
    ("name", "millions"),  # of the published networks: Keras counts the running statistics too
    [("mobilenet_v1_050", 1.331592), ("mobilenet_v1_100", 4.231976), ("resnet50_v1", 25.557032)],
)
def test_the_networks_are_those_of_their_names(name: str, millions: float) -> None:
    model = deploy.MODELS[name]()
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert found == round(1e6 * millions)
