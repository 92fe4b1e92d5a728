"""A process that trains with others, and writes down all that it got: see test_processes.py.

    python -m tests.training.one_of_several COORDINATOR PROCESSES PROCESS INPUTS.npz OUT.npz

`compute` is also called by the test itself, which has all devices in its one process.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

import ab_jax as ab
from ab_jax import activations
from ab_jax.data import Images
from ab_jax.data.stream import load_stream
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.distributed import all_devices, check_same_flags, is_first, start
from ab_jax.training.evaluation import Evaluator
from ab_jax.training.feeds import InMemory, Streamed
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.retention import NoWholeCheckpointError
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.train_step import Preprocessing, make_train_step

BATCH, STEPS, CLASSES = 16, 3, 5
RULES = ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)])


class Net(nn.Module):
    """conv - norm - activation - dense, as the networks of the experiments are."""

    activation: Any = activations.relu
    axis_name: str | None = AXIS
    axis_index_groups: Any = None
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: Array, *, train: bool, alpha: ArrayLike = 1.0) -> Array:
        x = nn.Conv(3, (3, 3), use_bias=False, name="conv")(images)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.batch_stats_momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            name="norm",
        )(x)
        x = self.activation(x, alpha).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES, name="head")(x)


def last_gradient() -> optax.GradientTransformation:
    """Passes gradients on; its state is the last one."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )


OPTIMIZER = optax.chain(last_gradient(), optax.sgd(0.1, 0.9))


