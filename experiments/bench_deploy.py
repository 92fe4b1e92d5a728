"""What integers are worth in deployment: size and latency against float32 on the CPU.

    python -m experiments.bench_deploy        (at most five minutes on two cores)

MobileNet v1 and ResNet-50 v1 of random weights, 8-bit weights and activations, as
`experiments.export --format=onnx` writes them, run by ONNX Runtime in integers and in float32, and
by JAX: of one image and of a batch, on one core and on two. All in one process: in every round each
of them runs once, in an order drawn anew, so that neither a slower minute of the machine nor what a
neighbour leaves in the caches falls on one more than on another. Ratios are taken within a round;
the table gives the median over the rounds with its 95 % interval.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import tyro

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.describe import describe
from ab_jax.export.fold import fold_batch_norm
from ab_jax.export.graph import Graph
from ab_jax.export.integers import evaluate_in_integers
from ab_jax.export.onnx import IMAGES, to_onnx
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import resnet50
from ab_jax.quantized_inputs import ActivationRules, QuantizedInputs
from ab_jax.training.records import describe_run, write_json
from experiments.choices import choose
from experiments.reporting.paired_statistics import median_interval

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1_050": lambda **fields: MobileNet(width=0.5, **fields),
    "mobilenet_v1_100": MobileNet,
    "resnet50_v1": resnet50,
}
_TITLES = {
    "mobilenet_v1_050": "MobileNet v1, width 0.5",
    "mobilenet_v1_100": "MobileNet v1",
    "resnet50_v1": "ResNet-50 v1",
}
_RULES = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=8, scale="absmax")), (r".*", None)])
_INPUTS = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, signed=True, limit=4.0)),
        (r".*", ActivationQuantizer(bits=8, limit=6.0)),
    ]
)
_REST = 0.01  # seconds before a measurement, for the threads of the last one to fall asleep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time, and where to write the record."""

    networks: tuple[str, ...] = tuple(MODELS)
    image_size: int = 224  # pixels
    batch_size: int = 32  # images in the larger of the two batches
    single: int = 10  # runs in a row in a measurement of one image
    cores: tuple[int, ...] = (1, 2)  # how many to use
    rounds: int = 9  # measurements of each, after a round to warm up
    seed: int = 0  # of the order in which a round runs them
    out: Path = Path("results/bench_deploy/w8a8.json")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network in the forms that are compared.

    Attributes:
      model: in float32.
      variables: of the model.
      graph: of the quantized network, with batch norm folded.
      files: ONNX files by what they compute in: float32, or int8 in the two ways of `to_onnx`.
    """

    model: nn.Module
    variables: Any
    graph: Graph
    files: dict[str, bytes]


Run = Callable[[np.ndarray], Any]  # from normalized images to the end of the computation


def _onnx_runtime(form: str) -> Callable[[Subject, int], Run]:
    def make(subject: Subject, cores: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            subject.files[form], options, providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(None, {IMAGES: images})

    return make


def _jax_float(subject: Subject, cores: int) -> Run:
    apply = jax.jit(lambda images: subject.model.apply(subject.variables, images, train=False))
    return lambda images: jax.block_until_ready(apply(images))


def _jax_integers(subject: Subject, cores: int) -> Run:
    apply = jax.jit(lambda images: evaluate_in_integers(subject.graph, images))
    return lambda images: jax.block_until_ready(apply(images))


#: What is timed, by runtime and form: a function of the subject and the number of cores. The first
#: is what the others are compared with.
CASES: dict[str, Callable[[Subject, int], Run]] = {
    "ONNX Runtime, float32": _onnx_runtime("float32"),
    "ONNX Runtime, int8": _onnx_runtime("int8"),
    "ONNX Runtime, int8, integer biases": _onnx_runtime("int8, integer biases"),
    "JAX, float32": _jax_float,
    "JAX, int8": _jax_integers,
}


def run(config: Config) -> dict[str, Any]:
    """Time the networks, write the record and return it."""
    c = config
    if min(c.rounds, c.single, c.batch_size, *c.cores) < 1:
        raise ValueError(
            f"--rounds={c.rounds}, --single={c.single}, --batch_size={c.batch_size} and "
            f"--cores={c.cores} must be at least 1."
        )
    makers = {name: choose("networks", name, MODELS) for name in c.networks}
    everything = _cores()
    if everything and max(c.cores) > len(everything):
        raise ValueError(
            f"--cores={max(c.cores)}, but this process may use {len(everything)}. Give fewer."
        )
    subjects = {name: make_subject(make, c.image_size) for name, make in makers.items()}
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, subject in subjects.items():
        try:
            seconds[name] = _time(c, subject, everything)
        finally:
            _bind(everything)
    flags = {**dataclasses.asdict(c), "out": str(c.out)}
    record = {
        **describe_run("experiments.bench_deploy", flags),
        "onnxruntime": onnxruntime.__version__,
        "bytes": {
            name: {form: len(data) for form, data in subject.files.items()}
            for name, subject in subjects.items()
        },
        "seconds": seconds,
    }
    c.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(c.out, record)
    return record


def make_subject(make_model: Callable[..., nn.Module], image_size: int) -> Subject:
    """A network with random kernels of unit gain, with norms that change nothing."""
    shape = (image_size, image_size, 3)
    plain = make_model()
    quantized = make_model(quantize_input=QuantizedInputs(_INPUTS))
    spec = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x, train=False), spec)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "kernel":
            gain = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(gain * rng.standard_normal(leaf.shape, np.float32))
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    variables = jax.tree.map_with_path(draw, shapes)
    whole = {**variables, "params": ab.quantize(variables["params"], _RULES)}
    graphs = {
        "float32": describe(plain, variables, shape),
        "int8": describe(quantized, whole, shape),
    }
    files = {
        "float32": to_onnx(graphs["float32"]),
        "int8": to_onnx(graphs["int8"]),
        "int8, integer biases": to_onnx(graphs["int8"], integer_biases=True),
    }
    written = {form: file.SerializeToString() for form, file in files.items()}
    return Subject(plain, variables, fold_batch_norm(graphs["int8"]), written)


def _time(
    config: Config, subject: Subject, everything: tuple[int, ...]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one batch by conditions, case and round."""
    c = config
    rng = np.random.default_rng(c.seed)
    shape = (c.image_size, c.image_size, 3)
    batches = {n: rng.standard_normal((n, *shape), np.float32) for n in sorted({1, c.batch_size})}
    runs = {(case, n): make(subject, n) for case, make in CASES.items() for n in c.cores}
    seconds: dict[str, dict[str, list[float]]] = {
        _conditions(size, cores): {case: [] for case in CASES}
        for size in batches
        for cores in c.cores
    }
    for number in range(c.rounds + 1):
        for cores in c.cores:
            _bind(everything[:cores])
            for size, images in batches.items():
                repeats = c.single if size == 1 else 1
                for case in rng.permutation(list(CASES)):
                    time.sleep(_REST)
                    started = time.perf_counter()
                    for _ in range(repeats):
                        runs[case, cores](images)
                    took = (time.perf_counter() - started) / repeats
                    if number:  # the first round compiles and warms up
                        seconds[_conditions(size, cores)][case].append(took)
    return seconds


