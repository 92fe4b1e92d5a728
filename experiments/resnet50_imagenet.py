r"""ResNet-50 v1 and v2 with low-precision weights and activations, by STE, soft STE or AB.

Source: arXiv 1512.03385 and 1603.05027 for the networks (with the stride in the 3x3 convolution, as
torchvision and timm have it), alpha-blending (arXiv 1903.01061) for the method. Ramp, learning
rates, quantizers and the treatment of activations are our choice.

    python -m experiments.resnet50_imagenet --version=2 --method=ab --weight_bits=4 --act_bits=4

Small, on two cores, about half an hour for both phases:

    python -m experiments.resnet50_imagenet --image_size=32 --classes=50 --width=0.125 \
        --float_epochs=12 --epochs=6 --method=ab --weight_bits=4 --act_bits=4 --name=small/ab

What to expect, at 16 pixels, 100 classes and width 0.125, is in docs/tiny_imagenet.md: float at
25 % (v1) and 28 % (v2), every method one or two points below it at W4A4.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import tyro

from ab_jax.models.resnet import TIMM_V2, TORCHVISION, resnet50
from experiments.recipes import imagenet, imagenet_training
from experiments.recipes.command_line import end_with_a_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(imagenet.Config):
    """Train ResNet-50 with low-precision weights and activations."""

    version: Literal[1, 2] = 1  # norm and activation after each convolution, or before it
    name: str = "resnet50"  # the run's directory below runs_dir; the same name resumes


def make_model(config: Config, **fields: Any) -> nn.Module:
    """The network that the flags ask for; `fields` are those of `imagenet.make_model`."""
    variant = TORCHVISION if config.version == 1 else TIMM_V2
    return imagenet.make_model(functools.partial(resnet50, variant=variant), config, **fields)


def run(config: Config) -> dict[str, Any]:
    """Train as the flags say and return the run's record."""
    return imagenet_training.run(config, make_model, "experiments.resnet50_imagenet")


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
