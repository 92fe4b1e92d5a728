"""The small transformer: what it sees, which scales it has, that it learns, what is recorded."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax import nnx as ab_nnx
from ab_jax.export.dictionaries import to_dictionaries
from ab_jax.export.packed import read_packed
from experiments import decoder_text
from experiments.decoder import bits_per_byte as table
from experiments.decoder import decoder_training as training
from experiments.decoder import help_text as text
from experiments.decoder.transformer import RULES, Decoder
from experiments.execution.combinations import plan
from experiments.reporting.run_records import ReportError, read_records
from tests.fast_compilation import fast_compilation

__all__ = ["fast_compilation"]
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("fast_compilation")]

ROOT = Path(__file__).parents[2]
SMALL = {"width": 32, "layers": 1, "heads": 2, "context": 16, "batch_size": 16}


@pytest.fixture(scope="module")
def decoder(fast_compilation: None) -> Decoder:
    return Decoder(width=32, heads=2, layers=1, context=16, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def python_text() -> text.Text:
    return text.load_text()


# The text


def test_the_text_holds_each_paragraph_once(python_text: text.Text) -> None:
    pages = ["a b\n\nc", "c\n\n  a\n  b\n\n\n\nd\n\n"]
    assert text.without_repetitions(pages) == "a b\n\nc\n\nd"
    facts = python_text.facts
    parts = [python_text.train, python_text.validation, python_text.test]
    assert [len(part) for part in parts] == [
        facts[f"{name}_bytes"] for name in ("train", "validation", "test")
    ]
    assert sum(map(len, parts)) == facts["bytes"] > 300_000
    # No stretch of a hundred bytes of the test part stands in the training part.
    train, test = python_text.train.tobytes(), python_text.test.tobytes()
    found = [test[i : i + 100] in train for i in range(0, len(test) - 100, 2000)]
    assert sum(found) <= 1


def test_blocks_are_contiguous_and_belong_to_one_part() -> None:
    made = text.split("".join(chr(48 + i) * 3 for i in range(20)))
    assert made.validation.tobytes() == b"444>>>"
    assert made.test.tobytes() == b"999CCC"
    assert made.train.tobytes().startswith(b"000111222333555")
    with pytest.raises(ValueError, match="3 bytes cannot be cut into 20 blocks"):
        text.split("abc")


def test_unigram_entropy_is_that_of_the_counts() -> None:
    train = np.array([0] * 127 + [1], np.uint8)  # with one more each: 128 and 2 of 384
    test = np.array([0, 1], np.uint8)
    wanted = (np.log2(384 / 128) + np.log2(384 / 2)) / 2
    assert text.unigram_entropy(train, test) == pytest.approx(wanted)


def test_windows_predict_each_byte_once(rng: np.random.Generator) -> None:
    part = rng.integers(1, 256, size=int(rng.integers(50, 100))).astype(np.uint8)
    tokens, weights = text.windows(part, count=3, context=8)
    assert tokens.shape[1:] == (3, 9)
    predicted = tokens[..., 1:][weights == 1]
    np.testing.assert_array_equal(predicted, part[1:])
    np.testing.assert_array_equal(tokens[..., :-1][weights == 1], part[:-1])


def test_draws_are_stretches_of_the_part(rng: np.random.Generator) -> None:
    part = np.arange(40, dtype=np.uint8)
    drawn = text.draw(part, 700, 10, rng)
    np.testing.assert_array_equal(drawn - drawn[:, :1], np.tile(np.arange(10), (700, 1)))
    # 700 draws of 31 starts miss the first or the last once in 4e9.
    assert (drawn.min(), drawn.max()) == (0, 39)


# The model


def test_a_later_byte_leaves_earlier_logits(decoder: Decoder, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 256, size=(2, 12)).astype(np.int32)
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    logits = nnx.jit(lambda model, tokens: model(tokens))
    before, after = np.asarray(logits(decoder, tokens)), np.asarray(logits(decoder, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(-1) > 0).all()


def test_attention_has_a_scale_for_each_output_channel(decoder: Decoder) -> None:
    """With values: the scale of one head's feature is that of its own weights and no others."""
    codes = to_dictionaries(ab_nnx.quantize(decoder, RULES))
    attention = codes["blocks"]["0"]["attention"]
    kernel = decoder.blocks[0].attention.query.kernel[...]  # [features, heads, head size]
    assert attention["query"]["kernel"].scale.shape == (1, 2, 16)
    assert attention["out"]["kernel"].scale.shape == (1, 1, 32)  # [heads, head size, features]
    flat = ab.Ternary().quantize(kernel.reshape(32, 32))
    np.testing.assert_array_equal(attention["query"]["kernel"].codes.reshape(32, 32), flat.codes)
    np.testing.assert_allclose(attention["query"]["kernel"].scale.ravel(), flat.scale.ravel())
    out = decoder.blocks[0].attention.out.kernel[...].reshape(32, 32)
    flat = ab.Ternary().quantize(out)
    np.testing.assert_array_equal(attention["out"]["kernel"].codes.reshape(32, 32), flat.codes)
    assert codes["embed"]["embedding"].scale.shape == (256, 1)
    rows = {row.path: row for row in ab.describe(nnx.state(decoder, nnx.Param), RULES).rows}
    assert rows["blocks/0/attention/value/kernel"].quantizer == ab.Ternary(axis=(-2, -1))
    assert rows["position/embedding"].quantizer is None


