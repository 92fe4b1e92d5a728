"""From run records to tables, plots and a page: the parts of `experiments.report`."""
