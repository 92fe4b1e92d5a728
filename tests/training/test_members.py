"""Runs that train together: each is the run that it would be alone."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images
from ab_jax.training import members as members_module
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.compiled_step import optimizer_of_state
from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.loop import train
from ab_jax.training.members import Form, Member, run_together
from ab_jax.training.optimizers import OptimizerSettings, warmup_cosine
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.records import RunDirectory
from ab_jax.training.run_settings import Training
from ab_jax.training.state import create_state
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing
from tests.training.test_loop import assert_same_bits, last_state, lines_of, run

BATCH, STEPS = 8, 9


@pytest.fixture(scope="module")
def members(
    request: pytest.FixtureRequest,
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
) -> list[Training]:
    """Two seeds, two rates each, with a ramp and a decay of their own."""
    rng = np.random.default_rng([request.config.getoption("seed"), 3])
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
    seeds = rng.integers(2**31, size=2)
    return [
        Training(
            model=model,
            dataset=dataset,
            preprocessing=preprocessing,
            rules=rules,
            estimator=ab.full_precision,
            alpha=ab.cubic_ramp(1 + i, 8),
            optimizer=OptimizerSettings(name="sgd", weight_decay=1e-3 * i, momentum=0.9 - 0.1 * i),
            learning_rate=warmup_cosine(0.02 * (1 + i), 1, STEPS),
            batch_size=BATCH,
            steps=STEPS,
            eval_every=6,
            seed=int(seed),
            steps_per_call=3,
        )
        for i, seed in itertools.product(range(2), seeds)
    ]


@pytest.fixture(scope="module")
def alone(members: list[Training], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of them as a single run."""
    path = tmp_path_factory.mktemp("alone")
    for number, training in enumerate(members):
        run(training, path / str(number))
    return path


def train_together(
    members: list[Training],
    path: Path,
    *,
    mode: Mode = "pmap",
    form: Form | None = "vmap",
) -> list[Any]:
    """Members in `path/0`, `path/1`, ...: records, or what ended them."""

    def job(training: Training, number: int) -> Callable[[Member], dict[str, Any]]:
        def do(member: Member) -> dict[str, Any]:
            name = {"name": str(number)}
            with RunDirectory(path / str(number), experiment="tests", config=name) as directory:
                return train(training, member, directory)

        return do

    parallel = Parallel(mode, tuple(jax.devices()[:2]))
    jobs = [job(training, number) for number, training in enumerate(members)]
    return run_together(jobs, parallel, form=form)


def assert_close(found: Any, wanted: Any, *, rtol: float = 2e-3, atol: float = 2e-4) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize("form", ["vmap", "unrolled"])
def test_members_compute_what_they_would_alone(
    members: list[Training], alone: Path, tmp_path: Path, mode: Mode, form: Form
) -> None:
    records = train_together(members, tmp_path, mode=mode, form=form)
    for i, (training, record) in enumerate(zip(members, records, strict=True)):
        assert record["summary"]["together"] == {"members": 4, "form": form, "seconds": {}}
        for a, b in zip(lines_of(alone / str(i)), lines_of(tmp_path / str(i)), strict=True):
            for name in ("step", "alpha", "learning_rate"):
                assert a[name] == b[name]
            np.testing.assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-4)
        wanted = last_state(training, alone / str(i))
        state = last_state(training, tmp_path / str(i))
        assert int(state.step) == STEPS
        assert_close(state.params, wanted.params)
        assert_close(state.opt_state, wanted.opt_state)
    # They are four runs, not one.
    losses = {lines_of(tmp_path / str(i))[0]["train_loss"] for i in range(4)}
    assert len(losses) == 4


def test_in_turn_members_are_their_single_runs_to_the_bit(
    members: list[Training], tmp_path: Path
) -> None:
    two = [dataclasses.replace(t, estimator=ab.alpha_blend) for t in members[1:3]]
    train_together(two, tmp_path, form="in_turn")
    for i, training in enumerate(two):
        run(training, tmp_path / f"alone{i}")
        assert lines_of(tmp_path / f"alone{i}") == lines_of(tmp_path / str(i))
        states = [last_state(training, tmp_path / name) for name in (f"alone{i}", str(i))]
        assert_same_bits(*states)


