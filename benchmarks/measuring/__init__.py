"""The core of all benchmarks: turns, ratios, tables, records, the command line."""
