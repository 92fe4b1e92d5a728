"""From a study's file to runs: the parts of `experiments.study`."""
