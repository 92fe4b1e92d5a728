"""A guide for each framework: an ordinary model of it, trained and exported by ab_jax."""
