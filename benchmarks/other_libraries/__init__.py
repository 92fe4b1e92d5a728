"""ab_jax beside the libraries that people would reach for instead: Qwix and AQT."""
