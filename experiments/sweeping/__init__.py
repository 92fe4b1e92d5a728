"""From lists of flags to processes: the parts of `experiments.sweep`."""
