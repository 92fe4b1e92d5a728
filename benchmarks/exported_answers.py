"""Whether exported networks answer as their runs do: counted over the whole test set.

    python -m benchmarks.exported_answers runs/small/ab

The network of each run at alpha 1, as the run evaluates it, is compared with what is made of it:
its graph with batch norm folded, in integers, and each format of `experiments.export`, written to
a file and read back. Told are the accuracy, the images whose most likely class differs, and by how
much logits do, in steps of the last layer: what its largest weight makes of one step of its input.

The last line of the table says what to expect of rounding alone: the same network, computed in
float64. A value that falls on the border of two codes goes to the one or the other, and what an
early layer sees so differently is many steps in the logits of that image.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ab_jax as ab
from ab_jax.data import Dataset, load
from ab_jax.data.augment import normalize
from ab_jax.export.inference import inference
from ab_jax.export.integers import evaluate_in_integers
from ab_jax.export.traced import Codes, Operation, TracedFunction, trace, weighted_product
from ab_jax.export.traced.computing import ByJax, evaluate
from benchmarks.measuring.benchmark_command import Record, main, recorded
from benchmarks.measuring.ratios import markdown
from experiments import export
from experiments.exported.finished_networks import TrainedNetwork, load_packed, read_run
from experiments.settings.choices import choose
from experiments.settings.old_flags import todays

_BATCH = 250  # images at a time

Logits = Callable[[np.ndarray], Any]  # of normalized float32 images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which runs, and what is compared with them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of finished runs
    forms: tuple[str, ...] = ()  # what to compare; none: whatever can be run here
    # Training images too: agreement is what counts, and small data sets test on few.
    all_images: bool = False
    out: Path | None = None  # where to write the counts, as JSON


def folded(network: TrainedNetwork, directory: Path) -> Logits:
    """The graph in float32, batch norm folded."""
    graph = graph_of(network).simplified()
    return jax.jit(lambda images: evaluate(graph, images))


def integers(network: TrainedNetwork, directory: Path) -> Logits:
    """The same in integers."""
    graph = graph_of(network).simplified()
    return jax.jit(lambda images: evaluate_in_integers(graph, images))


def float64(network: TrainedNetwork, directory: Path) -> Logits:
    """The graph as it is, in float64."""
    return in_float64(graph_of(network))


def in_float64(graph: TracedFunction) -> Logits:
    """A graph computed in float64; codes of inputs are still those nearest in float32."""

    def logits(images: np.ndarray) -> Any:
        with jax.enable_x64(True):
            return compiled(images)

    compiled = jax.jit(lambda images: evaluate(graph, images, done=_widened))
    return logits


def packed(network: TrainedNetwork, directory: Path) -> Logits:
    """A packed file."""
    path = directory / "net.safetensors"
    export.packed(network, path)
    model, variables = load_packed(path)
    return jax.jit(lambda images: model.apply(variables, images, train=False))


def stablehlo(network: TrainedNetwork, directory: Path) -> Logits:
    """A StableHLO program."""
    path = directory / "net.stablehlo"
    export.stablehlo(network, path)
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def onnx(network: TrainedNetwork, directory: Path, *, integer_biases: bool = False) -> Logits:
    """An ONNX file in ONNX Runtime, from normalized images."""
    path = directory / "net.onnx"
    export.onnx(network, path, integer_biases=integer_biases, normalized=True)
    return in_onnx_runtime(path.read_bytes())


def in_onnx_runtime(data: bytes) -> Logits:
    """A file's answers, by kernels that are right on every processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def litert(network: TrainedNetwork, directory: Path) -> Logits:
    """A .tflite file in LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    path = directory / "net.tflite"
    export.litert(network, path)
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    return lambda images: runner(images=images)["logits"]


#: What a network is compared with, in the order of the table.
FORMS: dict[str, Callable[[TrainedNetwork, Path], Logits]] = {
    "folded": folded,
    "integers": integers,
    "packed": packed,
    "stablehlo": stablehlo,
    "onnx": onnx,
    "onnx_integer_bias": functools.partial(onnx, integer_biases=True),
    "litert": litert,
    "float64": float64,
}


#: What a table calls the runs of the records in results/, which are named for their settings alone.
TITLES = {
    "runs/digits_exports/binarynet_w1a8": "BinaryNet, W1A8",
    "runs/digits_exports/mobilenet_w8a8": "MobileNet v1, W8A8",
    "runs/digits_exports/resnet20_w4a4": "ResNet-20, W4A4",
    "runs/digits_exports/resnet20_w2": "ResNet-20, W2",
}


def graph_of(network: TrainedNetwork) -> TracedFunction:
    """The network as a graph."""
    net = inference(network.model, network.variables)
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    return trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges)


@recorded("benchmarks.exported_answers")
def run(config: Config) -> Record:
    """Compare the runs with what is made of them."""
    forms = {name: choose("forms", name, FORMS) for name in config.forms or FORMS}
    if not config.runs:
        raise ValueError("There are no runs to compare. Name some directories.")
    counts = {}
    for path in config.runs:
        network = read_run(path)
        counts[str(path)] = compare(
            network, *images_of(network, all_images=config.all_images), forms
        )
    return {"counts": counts}


def images_of(
    network: TrainedNetwork, *, all_images: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The test images of the run's data, or all of them, normalized, and their labels."""
    flags = todays(network.description["experiment"], network.description["config"])
    if flags.get("stream") or flags["dataset"] == "imagenet2012":
        raise ValueError(
            f"The run's data are a stream of {flags['dataset']}. Only images that fit in memory "
            f"are compared."
        )
    chosen = {"classes": flags["classes"]} if flags.get("classes") is not None else {}
    dataset: Dataset = load(
        flags["dataset"],
        data_dir=flags["data_dir"],
        validation=flags["validation"],
        image_size=flags["image_size"],
        **chosen,
    )
    parts = [dataset.test]
    if all_images:
        parts += [dataset.validation, dataset.train]
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    normalized = normalize(jnp.asarray(images), dataset.mean, dataset.std)
    return np.asarray(normalized), np.asarray(labels)


