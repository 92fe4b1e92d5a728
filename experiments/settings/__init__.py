"""From flags to what the trainer takes: one record a method, a network and a data set."""
