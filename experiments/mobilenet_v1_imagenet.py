r"""MobileNet v1 with low-precision weights and activations, by STE, soft STE or AB.

Source: arXiv 1704.04861 for the network, alpha-blending (arXiv 1903.01061) for the method. Ramp,
learning rates, quantizers and the treatment of activations are our choice.

    python -m experiments.mobilenet_v1_imagenet --method=ab --weight_bits=8 --act_bits=8

Small, on two cores, about a quarter of an hour for both phases:

    python -m experiments.mobilenet_v1_imagenet --image_size=32 --classes=50 --width=0.25 \
        --float_epochs=12 --epochs=6 --method=ab --weight_bits=4 --name=small/ab

What to expect, at 16 pixels, 100 classes and width 0.25, is in docs/tiny_imagenet.md: float at
23 %, every method within a point of it at W8A8 and one or two below it at W4A8.
"""

from typing import Any

import flax.linen as nn
import tyro

from ab_jax.models.mobilenet import MobileNet
from experiments.recipes import imagenet, imagenet_training
from experiments.recipes.command_line import end_with_a_line
from experiments.recipes.imagenet import Config


def make_model(config: Config, **fields: Any) -> nn.Module:
    """The network that the flags ask for; `fields` are those of `imagenet.make_model`."""
    return imagenet.make_model(MobileNet, config, **fields)


def run(config: Config) -> dict[str, Any]:
    """Train as the flags say and return the run's record."""
    return imagenet_training.run(config, make_model, "experiments.mobilenet_v1_imagenet")


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config, default=Config(name="mobilenet_v1"), description=__doc__, use_underscores=True
    )
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
