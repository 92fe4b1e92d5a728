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

from experiments import train
from experiments.settings.config import Config

DEFAULTS = Config(network="binarynet", name="binarynet_cifar10")

if __name__ == "__main__":
    train.main(DEFAULTS, __doc__, "experiments.binarynet_cifar10")
