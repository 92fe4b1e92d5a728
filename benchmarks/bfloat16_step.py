"""What bfloat16 saves in a training step, of layers and of norms: bytes, memory, time.

    python -m benchmarks.bfloat16_step        (some twenty minutes on two cores)

BinaryNet, AB's step to 1-bit weights, with `dtype` and `norm_dtype` of float32 or bfloat16, in
turns (`measuring.ratios`). The others are compared with the step of layers in bfloat16 and norms in
float32, which runs twice a round. Bytes and temporaries are the compiler's counts. CPUs compute
bfloat16 in float32 and round: only an accelerator's times say anything.

`--topology=v5e:2x2` has bytes counted for a TPU that is not there, by its compiler: that wants
`pip install libtpu`, and in the environment `JAX_PLATFORMS=cpu`, `TPU_SKIP_MDS_QUERY=1` and
`TPU_WORKER_HOSTNAMES=localhost`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.state import create_state
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.ratios import going_on, in_rounds, markdown, over_rounds, ratio_cells
from benchmarks.step import compiled_step

LAYERS = "bfloat16, norms in float32"
AGAIN = f"{LAYERS}, again"
#: Fields of the network by the name in tables; the first is what the others are compared with.
PRECISIONS: dict[str, dict[str, Any]] = {
    LAYERS: {"dtype": jnp.bfloat16},
    AGAIN: {"dtype": jnp.bfloat16},
    "bfloat16, norms in bfloat16": {"dtype": jnp.bfloat16, "norm_dtype": jnp.bfloat16},
    "float32": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and where to write the record."""

    width: float = 1.0  # multiplies the features of every hidden layer of BinaryNet
    image_size: int = 32  # pixels
    batch_size: int = 128  # images
    rounds: int = 11  # measurements of each step, after a round to warm up
    topology: str | None = None  # count bytes for a TPU too, as v5e:2x2; needs its compiler, libtpu
    seed: int = 0  # of the order in which a round runs the steps
    out: Path = Path("results/bench_bfloat16/step.json")


@recorded("benchmarks.bfloat16_step")
def run(config: Config) -> Record:
    """Count bytes and time the steps."""
    require_at_least_one(config, "rounds")
    places = {"here": jax.devices()[0]}
    if config.topology is not None:
        places[config.topology] = _device_of(config.topology)
    counts: dict[str, dict[str, dict[str, float]]] = {place: {} for place in places}
    cases = {}
    for name, fields in PRECISIONS.items():
        for place, device in places.items():
            if name == AGAIN and place != "here":
                continue  # a compiler counts alike
            program, arguments = _compiled(config, fields, device)
            counts[place][name] = _counted(program)
            if place == "here":
                cases[name] = _case(program, arguments)
    found = in_rounds(cases, rounds=config.rounds, seed=config.seed)
    return {
        "counts": counts,
        "seconds": {name: [took.wall for took in times] for name, times in found.items()},
    }


def _device_of(topology: str) -> Any:
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except Exception as error:  # whatever the plugin raises
        raise ValueError(
            f"--topology={topology}: there is no compiler for it here ({error}). Install libtpu, "
            f"name a topology that it knows, such as v5e:2x2, or omit the flag."
        ) from error


def _compiled(config: Config, fields: dict[str, Any], device: Any) -> tuple[Any, tuple[Any, ...]]:
    """A step compiled for a device, and what it takes, as NumPy's arrays."""
    c = config
    parallel = Parallel("shard_map", (device,))
    model = BinaryNet(width=c.width, axis_name=AXIS, **fields)
    step, optimizer = compiled_step(model, ab.alpha_blend, ab.Binary(), parallel)
    state = create_state(model, optimizer, (c.image_size, c.image_size, 3), seed=0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (c.batch_size, c.image_size, c.image_size, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, c.batch_size).astype(np.int32)
    indices = np.arange(c.batch_size, dtype=np.int32)
    arguments = (state, images, labels, indices, indices)
    mesh = jax.sharding.Mesh(np.array([device]), (AXIS,))

    def shapes(tree: Any, spec: P) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    specs = (P(), P(), P(), P(AXIS), P(AXIS))
    lowered: Any = step.lower(*map(shapes, arguments, specs))  # type: ignore[attr-defined]
    return lowered.compile(), arguments


def _counted(program: Any) -> dict[str, float]:
    cost = program.cost_analysis()
    return {
        "bytes": float(cost["bytes accessed"]),
        "temporaries": float(program.memory_analysis().temp_size_in_bytes),
    }


def _case(program: Any, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    placed = jax.tree.map(jax.device_put, arguments, program.input_shardings[0])
    state, *others = placed
    return going_on(lambda state: program(state, *others), state)


def table(records: Sequence[Record]) -> str:
    """The Markdown table of a record: bytes and temporaries by place, time as a ratio."""
    (record,) = records
    first = next(iter(record["seconds"]))
    times = ratio_cells(record["seconds"], lambda s: f"{s:.2f} s")
    head = ["layers"]
    for place in record["counts"]:
        told = "" if place == "here" else f", {place}"
        head += [f"bytes{told}", f"temporaries{told}"]
    rows = []
    for name in record["seconds"]:
        cells = []
        for counted in record["counts"].values():
            cells.append(_ratio(counted, name, first, "bytes", 1e9, "GB"))
            cells.append(_ratio(counted, name, first, "temporaries", 1e6, "MB"))
        rows.append([name, *cells, times[name]])
    c = record["config"]
    caption = (
        f"AB's step to 1-bit weights / that with {first}: time {over_rounds(records)}. BinaryNet "
        f"of width {c['width']:g}, {c['batch_size']} images of {c['image_size']} x "
        f"{c['image_size']}. Bytes accessed and temporaries are the compiler's counts; "
        f"{record['hardware']}; {versions(record)}."
    )
    return f"{markdown([*head, 'time'], rows)}\n\n{caption}"


def _ratio(
    counted: dict[str, Any], name: str, first: str, what: str, unit: float, told: str
) -> str:
    if name not in counted:
        return "–"
    value, base = counted[name][what], counted[first][what]
    return f"1 ({value / unit:.2f} {told})" if name == first else f"{value / base:.3f}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