def _conditions(images: int, cores: int) -> str:
    plural = ("image", "core")
    return ", ".join(
        f"{n} {p}{'s' * (n > 1)}" for n, p in zip((images, cores), plural, strict=True)
    )


def _cores() -> tuple[int, ...]:
    """Those this process may use; empty where the system cannot tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _bind(cores: Sequence[int]) -> None:
    """Keep all threads of this process on these cores, where the system can."""
    tasks = Path("/proc/self/task")
    if cores and tasks.is_dir():
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(int(task.name), cores)


def table(records: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of records of the same conditions: ratios to float32 in ONNX Runtime."""
    first = records[0]
    conditions = list(next(iter(first["seconds"].values())))
    lines = [
        f"| network | runtime | file | {' | '.join(conditions)} |",
        f"| --- | --- | ---: |{' ---: |' * len(conditions)}",
    ]
    for record in records:
        for name, by_conditions in record["seconds"].items():
            for case in by_conditions[conditions[0]]:
                size = _size(record["bytes"][name], case)
                cells = [_ratio(by_conditions[one], case) for one in conditions]
                lines.append(f"| {_TITLES[name]} | {case} | {size} | {' | '.join(cells)} |")
    rounds = ", ".join(str(record["config"]["rounds"]) for record in records)
    pixels = first["config"]["image_size"]
    lines += [
        "",
        f"Time of a batch / ONNX Runtime in float32: median [95 % interval] over n = {rounds} "
        f"rounds, {pixels} x {pixels} images; {first['hardware']}; onnxruntime "
        f"{first['onnxruntime']}, jax {first['packages']['jax']}.",
    ]
    return "\n".join(lines)


def _size(sizes: dict[str, int], case: str) -> str:
    runtime, _, form = case.partition(", ")
    if runtime == "JAX":
        return ""
    if form == "float32":
        return f"1 ({sizes[form] / 1e6:.1f} MB)"
    return f"{sizes[form] / sizes['float32']:.3f}"


def _ratio(seconds: dict[str, list[float]], case: str) -> str:
    baseline = next(iter(seconds))
    if case == baseline:
        return f"1 ({1e3 * statistics.median(seconds[case]):.1f} ms)"
    ratios = [a / b for a, b in zip(seconds[case], seconds[baseline], strict=True)]
    low, high = median_interval(ratios)
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """The command line; prints the table."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        print(table([run(config)]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
