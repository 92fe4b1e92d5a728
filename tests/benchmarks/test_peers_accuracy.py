"""Equal training under each library: a small run, and the table of a record."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers_accuracy
from benchmarks.measuring.generated_arrays import generated_variables
from benchmarks.other_libraries.libraries import LIBRARIES, Bits
from benchmarks.peers_accuracy import CASES, Config, Trainer, run, table

pytestmark = pytest.mark.long


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2), use_bias=False, name="conv")(x))
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(peers_accuracy, "BinaryNet", lambda width: Tiny())


def test_a_run_tries_rates_and_reads_the_test_images_once(tiny, tmp_path: Path, monkeypatch):
    few: dict[str, Any] = {name: CASES[name] for name in ("float", "ab_jax, AB")}
    monkeypatch.setattr(peers_accuracy, "CASES", few)
    out = tmp_path / "new" / "record.json"
    config = Config(bits=8, start_epochs=3, epochs=2, rates=(0.001, 0.05), seeds=(0,), out=out)
    record = run(config)
    assert json.loads(out.read_text()) == record
    for one in record["accuracy"].values():
        assert [rate for rate, _ in one["trials"]] == [0.001, 0.05]
        assert one["rate"] == max(one["trials"], key=lambda trial: trial[1])[0]
        ((seed, accuracy),) = one["test"]
        assert seed == 0
        assert accuracy > 0.5, "a tenth would be chance"
    assert "| 8 bits | ab_jax, AB |" in table([record])


def test_a_kernel_without_gradient_stays_and_a_mended_one_moves(tiny, rng) -> None:
    images = rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
    batch = peers_accuracy.Images(images, rng.integers(0, 10, 8).astype(np.int32))
    config = Config(batch_size=4)
    before = generated_variables(LIBRARIES["float"](Tiny(), Bits(2)).init, jnp.zeros((1, 8, 8, 1)))
    for name, moves in (("AQT", False), ("AQT, mended", True)):
        after = Trainer(config, name).train(before, batch, epochs=2, rate=0.1, seed=0)
        moved = {
            layer: bool(
                jnp.any(after["params"][layer]["kernel"] != before["params"][layer]["kernel"])
            )
            for layer in ("conv", "head")
        }
        assert moved == {"conv": moves, "head": True}


def test_the_table_pairs_seeds_with_float() -> None:
    def case(rate: float, *accuracies: float) -> dict[str, Any]:
        return {"rate": rate, "trials": [], "test": list(enumerate(accuracies))}

    record = {
        "config": {
            "bits": 2,
            "seeds": [0, 1, 2],
            "width": 0.125,
            "epochs": 20,
            "start_epochs": 10,
            "rates": [0.05, 0.2],
        },
        "peers": {"qwix": "4.5", "aqtp": "6.7"},
        "packages": {"jax": "1.2.3"},
        "accuracy": {"float": case(0.05, 0.9, 0.92, 0.94), "Qwix": case(0.2, 0.89, 0.91, 0.93)},
    }
    lines = table([record]).splitlines()
    assert lines[2] == "| float | float | 0.05 | 92.00 ± 2.00 | – |"
    assert lines[3] == "| 2 bits | Qwix | 0.2 | 91.00 ± 2.00 | -1.00 [-1.00, -1.00] |"
    assert "among 0.05, 0.2 on validation images" in lines[-1]
