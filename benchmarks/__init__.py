"""What our training, loading and deployment cost, as ratios; a module is a command."""
