r"""Networks that were trained a little further, read as calibrated ones are: beside the float one.

    AB_JAX_PHOTOGRAPHS=PATH python -m experiments.pretrained.read_runs runs/mine/* \
        --weights_file=mobilenet.h5 --results=results/mine

A run is one on images of `experiments.pretrained.training_images`, whose test images are but a part
of those that calibrated networks are read on. Of its last checkpoint the codes are read, with batch
statistics re-estimated on all training images: a run itself takes the first 640, which is enough to
follow its training, and moves MobileNet by a point.

Each run gets a record of the form of `python -m experiments.pretrained`: RESULTS/STAGE/RUN.json,
where STAGE/RUN are the last two parts of the run's path. Those that are there are skipped.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ab_jax as ab
from ab_jax.data.dataset import Dataset
from ab_jax.training.evaluation import Evaluator
from ab_jax.training.parallel import Parallel
from ab_jax.training.records import describe_run, write_json
from ab_jax.training.train_step import Preprocessing
from experiments.exported.finished_networks import TrainedNetwork, read_run
from experiments.pretrained.calibration_records import bytes_of_codes
from experiments.pretrained.image_sources import ImageSources
from experiments.pretrained.pretrained_models import pretrained_model
from experiments.pretrained.readings import Logits, Reader
from experiments.pretrained.training_images import PHOTOGRAPHS
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import Config as RunConfig
from experiments.settings.config import FlagError
from experiments.settings.datasets import load_dataset

_DATA = "experiments.pretrained.training_images:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which runs, beside which float network, and on which images."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of finished runs
    results: Path  # records go below it
    network: str = "mobilenet_v1_025"  # the float network, as of python -m experiments.pretrained
    weights_file: Path | None = None  # likewise
    data_dir: str | None = None  # where Tiny ImageNet was prepared; None: $TFDS_DATA_DIR
    # test: accuracies on test images; choice: on images of Tiny ImageNet to choose settings on.
    read: str = "test"
    batch_size: int = 32  # images at a time


def conduct(config: Config) -> None:
    """Read the runs that have no record yet.

    Raises:
      FlagError, ValueError, OSError: a flag, a run or an image that cannot be taken; names it.
    """
    c = config
    wanted = {path: c.results / path.parent.name / f"{path.name}.json" for path in c.runs}
    if not (missing := {run: path for run, path in wanted.items() if not path.exists()}):
        return
    of_runs = {run: _checked(run) for run in missing}
    given = os.environ.get(PHOTOGRAPHS)
    model = pretrained_model(c.network, c.weights_file)
    sources = ImageSources(
        source="both" if given else "tiny",
        photographs=Path(given) if given else None,
        data_dir=c.data_dir,
        size=model.size,
    )
    reader = Reader(model, sources.to_read(c.read), batch_size=c.batch_size)
    images: dict[str, Dataset] = {}  # by the name of the data set, which many runs share
    for run, path in missing.items():
        dataset = of_runs[run].description["config"]["dataset"]
        if dataset not in images:
            images[dataset] = _loaded(of_runs[run], c.data_dir)
        record = describe_run("experiments.pretrained.read_runs", {})
        record |= record_of(of_runs[run], images[dataset], reader, batch_size=c.batch_size)
        record["seconds"] = json.loads((run / "record.json").read_text())["summary"]["seconds"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        below = ", ".join(f"{n} {x:.2f}" for n, x in record["points_below_float"].items())
        print(f"{run}: {below} points below float", flush=True)


def _checked(run: Path) -> TrainedNetwork:
    network = read_run(run)
    dataset = network.description["config"]["dataset"]
    if not dataset.startswith(_DATA):
        raise FlagError(f"{run} was trained on {dataset}, whose classes are none of {_DATA}NAME.")
    return network


def _loaded(network: TrainedNetwork, data_dir: str | None) -> Dataset:
    """The images that a network was trained on."""
    flags = RunConfig(**network.description["config"])
    images = load_dataset(dataclasses.replace(flags, data_dir=data_dir))
    assert isinstance(images, Dataset)
    return images


def record_of(
    network: TrainedNetwork, images: Dataset, reader: Reader, *, batch_size: int
) -> dict[str, Any]:
    """What a record says of a trained network: its flags, without a place, readings and bytes.

    Args:
      images: that it was trained on.
    """
    config = {**network.description["config"], "data_dir": None}
    logits = logits_of(network, images, batch_size=batch_size)
    return {
        "config": config,
        **reader.beside_float(reader.of_function(logits)),
        "images": {
            "calibrated": config["calibration_images"] if config["calibrate"] else 0,
            "trained": len(images.train),
            "read": reader.counts,
        },
        "steps": network.description["step"],
        "bytes": bytes_of_codes(network.variables["params"]),
    }


def logits_of(network: TrainedNetwork, images: Dataset, *, batch_size: int) -> Logits:
    """The network's function of uint8 pixels, with batch statistics of these training images."""
    preprocessing = Preprocessing(images.mean, images.std)
    evaluator = Evaluator(
        network.model, preprocessing, Parallel("pmap", tuple(jax.devices()[:1])), batch_size
    )
    state = dict(network.variables)
    params = ab.dequantize(state.pop("params"))
    placed = evaluator.place(images.train)
    state = evaluator.recalibrate(params, state, 1.0, placed, len(images.train) // batch_size)

    @jax.jit
    def function(params: Any, state: Any, pixels: jax.Array) -> Any:
        normalized = preprocessing.normalize(pixels)
        return network.model.apply({"params": params, **state}, normalized, train=False)

    def logits(pixels: np.ndarray) -> Any:
        return function(params, state, jnp.asarray(pixels))

    return logits


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config,
        prog="python -m experiments.pretrained.read_runs",
        description=__doc__,
        use_underscores=True,
    )
    end_with_a_line(lambda: conduct(config))


if __name__ == "__main__":
    main()
