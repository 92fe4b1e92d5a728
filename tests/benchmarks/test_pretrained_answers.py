"""Counting answers of files of published networks, on a small network of the same form."""

from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.pretrained_answers import FORMS, compare, networks_of, table
from experiments.pretrained.pretrained_models import PretrainedModel

SIZE, CLASSES = 12, 7


def small(rng: np.random.Generator) -> PretrainedModel:
    def forward(params: Any, images: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            images,
            params["stem"]["kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu6(x).mean((1, 2)) @ params["head"]["kernel"]

    shapes = {"stem": (3, 3, 3, 16), "head": (16, CLASSES)}
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    return PretrainedModel(
        forward=forward,
        params=params,
        normalize=lambda pixels: pixels.astype(np.float32) / 127.5 - 1,
        size=SIZE,
    )


def test_files_answer_as_jax_does_and_others_do_not(rng: np.random.Generator) -> None:
    model = small(rng)
    images = rng.integers(0, 256, (120, SIZE, SIZE, 3), dtype=np.uint8)
    networks = networks_of(model, images[:60])
    assert list(networks) == ["W8", "W8A8"]
    assert networks["W8A8"].ranges is not None
    counts = {
        f"mobilenet_v1_025, {n}": compare(x, model, images, FORMS) for n, x in networks.items()
    }
    for by_form in counts.values():
        assert by_form["images"] == 120
        assert list(by_form["forms"]) == list(FORMS)
        for name, found in by_form["forms"].items():
            # Integer biases are rounded; a code between two may be either.
            assert found["apart"] < (5e-3 if name in ("onnx_integer_bias", "litert") else 1e-5)
            assert found["other_class"] <= 6

    def reversed_logits(network: Any) -> Any:
        of = FORMS["integers"](network)
        return lambda x: -np.asarray(of(x))

    wrong = compare(networks["W8"], model, images, {"wrong": reversed_logits})["forms"]["wrong"]
    assert wrong["other_class"] == 120
    assert wrong["apart"] == pytest.approx(2)

    told = table([{"counts": counts, "hardware": "a machine"}])
    assert "| form | MobileNet v1, 0.25, W8 | MobileNet v1, 0.25, W8A8 |" in told
    assert told.endswith("Of 120 photographs those with another most likely class than in JAX, and "
                         "the median distance of logits over their length; a machine.")  # fmt: skip