def test_the_output_layer_is_the_embedding(decoder: Decoder) -> None:
    """One parameter with one path, of which both places see the codes at alpha 1."""
    blended = ab_nnx.blended(decoder, RULES, 1.0)
    table_of = np.asarray(blended.embed.embedding[...])
    hidden = jnp.ones((1, 32))
    np.testing.assert_allclose(blended.embed.attend(hidden)[0], table_of.sum(1), rtol=1e-4)
    codes = ab_nnx.quantize(decoder, RULES)["embed"]["embedding"].get_raw_value()
    np.testing.assert_array_equal(table_of, codes.dequantize())


# Runs


@pytest.fixture(scope="module")
def runs(
    fast_compilation: None, python_text: text.Text, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A float run, and AB from it."""
    path = tmp_path_factory.mktemp("runs")
    flags: dict[str, Any] = {**SMALL, "runs_dir": str(path), "learning_rate": 0.03}
    few = text.split(python_text.train[:20_000].tobytes().decode(errors="replace"))
    start = decoder_text.Config(method="float", steps=120, eval_every=120, name="start", **flags)
    decoder_text.run(start, few)
    flags |= {"init_from": str(path / "start"), "read_test": True}
    decoder_text.run(decoder_text.Config(steps=30, eval_every=15, name="ab", **flags), few)
    return path


def record(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "record.json").read_text())


def test_a_short_run_beats_the_frequencies_of_bytes(runs: Path) -> None:
    unigram = record(runs, "start")["data"]["unigram_bits_per_byte"]
    assert record(runs, "start")["summary"]["validation"]["blended"] < unigram - 0.2
    assert record(runs, "start")["summary"]["test"] is None


def test_ab_ends_as_the_quantized_model(runs: Path) -> None:
    unigram = record(runs, "ab")["data"]["unigram_bits_per_byte"]
    halfway, last = record(runs, "ab")["metrics"]
    assert 0 < halfway["alpha"] < last["alpha"] == 1
    assert last["blended"] == last["quantized"] < unigram - 0.1
    assert halfway["blended"] != halfway["quantized"]
    summary = record(runs, "ab")["summary"]
    assert summary["test"]["blended"] == summary["test"]["quantized"]


def test_the_exported_codes_are_those_of_the_last_weights(runs: Path) -> None:
    params = read_packed(runs / "ab" / decoder_text.PARAMETERS).variables["params"]
    network = read_packed(runs / "ab" / decoder_text.CODES)
    wanted = ab.quantize(params, RULES)
    for one, other in zip(
        jax.tree.leaves(network.variables["params"]), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert network.network["method"] == "ab"


def test_bits_per_byte_is_the_mean_over_all_bytes(
    decoder: Decoder, rng: np.random.Generator
) -> None:
    """By a direct sum in float64, whatever the batches."""
    part = rng.integers(0, 256, size=41).astype(np.uint8)
    inputs = np.zeros(48, np.int32)  # three stretches; what fills the last one is not counted
    inputs[:40] = part[:40]
    logits = nnx.jit(lambda model, tokens: model(tokens))(decoder, inputs.reshape(3, 16))
    rows = np.asarray(logits, np.float64).reshape(48, 256)[:40]
    log_sum = np.log(np.exp(rows).sum(1))
    wanted = (log_sum - rows[np.arange(40), part[1:]]).mean() / np.log(2)
    found = training.bits_per_byte(decoder, part, batch_size=2, context=16)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_runs_that_cannot_be(runs: Path, python_text: text.Text) -> None:
    flags: dict[str, Any] = {**SMALL, "runs_dir": str(runs)}
    with pytest.raises(ValueError, match="--heads=3 does not divide --width=32"):
        decoder_text.run(decoder_text.Config(**{**flags, "heads": 3}), python_text)
    with pytest.raises(FileExistsError, match="is complete"):
        decoder_text.run(decoder_text.Config(name="ab", **flags), python_text)
    wider = {**flags, "width": 64, "init_from": str(runs / "start")}
    with pytest.raises(ValueError, match=r"key/kernel has the shape \(32, 2, 16\) in the dic"):
        decoder_text.build(decoder_text.Config(**wider))


# The table


def made_record(method: str, seed: int, rate: float, test: dict | None, validation: dict) -> dict:
    return {
        "experiment": "experiments.decoder_text",
        "config": {"method": method, "seed": seed, "learning_rate": rate, "read_test": bool(test)},
        "data": {"unigram_bits_per_byte": 4.5, "sha256": "0123456789abcdef"},
        "summary": {"validation": validation, "test": test},
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed in (0, 1):
        values = {
            "float": {"blended": 2.0 + seed, "quantized": 5.0 + seed},
            "ste": {"blended": 9.0, "quantized": 2.5 + 2 * seed},
            "ab": {"blended": 9.0, "quantized": 2.25 + 2 * seed},
        }
        for method, test in values.items():
            held = made_record(method, seed, 0.5, test, test)
            (tmp_path / f"{method}{seed}.json").write_text(json.dumps(held))
    for rate, value in ((0.25, 3.0), (0.5, 2.75)):
        held = made_record("ste", 100, rate, None, {"blended": 9.0, "quantized": value})
        (tmp_path / f"trial{rate}.json").write_text(json.dumps(held))
    return tmp_path


def test_the_table_has_means_and_paired_differences(study: Path) -> None:
    made = table.tables(read_records([study]))
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in made.splitlines()
        if line.startswith("| ")
    }
    assert rows["float"][:3] == ["0.5", "2", "2.500 ± 0.707"]
    assert rows["float"][4] == "baseline"
    (ptq,) = (row for name, row in rows.items() if "PTQ" in name)
    assert ptq[2:] == ["5.500 ± 0.707", "+2.000 [-4.353, +8.353]", "+3.000 [+3.000, +3.000]"]
    assert rows["AB"][2:4] == ["3.250 ± 1.414", "-0.250 [-0.250, -0.250]"]
    # Trials: the smaller is the better.
    assert "| STE | 3.000 | **2.750** | 2 |" in made
    assert "A byte costs 4.50 bits" in made


def test_the_table_refuses_two_rates_of_a_method(study: Path) -> None:
    held = made_record("ab", 2, 0.25, {"quantized": 1.0}, {"quantized": 1.0})
    (study / "other.json").write_text(json.dumps(held))
    with pytest.raises(ReportError, match="final runs of AB have several rates"):
        table.tables(read_records([study]))
    with pytest.raises(ReportError, match="no lines <!-- decoder_text -->"):
        table.renewed("nothing", "text")


def test_the_page_shows_the_table_of_the_records() -> None:
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    kept = ROOT / "results" / "decoder_text"
    made = table.tables(read_records([kept]) if kept.exists() else [])
    assert table.renewed(page, made) == page


def test_the_commands_of_the_study_are_as_sweeps_take_them() -> None:
    told = re.sub(r"\\\n\s*", " ", str(decoder_text.__doc__))
    commands = re.findall(r"experiments\.sweep decoder_text .*?-- ([^(\n]*)", told)
    assert len(commands) == 3
    known = set(decoder_text.Config.__dataclass_fields__)
    for command in commands:
        words = command.replace("'", "").split()
        for one in plan("decoder_text", words):
            assert one.flags.keys() <= known
    trials = plan("decoder_text", commands[1].replace("'", "").split())
    assert len(trials) == 20
