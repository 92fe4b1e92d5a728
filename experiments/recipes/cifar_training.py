"""How the CIFAR networks train, as the flags of `experiments.recipes.cifar` say: in one phase."""

from typing import Any

from ab_jax.activations import ACTIVATIONS
from ab_jax.data import load
from experiments.recipes.cifar import Config, activation_rules, weight_rules
from experiments.recipes.methods import named
from experiments.recipes.processes import join
from experiments.recipes.training import MakeModel, train_network


def run(config: Config, make_model: MakeModel, experiment: str) -> dict[str, Any]:
    """Train as the flags say and return the run's record."""
    c = config
    join(c)
    # Refused before the data are loaded.
    rules = weight_rules(c)
    named("activation", c.activation, ACTIVATIONS)
    inputs = activation_rules(c)
    dataset = load(c.dataset, data_dir=c.data_dir, validation=c.validation, image_size=c.image_size)
    return train_network(
        c, experiment, dataset, make_model, rules, inputs, latent_limit=c.latent_limit
    )