def images_for_signs() -> Images:
    """Always the same: a sum next to zero would change its sign in another order of its terms."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 4, 4, 1)).astype(np.uint8)
    return Images(images, rng.integers(0, CLASSES, 37).astype(np.int32))


def train_some(
    net: Net, parallel: Parallel, images: Images, seed: int, steps: int
) -> tuple[TrainState, dict[str, Any]]:
    """The last state, and what is to be compared: first gradient, parameters, metrics."""
    preprocessing = Preprocessing((0.45,), (0.25,), pad=1, flip=True)
    step = parallel.wrap(
        make_train_step(
            net,
            OPTIMIZER,
            rules=RULES,
            estimator=ab.alpha_blend,
            alpha=optax.linear_schedule(0.25, 1.0, transition_steps=3),
            preprocessing=preprocessing,
        ),
        [False, False, False, True, True],
        donate=[0],
    )
    state = create_state(net, OPTIMIZER, images.images.shape[1:], seed)
    on_devices, found = parallel.replicate(state), {}
    for i, batch in enumerate(InMemory(images, parallel).training(seed, BATCH, 0, steps)):
        on_devices, metrics = step(on_devices, *batch)
        state = jax.tree.map(np.array, parallel.unreplicate(on_devices))
        found[f"metrics{i}"] = parallel.unreplicate(metrics)
        if i == 0:
            found["gradient"] = state.opt_state[0]
            found["statistics"] = state.model_state["batch_stats"]
    found["params"] = state.params
    return parallel.unreplicate(parallel.replicate(state)), found


def read(net: Net, parallel: Parallel, images: Images, state: TrainState) -> dict[str, Any]:
    """Readings of a network, which count each image once, and its re-estimated statistics."""
    evaluator = Evaluator(net, Preprocessing((0.45,), (0.25,)), parallel, BATCH)
    placed = evaluator.place(images)
    reading = evaluator.read(state.params, state.model_state, 1.0, placed)
    fresh = evaluator.recalibrate(state.params, state.model_state, 1.0, placed, 2)
    return {"loss": reading.loss, "accuracy": reading.accuracy, "fresh": fresh["batch_stats"]}


def streamed(parallel: Parallel, data_dir: str, seed: int) -> dict[str, Any]:
    """Of each batch of a stream: the pixels of each image added up, at its place in the batch."""
    dataset = load_stream(
        "image_folder:photos",
        image_size=6,
        data_dir=data_dir,
        validation=5,
        share=parallel.share,
    )
    feed = Streamed(dataset.train, parallel)

    def sums(images: Array, labels: Array, indices: Array, places: Array) -> Array:
        brightness = images[indices].astype(np.int32).sum((1, 2, 3)) * (1 + labels[indices])
        return jax.lax.psum(jnp.zeros(8, np.int32).at[places].add(brightness), AXIS)

    def counted(images: Array, labels: Array, indices: Array, mask: Array) -> Array:
        brightness = images[indices].astype(np.int32).sum((1, 2, 3)) * (1 + labels[indices])
        seen = jnp.stack([mask.sum(), (brightness * mask).sum()])
        return jax.lax.psum(seen, AXIS)

    in_training, in_evaluation = (parallel.wrap(f, [True] * 4) for f in (sums, counted))
    drawn = [parallel.unreplicate(in_training(*b)) for b in feed.training(seed, 8, 1, 4)]
    read = [parallel.unreplicate(in_evaluation(*b)) for b in feed.evaluation(8)]
    return {"drawn": np.stack(drawn), "read": np.sum(read, axis=0)}


def compute(inputs: dict[str, Any], devices: tuple[jax.Device, ...], out: Path) -> dict[str, Any]:
    """Everything that is to be the same whatever the devices and processes; see test_processes."""
    images, seed = Images(inputs["images"], inputs["labels"]), int(inputs["seed"])
    found: dict[str, Any] = {}
    for mode in ("pmap", "shard_map"):
        parallel = Parallel(mode, devices)
        state, found[f"{mode}/relu"] = train_some(Net(), parallel, images, seed, STEPS)
        found[f"{mode}/reading"] = read(Net(), parallel, images, state)
        sign = Net(activation=activations.sign)
        _, found[f"{mode}/sign"] = train_some(sign, parallel, images_for_signs(), 0, 1)
    parallel = Parallel("shard_map", devices, norm_group=2)
    groups = Net(axis_index_groups=parallel.norm_groups)
    _, found["shard_map/groups"] = train_some(groups, parallel, images, seed, 1)
    found["stream"] = streamed(Parallel("shard_map", devices), str(inputs["data_dir"]), seed)
    with Checkpoints(out) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(out) as checkpoints:
        restored = checkpoints.restore(create_state(Net(), OPTIMIZER, images.images.shape[1:], 9))
        network = checkpoints.restore_network(
            create_state(Net(), OPTIMIZER, images.images.shape[1:], 9)
        )
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, network.params, state.params)
    found["restored"] = restored.params
    with Checkpoints(Path(str(inputs["checkpoint"]))) as checkpoints:
        like = create_state(Net(), OPTIMIZER, images.images.shape[1:], 9)
        found["of_one_process"] = checkpoints.restore(like).params
    return found


def flat(found: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(found)
    }


def main(coordinator: str, processes: str, process: str, inputs: str, out: str) -> None:
    """Join the others, compute, and try flags that differ and a checkpoint that is damaged."""
    start(coordinator, int(processes), int(process), timeout=60)
    found = compute(dict(np.load(inputs)), all_devices(), Path(inputs).with_name("checkpoints"))
    check_same_flags({"width": 0.5, "name": None})
    try:
        check_same_flags({"width": 0.5, "epochs": 1.0 + int(process), "name": "same"})
    except ValueError as error:
        found["refused"] = np.array(str(error))
    damaged = Path(inputs).with_name("damaged")
    if is_first():
        shutil.copytree(Path(inputs).with_name("checkpoints"), damaged)
        (path,) = damaged.glob("*/about.json")
        path.write_bytes(path.read_bytes() + b" ")
    with Checkpoints(damaged) as checkpoints:
        try:
            found["damaged"] = np.array(checkpoints.latest_step)
        except NoWholeCheckpointError as error:
            found["damaged"] = np.array(str(error))
    np.savez(out, **flat(found), **{"devices": len(jax.devices()), "own": jax.process_index()})


if __name__ == "__main__":
    main(*sys.argv[1:])
