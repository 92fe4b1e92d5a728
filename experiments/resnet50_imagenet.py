r"""ResNet-50 v1 and v2 with low-precision weights and activations, by STE, soft STE or AB.

Source: arXiv 1512.03385 and 1603.05027 for the networks (with the stride in the 3x3 convolution, as
torchvision and timm have it), alpha-blending (arXiv 1903.01061) for the method. Ramp, learning
rates, quantizers and the treatment of activations are our choice.

    python -m experiments.resnet50_imagenet --network=resnet50_v2 --method=ab --weights=int4 \
        --act_bits=4

Small, on two cores, about half an hour for both phases:

    python -m experiments.resnet50_imagenet --image_size=32 --classes=50 --width=0.125 \
        --float_epochs=12 --epochs=6 --method=ab --weights=int4 --act_bits=4 --name=small/ab

What to expect, at 16 pixels, 100 classes and width 0.125, is in docs/tiny_imagenet.md: float at
25 % (v1) and 28 % (v2), every method one or two points below it at W4A4.
"""

from experiments import train
from experiments.settings.config import Config

DEFAULTS = Config(
    network="resnet50_v1",
    weights="int8",
    outer_bits=8,  # the first and the last layer are a small part of the network and lose the most
    act_bits=8,
    dataset="tiny_imagenet",
    float_epochs=60.0,
    learning_rate=0.02,
    weight_decay=1e-4,
    name="resnet50",
)

if __name__ == "__main__":
    train.main(DEFAULTS, __doc__, "experiments.resnet50_imagenet")
