"""Studies and tools, each run as a module: `python -m experiments.NAME --help`."""
