"""The training loop: a Python loop over compiled steps that evaluates, saves and records."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from ab_jax.blend import initial_scales
from ab_jax.data.batches import steps_per_epoch
from ab_jax.describe import describe
from ab_jax.estimators import full_precision, takes_scale
from ab_jax.linen import RANGES
from ab_jax.training.accuracies import Readings
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.checkpoint_items import Interval, Standing
from ab_jax.training.compiled_step import (
    LOOK_EVERY,
    compile_train_step,
    metrics_of_steps,
    optimizer_of_state,
    schedules_of,
    spans_of,
    steps_per_call,
)
from ab_jax.training.distillation import digest
from ab_jax.training.distributed import agreed, first_succeeds
from ab_jax.training.evaluation import Evaluator
from ab_jax.training.finite import FiniteCheck
from ab_jax.training.members import Member
from ab_jax.training.parallel import Parallel
from ab_jax.training.ramps import Alphas, check_never_falls
from ab_jax.training.records import RunDirectory, accuracies_of
from ab_jax.training.run_settings import Training
from ab_jax.training.starting import (
    calibrated,
    load_teacher,
    network_from,
    with_rebased_norm,
)
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.step_numbers import BLOCK
from ab_jax.training.stopping import StoppedError, noted_signals, until_asked
from ab_jax.training.watching import (
    PROFILED_STEPS,
    profiler,
    shown_progress,
    warn_of_cut_off,
)


def train(training: Training, parallel: Parallel, run: RunDirectory) -> dict[str, Any]:
    """Train, going on from the last checkpoint in the run's directory if there is one.

    Of several processes each calls it with the same arguments, but for a stream's share and for
    who writes into the directory, which all of them must see. Of several runs that train together
    (`ab_jax.training.members`) each has a `Member` for `parallel`.

    Returns:
      The run's record, which is written there too.

    Raises:
      NonFiniteLossError: names the step, alpha, learning rate, parameter and last checkpoint.
      StoppedError: SIGTERM or SIGINT asked for it; all is saved.
      OSError: something cannot be written, the disk being full, say; names it and the fix.
      ValueError, FileNotFoundError: arguments that do not fit each other or what the run has come
        to, or a file of the run that was changed, before anything is compiled.
    """
    t = training
    started = time.monotonic()
    member = parallel if isinstance(parallel, Member) else None
    per_epoch = steps_per_epoch(t.batch_size, len(t.dataset.train))
    if t.steps < 1 or t.eval_every < 1:
        raise ValueError(f"steps={t.steps} and eval_every={t.eval_every} must be at least 1.")
    if t.profile and t.steps <= PROFILED_STEPS[0]:
        raise ValueError(
            f"A profile starts after {PROFILED_STEPS[0]} steps, but this run has {t.steps}. Train "
            f"longer, or do not profile."
        )
    evaluator = Evaluator(t.model, t.preprocessing, parallel, t.batch_size)
    readings = Readings(evaluator, t.dataset, rules=t.rules, estimator=t.estimator, watch=t.watch)
    per_call = steps_per_call(t, parallel)
    train_step = compile_train_step(
        t, parallel, streamed=readings.train.sharded, chunked=per_call > 1
    )

    with (
        noted_signals() as noted,
        Checkpoints(run.path / "checkpoints", keep=t.keep_checkpoints) as checkpoints,
    ):
        state = _initial_state(t, checkpoints)
        first = int(state.step)
        teacher = None
        if t.teacher is not None:
            teacher = load_teacher(t.teacher, t.model, t.dataset.image_shape)
        taught_by = None if teacher is None else digest(teacher)
        table = describe(state.params, t.rules)  # in every process: it checks the rules
        if parallel.speaks and t.estimator is not full_precision:  # which no rule touches
            print(table)
        standing = checkpoints.standing
        # A run that was killed in its first evaluations may have lines and no checkpoint yet.
        if not first and len(run.metrics) > 2:
            raise ValueError(
                f"There is no checkpoint in {run.path / 'checkpoints'}, but {len(run.metrics)} "
                f"lines of metrics. Put the checkpoints back, or remove {run.path} to begin anew."
            )
        if first > t.steps:
            raise ValueError(
                f"The run has come to step {first}, and with these flags it ends at {t.steps}. "
                f"Train longer, or begin a shorter run under another --name."
            )
        if standing.teacher != taught_by and not run.allow_changed and first:
            raise ValueError(
                f"The teacher in {t.teacher} is another network than the one that the run "
                f"{run.path} has come to step {first} with. Put that one back, or go on with this "
                f"one by --allow_changed."
            )
        check_never_falls(first, standing.alphas, _alphas(t, first, state.params).by_path())
        with first_succeeds(f"Going on in {run.path}"):
            run.forget_after(first, standing.metrics)
        readings.remember_codes(state)
        recent: list[dict[str, Any]] = []  # metrics since the last evaluation
        if first and (interval := checkpoints.restore_interval()) is not None:
            recent, readings.codes = interval.steps(), interval.codes
        finite = FiniteCheck(
            learning_rate=lambda step: float(t.learning_rate(step // t.accumulate)),
            last_checkpoint=lambda: checkpoints.latest_path,
        )
        on_devices = parallel.replicate(state)
        # An argument of each step: not a constant in its program, nor a part of checkpoints.
        constants = () if teacher is None else (parallel.replicate(teacher),)
        computed: list[tuple[range, Any]] = []  # steps whose metrics are on the devices yet
        measured_from, since, done = len(recent), time.monotonic(), first
        evaluating: list[float] = []  # seconds of each evaluation, in which nothing is trained

        def look(*, ahead: int = 0) -> None:
            """At all calls but the last ones, on which the devices work meanwhile."""
            seen = computed[: len(computed) - ahead]
            del computed[: len(seen)]
            on_host = parallel.to_host([metrics for _, metrics in seen])
            for (span, _), metrics in zip(seen, on_host, strict=True):
                of_steps = metrics_of_steps(metrics, len(span)) if per_call > 1 else [metrics]
                recent.extend(of_steps)
                finite.steps(of_steps, span.start, state.trained)
            checkpoints.check()

        spans = functools.partial(spans_of, first, t.steps, per_call, t.eval_every)
        if per_call > 1:
            batches = readings.train.chunks(t.seed, t.batch_size, spans())
        else:
            batches = readings.train.training(t.seed, t.batch_size, first, t.steps)
        asked_to_stop = noted if member is None else member.asked_to_stop
        stop = agreed(asked_to_stop, every=max(1, LOOK_EVERY // per_call))
        batches = until_asked(stop, batches, alone=jax.process_count() == 1)
        schedules = schedules_of(t, state.params)
        numbers, numbers_end = None, first
        with (
            shown_progress(first, t.steps, parallel.speaks) as show,
            profiler(t.profile and parallel.speaks, run.path) as profile,
        ):
            for span, batch in zip(spans(), batches, strict=False):  # which may end before
                profile(span.start - first)
                if span.stop > numbers_end:
                    numbers = parallel.replicate(schedules.block(span.start))
                    numbers_end = span.start + BLOCK
                on_devices, metrics = train_step(on_devices, *batch, numbers, *constants)
                computed.append((span, metrics))
                done = span.stop
                evaluates = done % t.eval_every == 0 or done == t.steps
                if not evaluates and done // LOOK_EVERY == span.start // LOOK_EVERY:
                    continue
                look(ahead=0 if evaluates else 1)
                trained = len(recent) - measured_from
                speed = trained * t.batch_size / (time.monotonic() - since)
                if recent:
                    show(done, recent[-1], speed)
                if not evaluates:
                    continue
                stood_still = time.monotonic()
                state = parallel.unreplicate(on_devices)
                alphas = _alphas(t, done, state.params)
                finite.network(state, alphas.mean)
                if "cut_off" in recent[-1] and done <= first + t.eval_every:  # once is enough
                    warn_of_cut_off(state.model_state[RANGES], recent[-1]["cut_off"])
                line = {
                    "step": done,
                    "epoch": done / per_epoch,
                    "alpha": alphas.mean,
                    "activation_alpha": alphas.activations,
                    "learning_rate": float(t.learning_rate((done - 1) // t.accumulate)),
                    "train_loss": float(np.mean([m["loss"] for m in recent])),
                    "train_accuracy": float(np.mean([m["accuracy"] for m in recent])),
                    **readings.metrics(state, alphas.weights, alphas.activations),
                }
                if left := int(sum(m.get("not_finite_inputs", 0) for m in recent)):
                    line["not_finite_inputs"] = left
                run.write_metrics({**line, "images_per_second": speed})
                # After its line, which a run that is cut off in between computes again.
                standing = Standing(run.seal(), alphas.by_path(), taught_by)
                accuracy = line.get("recalibrated_accuracy")
                checkpoints.save(state, accuracy=accuracy, standing=standing)
                recent.clear()
                measured_from, since = 0, time.monotonic()
                evaluating.append(since - stood_still)
        if done < t.steps:
            look()
            state = parallel.unreplicate(on_devices)
            alphas = _alphas(t, done, state.params)
            finite.network(state, alphas.mean)
            if recent:
                standing = Standing(run.seal(), alphas.by_path(), taught_by)
                interval = Interval.of(recent, jax.device_get(readings.codes))
                checkpoints.save(state, interval=interval, standing=standing)
            raise StoppedError(run.path, done, stop())
    alphas, lines = _alphas(t, t.steps, state.params), run.metrics
    summary = readings.summary(
        state, alphas.weights, alphas.activations, lines, read_test=t.read_test
    )
    summary |= {
        "parameters": table.parameters,
        "bytes": {"trained": table.bytes_before, "packed": table.bytes_after},
        "start": accuracies_of(t.init_from),
        **({} if taught_by is None else {"teacher": taught_by}),
        **({} if member is None else {"together": member.described()}),
    }
    seconds = time.monotonic() - started
    with first_succeeds(f"Writing the record of {run.path}"):
        timed = {"seconds": seconds, "evaluation_seconds": evaluating}
        return run.complete({**summary, "steps": t.steps, **timed, "resumed_at": first})


def _alphas(training: Training, step: int, params: Any) -> Alphas:
    activations = training.activation_alpha
    return Alphas.of(
        params,
        training.rules,
        training.alpha(step),
        None if activations is None else float(activations(step)),
    )


def _initial_state(training: Training, checkpoints: Checkpoints) -> TrainState:
    t = training
    takes_scales = takes_scale(t.estimator)
    if (t.rebase_norm or t.calibration is not None) and t.init_from is None:
        raise ValueError(
            "--rebase_norm and --calibrate are for a network that is trained already. Name one by "
            "--init_from, or omit them."
        )
    if t.calibration is not None and not takes_scales:
        raise ValueError(
            "A calibrated start needs an estimator that takes its scales, such as "
            "ab_jax.at_fixed_scales(ab_jax.alpha_blend) or ab_jax.learned_step_size."
        )
    optimizer = optimizer_of_state(t)
    state = create_state(
        t.model,
        optimizer,
        t.dataset.image_shape,
        t.seed,
        scale_rules=t.rules if takes_scales else None,
        fit_rules=t.rules if t.refit_every > 1 else None,
    )
    if checkpoints.latest_step is not None:
        return checkpoints.restore(state)
    if t.init_from is None:
        return state
    state = network_from(t.init_from, state, new_head=t.new_head)
    of_images = (t.model, t.preprocessing, t.dataset.train, t.seed)
    if t.calibration is not None:
        state = calibrated(state, *of_images, rules=t.rules, start=t.calibration)
    elif takes_scales:
        state = dataclasses.replace(state, scales=initial_scales(state.params, t.rules))
    if t.rebase_norm:
        calibrated_by = None if t.calibration is None else t.rules
        state = with_rebased_norm(state, *of_images, calibrated_by=calibrated_by)
    # An optimizer may have something of the weights in its state.
    return dataclasses.replace(state, opt_state=optimizer.init(state.trained))
