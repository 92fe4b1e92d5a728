"""Training: state, step, devices, checkpoints, records and the one loop over them."""
