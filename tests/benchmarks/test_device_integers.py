"""The benchmark of integers on a device: what its forms give, a small run, and its table."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ab_jax.models.resnet import ResNet
from benchmarks import device_integers
from benchmarks.device_integers import FORMS, Config, make_subject, rounded_in_float, run, table
from benchmarks.measuring.generated_arrays import generated_images
from benchmarks.measuring.ratios import ratio_cells

SIZE = 16
INTEGERS = [name for name in FORMS if name.startswith("int8")]
MATRICES = "int8, convolutions as matrices"
tiny = functools.partial(ResNet, (1, 1), 8, num_classes=5, stem=32, cpu_convolutions=False)


@pytest.fixture(scope="module")
def subject() -> device_integers.Subject:
    return make_subject(tiny, SIZE)


def test_integers_are_another_way_to_compute_the_rounded_network(
    subject: device_integers.Subject,
) -> None:
    images, _ = generated_images(64, SIZE, 5, seed=3)
    wanted = np.asarray(jax.jit(rounded_in_float(subject))(images))
    exact = jax.jit(lambda x: subject.make().apply(subject.variables, x, train=False))(images)
    found = np.asarray(jax.jit(FORMS[MATRICES](subject))(images))
    spread = wanted.std(0).mean()
    rounding, other_order = (np.abs(y - wanted).mean() for y in (exact, found))
    assert rounding > 0.01 * spread  # or nothing would be rounded
    # A code on the border of two may fall to either side; most images have none that does.
    assert np.median(np.abs(found - wanted)) < 1e-4 * spread
    assert other_order < 0.1 * rounding
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) > 0.9


def test_what_a_compiler_does_not_take_is_told_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: device_integers.Subject
) -> None:
    def refused(subject: Any) -> Any:
        raise NotImplementedError("no such convolution\nat all")

    forms = {name: FORMS[name] for name in ("float32", MATRICES)}
    monkeypatch.setattr(device_integers, "FORMS", {**forms, "refused": refused})
    monkeypatch.setattr(device_integers, "make_subject", lambda *of: subject)
    out = tmp_path / "new" / "record.json"
    record = run(Config(image_size=SIZE, batch_size=4, rounds=2, repeats=2, out=out))
    assert json.loads(out.read_text()) == record
    assert record["raises"] == {"refused": "NotImplementedError: no such convolution"}
    assert record["device"] == {"kind": "cpu", "platform": "cpu"}
    assert list(record["seconds"]) == list(forms)
    assert all(len(times) == 2 and min(times) > 0 for times in record["seconds"].values())
    answers = record["answers"]
    assert answers[MATRICES]["distance"] < answers["float32"]["distance"]
    assert "| refused | raises NotImplementedError | – |" in table([record])


def test_the_table_holds_ratios_to_the_first_form(rng: np.random.Generator) -> None:
    seconds = {name: rng.uniform(1, 2, 5).tolist() for name in FORMS}
    record = {
        "config": {"image_size": 224, "width": 0.5, "batch_size": 64, "rounds": 5},
        "hardware": "a machine",
        "device": {"kind": "a chip", "platform": "gpu"},
        "packages": {"jax": "1.2.3"},
        "peers": {"qwix": "4.5.6"},
        "answers": {name: {"same_class": 1.0, "distance": 0.25} for name in FORMS},
        "raises": {},
        "seconds": seconds,
    }
    head, _, *lines = table([record]).splitlines()
    assert head == "| form | time | distance |"
    cells = ratio_cells(seconds, lambda s: f"{1e3 * s:.2f} ms")
    assert lines[: len(FORMS)] == [f"| {name} | {cells[name]} | 0.2500 |" for name in FORMS]
    assert "n = 5 rounds" in lines[-1]
    assert "a chip; a machine; qwix 4.5.6, jax 1.2.3" in lines[-1]


@pytest.mark.long
@pytest.mark.parametrize("name", INTEGERS)
def test_all_integers_are_near_the_rounded_network(
    subject: device_integers.Subject, name: str
) -> None:
    images, _ = generated_images(32, SIZE, 5, seed=4)
    wanted = np.asarray(jax.jit(rounded_in_float(subject))(images))
    found = np.asarray(jax.jit(FORMS[name](subject))(images))
    own_codes = name == "int8, Qwix"  # of ranges of the moment
    assert np.abs(found - wanted).mean() < (0.2 if own_codes else 0.01) * wanted.std(0).mean()
