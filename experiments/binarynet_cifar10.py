r"""BinaryNet on CIFAR-10: 1-bit weights (and activations) in float, by STE, soft STE or AB.

Source: BinaryConnect (arXiv 1511.00363) and BinaryNet (arXiv 1602.02830) for the network,
alpha-blending (arXiv 1903.01061) for the method. Learning rates, ramp and schedule are our choice.

Full size, on an accelerator:

    python -m experiments.binarynet_cifar10 --method=float --seed=0 --name=float/seed0
    python -m experiments.binarynet_cifar10 --method=ab --seed=0 --init_from=runs/float/seed0

Small, on two cores, about two minutes each (see the README for the study made this way):

    python -m experiments.binarynet_cifar10 --dataset=cifar10_jpeg --image_size=16 --width=0.125 \
        --epochs=4 --method=float --name=small/float
    python -m experiments.binarynet_cifar10 --dataset=cifar10_jpeg --image_size=16 --width=0.125 \
        --epochs=4 --method=ab --init_from=runs/small/float --name=small/ab
"""

import dataclasses
from typing import Any

import flax.linen as nn
import tyro

from ab_jax.models.binarynet import BinaryNet
from experiments.recipes import cifar, cifar_training
from experiments.recipes.command_line import end_with_a_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(cifar.Config):
    """Train BinaryNet with low-precision weights."""

    name: str = "binarynet_cifar10"  # the run's directory below runs_dir; the same name resumes


def make_model(config: Config, *, image_size: int, **fields: Any) -> nn.Module:
    """The network that the flags ask for; `fields` are those of `cifar.make_model`."""
    del image_size  # it takes images of any size
    return cifar.make_model(BinaryNet, config, **fields)


def run(config: Config) -> dict[str, Any]:
    """Train as the flags say and return the run's record."""
    return cifar_training.run(config, make_model, "experiments.binarynet_cifar10")


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
