"""What several training experiments have in common: methods by name, and the ImageNet networks."""
