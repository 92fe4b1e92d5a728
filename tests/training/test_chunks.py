"""Several steps as one program, and the numbers of a run as its arguments."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.monitoring
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images
from ab_jax.training.compiled_step import spans_of, steps_per_call
from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.optimizers import OptimizerSettings, make_optimizer, warmup_cosine
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.run_settings import Training
from ab_jax.training.step_numbers import BLOCK
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing
from tests.training.test_loop import assert_same_bits, last_state, lines_of, run

BATCH, STEPS = 8, 23


@pytest.fixture(scope="module")
def training(
    request: pytest.FixtureRequest,
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
) -> Training:
    rng = np.random.default_rng([request.config.getoption("seed"), 2])
    dataset = Dataset(
        name="random",
        version="1.0.0",
        train=make_images(rng, 7 * BATCH + 3),
        validation=make_images(rng, 21),
        test=make_images(rng, 21),
        class_names=tuple("abcde"),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return Training(
        model=model,
        dataset=dataset,
        preprocessing=preprocessing,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=ab.cubic_ramp(2, 19),
        optimizer=OptimizerSettings(name="sgd", weight_decay=1e-3, accumulate=2),
        learning_rate=warmup_cosine(0.05, 1, STEPS // 2),
        batch_size=BATCH,
        steps=STEPS,
        eval_every=9,
        seed=int(rng.integers(2**31)),
        accumulate=2,
        steps_per_call=4,
    )


def assert_close(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_chunks_compute_what_single_steps_do(
    training: Training, tmp_path: Path, mode: Mode
) -> None:
    # Float activations and a float network: a code that flips would magnify rounding.
    smooth = dataclasses.replace(training, estimator=ab.full_precision)
    run(smooth, tmp_path / "chunks", mode=mode)
    run(smooth, tmp_path / "steps", mode=mode, steps_per_call=1)
    for found, wanted in zip(
        lines_of(tmp_path / "chunks"), lines_of(tmp_path / "steps"), strict=True
    ):
        assert found["step"] == wanted["step"]
        assert found["alpha"] == wanted["alpha"]
        assert found["learning_rate"] == wanted["learning_rate"]
        np.testing.assert_allclose(found["train_loss"], wanted["train_loss"], rtol=1e-4)
        np.testing.assert_allclose(found["train_accuracy"], wanted["train_accuracy"], atol=0.02)
    states = [last_state(smooth, tmp_path / name) for name in ("chunks", "steps")]
    assert int(states[0].step) == int(states[1].step) == STEPS
    assert_close(states[0].params, states[1].params)


def test_the_steps_of_a_call_end_at_multiples_and_evaluations() -> None:
    spans = list(spans_of(0, 23, 4, 9))
    assert [span.stop for span in spans] == [4, 8, 9, 12, 16, 18, 20, 23]
    assert list(itertools.chain.from_iterable(spans)) == list(range(23))
    for i, span in enumerate(spans):  # going on from the end of any call
        assert list(spans_of(span.stop, 23, 4, 9)) == spans[i + 1 :]
    assert [len(span) for span in spans_of(0, 40, 20, 400)] == [20, 20]


def test_a_run_that_was_stopped_goes_on_to_the_bit(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(training, tmp_path / "whole")
    asked = itertools.chain([None] * 4, itertools.repeat("SIGTERM"))
    with monkeypatch.context() as patched:
        patched.setattr("ab_jax.training.loop.agreed", lambda *_, **__: lambda: next(asked))
        with pytest.raises(StoppedError, match="stopped at step 12"):
            run(training, tmp_path / "parts")
    assert run(training, tmp_path / "parts")["summary"]["resumed_at"] == 12
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    states = [last_state(training, tmp_path / name) for name in ("parts", "whole")]
    assert_same_bits(*states)


def test_a_step_that_is_not_finite_is_named_within_its_call(
    training: Training, tmp_path: Path
) -> None:
    explodes = make_optimizer("sgd", lambda count: jax.numpy.where(count < 5, 1e-3, jax.numpy.inf))
    with pytest.raises(NonFiniteLossError, match=r"at step 6, "):
        run(training, tmp_path / "run", optimizer=explodes, accumulate=1)


def test_a_second_rate_or_ramp_compiles_nothing(training: Training, tmp_path: Path) -> None:
    misses: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            misses.append(event)

    run(training, tmp_path / "first")
    jax.monitoring.register_event_listener(listen)
    try:
        settings = OptimizerSettings(name="sgd", weight_decay=5e-3, momentum=0.8, accumulate=2)
        run(
            training,
            tmp_path / "second",
            optimizer=settings,
            learning_rate=warmup_cosine(0.11, 2, STEPS // 2),
            alpha=ab.linear_ramp(5, 15),
            seed=training.seed + 1,
        )
        assert misses == []
        # The counter counts: another batch is another program.
        run(training, tmp_path / "third", batch_size=BATCH - 2)
        assert misses
    finally:
        jax.monitoring.unregister_event_listener(listen)
    first, second = (lines_of(tmp_path / name)[0] for name in ("first", "second"))
    assert first["learning_rate"] != second["learning_rate"]
    assert first["alpha"] != second["alpha"]


def test_numbers_as_arguments_train_as_constants_do(training: Training, tmp_path: Path) -> None:
    t = dataclasses.replace(training, steps_per_call=1, estimator=ab.full_precision)
    constant = make_optimizer("sgd", t.learning_rate, weight_decay=1e-3, accumulate=2)
    run(t, tmp_path / "arguments")
    run(t, tmp_path / "constants", optimizer=constant)
    states = [last_state(t, tmp_path / name) for name in ("arguments", "constants")]
    assert_close(states[0].params, states[1].params)
    assert_close(states[0].opt_state, states[1].opt_state)


def test_a_chunk_is_one_transfer_in_and_one_out(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"in": 0, "out": 0}
    shard, to_host = Parallel.shard_own, Parallel.to_host

    def counted_shard(self: Parallel, tree: Any) -> Any:
        counts["in"] += 1
        return shard(self, tree)

    def counted_to_host(self: Parallel, tree: Any) -> Any:
        counts["out"] += 1
        return to_host(self, tree)

    run(training, tmp_path / "compiled")
    monkeypatch.setattr(Parallel, "shard_own", counted_shard)
    monkeypatch.setattr(Parallel, "to_host", counted_to_host)
    found = {}
    for per_call in (1, 20):
        counts |= {"in": 0, "out": 0}
        changes = {"steps": 120, "eval_every": 120, "steps_per_call": per_call, "read_test": False}
        run(training, tmp_path / f"run{per_call}", **changes)
        found[per_call] = dict(counts)
    assert found[1]["in"] - found[20]["in"] == 120 - 6
    assert found[20]["out"] == found[1]["out"]  # looks are as far apart


@pytest.mark.parametrize("asked", [0, BLOCK + 1])
def test_impossible_chunks_are_refused(training: Training, tmp_path: Path, asked: int) -> None:
    with pytest.raises(ValueError, match=f"steps_per_call={asked} must be 1 to {BLOCK}"):
        run(training, tmp_path / "run", steps_per_call=asked)


@pytest.mark.parametrize("per_call", [1, 4])
def test_numbers_go_on_behind_a_block(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_call: int
) -> None:
    run(training, tmp_path / "one", steps_per_call=per_call)
    for module in ("loop", "step_numbers"):  # several blocks, at whose end no call ends
        monkeypatch.setattr(f"ab_jax.training.{module}.BLOCK", 6)
    run(training, tmp_path / "several", steps_per_call=per_call)
    assert lines_of(tmp_path / "several") == lines_of(tmp_path / "one")
    assert_same_bits(*(last_state(training, tmp_path / name) for name in ("several", "one")))


def test_cpus_take_single_steps_unless_told_otherwise(training: Training) -> None:
    parallel = Parallel("pmap", (jax.devices()[0],))
    assert steps_per_call(dataclasses.replace(training, steps_per_call=None), parallel) == 1
    assert steps_per_call(training, parallel) == 4
