"""What `experiments.export` is made of: networks as finished runs and exported files have them."""