def compare(
    network: TrainedNetwork,
    images: np.ndarray,
    labels: np.ndarray,
    forms: dict[str, Callable[[TrainedNetwork, Path], Logits]],
) -> dict[str, Any]:
    """Counts by form, over all images."""
    variables = ab.dequantize(network.variables)
    model = jax.jit(lambda images: network.model.apply(variables, images, train=False))
    expected = _in_batches(model, images)
    step = last_step(graph_of(network).simplified())
    found: dict[str, Any] = {
        "images": len(images),
        "step": step,
        "correct": int(np.sum(expected.argmax(1) == labels)),
        "forms": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, make in forms.items():
            logits = _in_batches(make(network, Path(directory)), images)
            largest = np.abs(logits - expected).max(axis=1)
            classes = logits.argmax(1)
            found["forms"][name] = {
                "correct": int(np.sum(classes == labels)),
                "other_class": int(np.sum(classes != expected.argmax(1))),
                "above_one_step": None if step is None else int(np.sum(largest > step)),
                "largest": float(largest.max()),
            }
    return found


def last_step(traced: TracedFunction) -> float | None:
    """The most that a logit changes with one step of the last layer's input; None: it is float.

    The graph is simplified: batch norm may follow that layer.
    """
    makers: dict[Any, Operation] = {o.outputs[0]: o for o in traced.graph.operations}
    steps = []
    for operation in traced.graph.operations:
        product = weighted_product(operation)
        if product is None or operation.primitive != "dot_general":
            continue
        source = makers.get(operation.inputs[1 - product.side])
        if source is not None and source.primitive == "quantize":
            limit: Any = source.inputs[1]
            unit = source.params["quantizer"].scale(limit.array)
            weight = product.weight
            values = weight.values() if isinstance(weight, Codes) else weight.array
            steps.append(float(unit) * float(np.abs(values).max()))
    return steps[-1] if steps else None


def table(records: Sequence[Record]) -> str:
    """A Markdown table of the counts of some records, a column for each run."""
    counts = {run: found for record in records for run, found in record["counts"].items()}
    columns = list(counts.values())
    rows = [["the run", *(_percent(c["correct"], c["images"]) for c in columns)]]
    for form in columns[0]["forms"]:
        row = [form]
        for c in columns:
            found = c["forms"][form]
            accuracy, images = _percent(found["correct"], c["images"]), c["images"]
            row.append(f"{accuracy}, {found['other_class']} of {images:,} differ")
        rows.append(row)
    return markdown(["form", *(TITLES.get(run, run) for run in counts)], rows)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"


def _in_batches(logits: Logits, images: np.ndarray) -> np.ndarray:
    """All logits, float64; batches are of one size, for one compilation."""
    missing = -len(images) % _BATCH
    padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    batches = padded.reshape(-1, _BATCH, *images.shape[1:])
    found = np.concatenate([np.asarray(logits(batch), np.float64) for batch in batches])
    return found[: len(images)]


def _widened(operation: Operation, operands: Sequence[Any], by_jax: ByJax) -> Any:
    """An operation in float64, where codes times scales are exact."""
    name = operation.primitive
    if name == "quantize":
        x, limit = operands
        quantizer, limit = operation.params["quantizer"], jnp.float32(limit)
        codes = quantizer.codes(jnp.asarray(x, jnp.float32), limit)
        return codes.astype(jnp.float64) * quantizer.scale(limit).astype(jnp.float64)
    wide = [_wide(x) for x in operands]
    if name == "convert_element_type" and operation.params["new_dtype"] == jnp.float32:
        return jnp.asarray(wide[0], jnp.float64)
    params = dict(operation.params)
    if params.get("preferred_element_type") == jnp.float32:
        params["preferred_element_type"] = np.dtype(np.float64)
    return by_jax(dataclasses.replace(operation, params=params), wide)


def _wide(x: Any) -> Any:
    if isinstance(x, Codes):
        scales = tuple(scale.astype(np.float64) for scale in x.scales)
        return dataclasses.replace(x, scales=scales, dtype=np.dtype(np.float64)).values()
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jnp.asarray(x, jnp.float64) if is_float else x


if __name__ == "__main__":
    main(Config, run, table, __doc__)
