"""Training and what is made of it: each file here is a command (`python -m experiments.NAME`).

The folders hold what the commands are made of.
"""

from ab_jax.moved import answer_for

answer_for(
    {
        "experiments.bench_data": "benchmarks.loading",
        "experiments.bench_deploy": "benchmarks.deploy",
        "experiments.bench_peers": "benchmarks.peers",
        "experiments.bench_step": "benchmarks.step",
        "experiments.compare_exports": "benchmarks.exported_answers",
        "experiments.compare_peers": "benchmarks.peers_accuracy",
        "experiments.generated_imagenet": "benchmarks.measuring.generated_imagenet",
        "experiments.guides": "examples",
        "experiments.guides.equinox": "examples.equinox_digits",
        "experiments.guides.haiku": "examples.haiku_digits",
        "experiments.guides.linen": "examples.linen_digits",
        "experiments.guides.nnx": "examples.nnx_digits",
        "experiments.quickstart": "examples.quickstart",
        "experiments.sharded_blend": "examples.sharded_blend",
    }
)
