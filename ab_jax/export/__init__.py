"""A trained network carried elsewhere: its codes and scales as files and programs."""