def test_a_member_that_is_not_finite_is_left_behind(
    members: list[Training], alone: Path, tmp_path: Path
) -> None:
    explodes = warmup_cosine(1e6, 0, STEPS)
    settings = OptimizerSettings(name="sgd", momentum=0.0)
    bad = dataclasses.replace(members[1], learning_rate=explodes, optimizer=settings)
    three = [members[0], bad, members[2]]
    first, error, third = train_together(three, tmp_path)
    assert isinstance(error, NonFiniteLossError)
    wanted = _error_of(lambda: run(bad, tmp_path / "alone"))
    # The same parameter or loss, step, alpha and rate.
    assert str(error).partition("Last checkpoint")[0] == wanted.partition("Last checkpoint")[0]
    assert not (tmp_path / "1" / "record.json").exists()
    for i, record in ((0, first), (2, third)):
        assert record["summary"]["steps"] == STEPS
        states = [last_state(three[i], path / str(i)) for path in (tmp_path, alone)]
        assert_close(states[0].params, states[1].params)


def _error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(NonFiniteLossError) as caught:
        action()
    return str(caught.value)


def test_members_that_were_stopped_go_on_to_the_bit(
    members: list[Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = members[:2]
    train_together(two, tmp_path / "whole", form="unrolled")
    asked = itertools.chain([None] * 3, itertools.repeat("SIGTERM"))  # once a meeting
    with monkeypatch.context() as patched:
        patched.setattr("ab_jax.training.members.noted_signals", lambda: _nothing(asked))
        ends = train_together(two, tmp_path / "parts", form="unrolled")
    assert all(isinstance(end, StoppedError) for end in ends)
    records = train_together(two, tmp_path / "parts", form="unrolled")
    for i, record in enumerate(records):
        assert 0 < record["summary"]["resumed_at"] < STEPS
        paths = [tmp_path / name / str(i) for name in ("whole", "parts")]
        assert lines_of(paths[0]) == lines_of(paths[1])
        assert_same_bits(*(last_state(two[i], path) for path in paths))


@contextlib.contextmanager
def _nothing(asked: Iterator[str | None]) -> Iterator[Callable[[], str | None]]:
    yield lambda: next(asked)


def test_members_at_different_steps_train_together(
    members: list[Training], alone: Path, tmp_path: Path
) -> None:
    """As after a crash, when one had saved and the other had not."""
    two = members[:2]
    short = dataclasses.replace(two[1], steps=6)
    run(short, tmp_path / "1")
    (tmp_path / "1" / "record.json").unlink()
    records = train_together(two, tmp_path)
    assert [record["summary"]["resumed_at"] for record in records] == [0, 6]
    for i, training in enumerate(two):
        states = [last_state(training, path / str(i)) for path in (tmp_path, alone)]
        assert_close(states[0].params, states[1].params)


def test_the_fastest_form_is_measured(
    members: list[Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = members[:2]
    seconds = {"vmap": 0.3, "unrolled": 0.1, "in_turn": 0.2}
    measured = members_module._seconds

    def seen(function: Any, form: Form, calls: Any) -> float:
        assert measured(function, form, calls) > 0
        return seconds[form]

    monkeypatch.setattr(members_module, "_seconds", seen)
    records = train_together(two, tmp_path, form=None)
    for i, record in enumerate(records):
        expected = {"members": 2, "form": "unrolled", "seconds": seconds}
        assert record["summary"]["together"] == expected
        # Nothing was trained by measuring.
        assert int(last_state(two[i], tmp_path / str(i)).step) == STEPS
    train_together(two, tmp_path / "told", form="unrolled")
    for i in range(2):
        assert lines_of(tmp_path / str(i)) == lines_of(tmp_path / "told" / str(i))


def test_a_step_that_vmap_cannot_compute_is_computed_otherwise() -> None:
    @jax.custom_batching.custom_vmap
    def awkward(x: jax.Array) -> jax.Array:
        return x + 1

    @awkward.def_vmap
    def _(size: int, is_batched: Any, x: Any) -> Any:
        raise NotImplementedError("no rule for this")

    def job(number: int) -> Callable[[Member], Any]:
        def do(member: Member) -> tuple[float, str | None]:
            step = member.wrap(awkward, [False], donate=[0])
            on_device = member.replicate(np.float32(number))
            return float(member.unreplicate(step(on_device))), member.meeting.form

        return do

    found = run_together([job(i) for i in range(3)], Parallel("pmap", (jax.devices()[0],)))
    assert [value for value, _ in found] == [1, 2, 3]
    assert {form for _, form in found} <= {"unrolled", "in_turn"}


def test_images_lie_on_the_devices_once(
    members: list[Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[int] = []
    place = Parallel.place

    def counted(self: Parallel, tree: Any) -> Any:
        placed.append(id(jax.tree.leaves(tree)[0]))
        return place(self, tree)

    monkeypatch.setattr(Parallel, "place", counted)
    train_together(members[:2], tmp_path, form="in_turn")
    dataset = members[0].dataset
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sorted(placed) == sorted(id(part.images) for part in parts)


def test_what_cannot_train_together_is_refused() -> None:
    parallel = Parallel("pmap", (jax.devices()[0],))
    with pytest.raises(ValueError, match="no runs to train"):
        run_together([], parallel)
    with pytest.raises(ValueError, match="form='fast' must be one of vmap, unrolled, in_turn"):
        run_together([lambda member: None], parallel, form="fast")  # type: ignore[arg-type]


def test_an_error_of_one_member_does_not_keep_the_others_waiting() -> None:
    def fails(member: Member) -> float:
        raise KeyError("mine")

    def counts(member: Member) -> float:
        step = member.wrap(lambda x: x + 1, [False])
        x = member.replicate(np.float32(0))
        for _ in range(4):
            x = step(x)
        return float(member.unreplicate(x))

    parallel = Parallel("pmap", (jax.devices()[0],))
    first, second, third = run_together([counts, fails, counts], parallel, form="vmap")
    assert (first, third) == (4, 4)
    assert isinstance(second, KeyError)


@pytest.mark.parametrize(("leave", "compiled"), [(0, 1), (2, 1), (3, 2)])
def test_a_few_that_leave_compile_nothing(leave: int, compiled: int) -> None:
    traced = []

    def step(x: jax.Array, by: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return by * x + 1

    def job(number: int) -> Callable[[Member], float]:
        def do(member: Member) -> float:
            wrapped = member.wrap(step, [False, False], donate=[0])
            x, by = member.replicate((np.float32(number), np.float32(2)))
            for _ in range(1 if number < leave else 3):
                x = wrapped(x, by)
            return float(member.unreplicate(x))

        return do

    parallel = Parallel("pmap", (jax.devices()[0],))
    found = run_together([job(number) for number in range(5)], parallel, form="vmap")
    assert found == [2 * n + 1 if n < leave else 8 * n + 7 for n in range(5)]
    assert len(traced) == compiled


def test_members_whose_steps_take_other_arguments_are_refused() -> None:
    def job(number: int) -> Callable[[Member], Any]:
        def do(member: Member) -> float:
            sharded = [False] * (1 + number)
            step = member.wrap(lambda *xs: sum(xs), sharded)
            given = member.replicate(tuple(np.float32(i) for i in range(1 + number)))
            return float(member.unreplicate(step(*given)))

        return do

    found = run_together([job(0), job(1)], Parallel("pmap", (jax.devices()[0],)), form="vmap")
    refused = [end for end in found if isinstance(end, ValueError)]
    assert len(refused) == 1
    assert "alike but for their numbers" in str(refused[0])


def test_a_call_with_what_is_no_array_keeps_nobody_waiting() -> None:
    def job(argument: Any) -> Callable[[Member], Any]:
        def do(member: Member) -> float:
            step = member.wrap(lambda x: x + 1, [False])
            return float(member.unreplicate(step(member.replicate(np.float32(argument)))))

        return do

    def wrong(member: Member) -> Any:
        return member.wrap(lambda x: x + 1, [False])(3.0)

    parallel = Parallel("pmap", (jax.devices()[0],))
    first, second, third = run_together([job(1), wrong, job(2)], parallel, form="vmap")
    assert (first, third) == (2, 3)
    assert isinstance(second, AttributeError)


@pytest.mark.parametrize("method", ["ab", "ste", "lsq"])
def test_a_step_of_quantized_members_is_that_of_single_runs(
    members: list[Training], tmp_path: Path, method: str
) -> None:
    """Codes that flip magnify rounding from step to step: in one step none has flipped yet."""
    int4 = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=4, axis=-1)), (".*", None)])
    changes: dict[str, Any] = {
        "ab": {"estimator": ab.alpha_blend},
        "ste": {"estimator": ab.straight_through},
        "lsq": {"estimator": ab.learned_step_size, "rules": int4},
    }[method]
    changes |= {"steps": 1, "eval_every": 1, "learning_rate": optax.constant_schedule(0.01)}
    two = [
        dataclasses.replace(t, alpha=optax.constant_schedule(0.5), **changes) for t in members[1:3]
    ]
    train_together(two, tmp_path, form="vmap")
    for i, training in enumerate(two):
        run(training, tmp_path / f"alone{i}")
        like = create_state(
            training.model,
            optimizer_of_state(training),
            (4, 4, 1),
            seed=0,
            scale_rules=training.rules if method == "lsq" else None,
        )
        states = []
        for name in (f"alone{i}", str(i)):
            with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
                states.append(checkpoints.restore(like))
        assert int(states[0].step) == 1
        assert_close(states[0].params, states[1].params, rtol=1e-4, atol=1e-5)
        assert_close(states[0].scales, states[1].scales, rtol=1e-4, atol=1e-5)
