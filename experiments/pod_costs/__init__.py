"""The parts of `experiments.plan`: what a network costs, and what chips and links give."""
