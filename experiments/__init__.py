"""Training and what is made of it: each file here is a command (`python -m experiments.NAME`).

The folders hold what the commands are made of.
"""
